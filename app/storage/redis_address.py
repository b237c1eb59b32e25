"""Reads the address of Redis: one server, or several of which Sentinel says which one takes writes."""

import re
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis import Connection
from redis.connection import parse_url
from redis.credentials import CredentialProvider
from redis.exceptions import RedisError

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
SENTINELS = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<who>[^@/?#]*)@)?(?P<hosts>[^@/?#]+)/(?P<service>[^/?#]+)(?P<rest>(?:/[0-9]*)?(?:\?.*)?)"
)
HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
DATABASE = re.compile(r"/?[0-9]*/?")
MOST_PORT = 65535
SENTINEL_PORT = 26379
TEXTS = {
    "client_name", "encoding", "encoding_errors", "host", "lib_name", "lib_version", "password", "path", "ssl_ca_certs",
    "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_ciphers", "ssl_keyfile", "ssl_password",
    "username",
}  # fmt: skip
"""Options of redis-py whose values are texts. A text for any other is one that it cannot read, and fails much later."""
OWN = "sentinel_"
"""Beginning of the options of connections to Sentinel, rather than to the servers that it names."""
FORM = "redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE"


class PasswordFile(CredentialProvider):
    """A user's password in a file, which is read for each new connection, so it can be changed without a restart."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return user and password. Raises OSError where the file cannot be read."""
        password = self._path.read_text(encoding="utf-8").strip()
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


@dataclass(frozen=True)
class RedisAddress:
    """What a URL says of connections to Redis, as redis-py takes it."""

    options: dict[str, Any] = field(repr=False)
    service: str | None = None
    """Name by which Sentinel knows the servers; None where the URL names one server."""
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read a URL. Beside redis-py's own there are those of Sentinel, and `password_file` in any of them.

        Raises ValueError where it is none, without a word of the secrets in it.
        """
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"MASKMERGE_REDIS_URL begins with none of {', '.join(f'{name}://' for name in SCHEMES)}")
        if "#" in url:  # a URL ends there for redis-py, which would take a part of a password for the port
            raise ValueError("MASKMERGE_REDIS_URL has a #; write it as %23, in user and password too")
        if not scheme.endswith("+sentinel"):
            return cls(_checked(_parsed(url)))
        found = SENTINELS.fullmatch(url)
        if found is None:
            raise ValueError(f"MASKMERGE_REDIS_URL is no URL of Sentinel; write it as {FORM}")
        who = "" if found["who"] is None else f"{found['who']}@"
        place, _, query = found["rest"].partition("?")
        pairs = parse_qsl(query)
        of_sentinel = [(name.removeprefix(OWN), value) for name, value in pairs if name.startswith(OWN)]
        others = [pair for pair in pairs if not pair[0].startswith(OWN)]
        options = _checked(_parsed(f"{found['scheme']}://{who}service{place}?{urlencode(others)}"))
        own = _checked(_parsed(f"{found['scheme']}://service?{urlencode(of_sentinel)}"), OWN)
        del own["host"]
        own.pop("connection_class", None)
        del options["host"]
        if options.pop("connection_class", None) is not None:
            options["ssl"] = True
            own |= {name: value for name, value in options.items() if name.startswith("ssl")}
        return cls(options, found["service"], _hosts(found["hosts"]), own)


def _parsed(url: str) -> dict[str, Any]:
    """Return what redis-py reads in a URL. Raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its message quotes the URL, where the port may be the beginning of a password
        problem = (
            f"ports end at {MOST_PORT}; write all but letters and digits of user and password as %2F is written for /"
        )
        raise ValueError(f"MASKMERGE_REDIS_URL has no host and port that can be read; {problem}") from None
    if port == 0:
        raise ValueError("MASKMERGE_REDIS_URL has port 0, at which nothing can be reached; give that of Redis, 6379")
    if parts.scheme != "unix" and not DATABASE.fullmatch(parts.path):  # redis-py would take database 0
        raise ValueError(
            "MASKMERGE_REDIS_URL has a path that is no number of a database; write it as redis://HOST:PORT/0"
        )
    try:
        options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(f"MASKMERGE_REDIS_URL: {error}") from None
    return options


def _checked(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options that redis-py has, with what reads the password's file in place of its name. Raises ValueError.

    Args:
        prefix: what the names of the options begin with in the URL.
    """
    path = options.pop("password_file", None)
    if path is not None:
        if "password" in options:
            raise ValueError("MASKMERGE_REDIS_URL has a password and a file of one; give one of them")
        options["credential_provider"] = PasswordFile(options.pop("username", None), Path(path))
    made: type[Connection] = options.get("connection_class", Connection)
    try:
        made(**{name: value for name, value in options.items() if name != "connection_class"})  # it connects later
    except TypeError as error:
        name = str(error).rpartition(" ")[2]  # it says that an unexpected argument came, and which
        raise ValueError(f"MASKMERGE_REDIS_URL has the option {name}, which redis-py does not have") from None
    except (RedisError, ValueError) as error:
        raise ValueError(f"MASKMERGE_REDIS_URL: {error}") from None
    for name, value in options.items():
        if isinstance(value, str) and name not in TEXTS:
            raise ValueError(
                f"MASKMERGE_REDIS_URL has the option {prefix}{name}, which a URL cannot give; leave it out"
            )
    _check_times(options, prefix)
    return options


def _check_times(options: dict[str, Any], prefix: str) -> None:
    for name in ("socket_timeout", "socket_connect_timeout", "timeout"):
        seconds = options.get(name)
        if seconds is not None and not 0 < seconds < inf:
            raise ValueError(f"MASKMERGE_REDIS_URL has the option {prefix}{name}={seconds:g}; give seconds above 0")


def _hosts(text: str) -> tuple[tuple[str, int], ...]:
    """Return the hosts and ports of a list. Raises ValueError, which quotes none, since one may be a password."""
    hosts = []
    for place, part in enumerate(text.split(","), start=1):
        found = HOST.fullmatch(part)
        if found is None:
            raise ValueError(f"server {place} of MASKMERGE_REDIS_URL is no HOST:PORT; write the URL as {FORM}")
        port = int(found["port"] or SENTINEL_PORT)
        if not 0 < port <= MOST_PORT:
            raise ValueError(f"server {place} of MASKMERGE_REDIS_URL has port {port}; ports are 1 to {MOST_PORT}")
        hosts.append((found["name"].strip("[]"), port))
    return tuple(hosts)
