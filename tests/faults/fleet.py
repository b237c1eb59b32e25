"""A service whose parts run as processes of their own, and everything that may happen to them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from redis import Redis
from redis.exceptions import RedisError

from app.contracts.lifetime import die_with_parent
from app.embedded_redis import EmbeddedRedis
from tests.conftest import REPOSITORY, free_port, running

MARK = "MASKMERGE_FLEET"
"""Variable that every process of a fleet has, whoever started it and whoever is its parent now."""
LINK = "198.18.{number}.{end}"
"""Addresses of a link: RFC 2544 keeps them for tests."""
SERVED = {
    "api": "app.cli",
    "inspector": "app.services.inspector",
    "worker": "worker",
    "engine": "worker.engine_process",
}


def has_namespaces() -> bool:
    """Return whether this process may make network namespaces, which takes root and `ip`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"mmprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode != 0:
        return False
    return subprocess.run(["ip", "netns", "del", name], check=False).returncode == 0


@dataclass
class Link:
    """A network namespace, and the one wire between it and the rest of the machine."""

    name: str
    number: int

    @property
    def near(self) -> str:
        return LINK.format(number=self.number, end=1)

    def open(self) -> None:
        far = LINK.format(number=self.number, end=2)
        for command in (
            f"netns add {self.name}",
            f"link add {self.name}a type veth peer name {self.name}b netns {self.name}",
            f"addr add {self.near}/30 dev {self.name}a",
            f"link set {self.name}a up",
            f"-n {self.name} addr add {far}/30 dev {self.name}b",
            f"-n {self.name} link set {self.name}b up",
            f"-n {self.name} link set lo up",
        ):
            _ip(command)

    def cut(self) -> None:
        _ip(f"link set {self.name}a down")

    def join(self) -> None:
        _ip(f"link set {self.name}a up")

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):
            _ip(f"netns del {self.name}")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@dataclass
class Fleet:
    """Redis; API and workers under a supervisor; and, where there are namespaces, a worker behind a wire of its own.

    All workers share one data folder. `keep_running` starts again what has ended.
    """

    root: Path
    inputs: Path
    workers: int = 2
    settings: Mapping[str, str] = field(default_factory=dict)
    has_link: bool = field(default_factory=has_namespaces)
    port: int = field(default_factory=free_port)
    redis_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}-{self.port}"
        self.data_dir = self.root / "data"
        self.link = Link(f"mm{self.port}", self.port % 250) if self.has_link else None
        self._server = EmbeddedRedis(self.root)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.root / "fleet.log"

    @contextmanager
    def started(self) -> Iterator["Fleet"]:
        if self.link is not None:
            self.link.open()
        try:
            self.keep_running()
            yield self
        finally:
            self._end()
            if self.link is not None:
                self.link.close()
            self._server.clean()

    def _commands(self) -> dict[str, list[str]]:
        bound = ["127.0.0.1", *([self.link.near] if self.link else [])]
        redis = [*self._server.command, "--port", str(self.redis_port), "--bind", *bound]
        serve = [sys.executable, "-m", "app.cli", "serve", "--port", str(self.port), "--workers", str(self.workers)]
        commands = {"redis": redis, "supervisor": serve}
        if self.link is not None:
            commands["remote"] = ["ip", "netns", "exec", self.link.name, sys.executable, "-m", "app.cli", "worker"]
        return commands

    def _environment(self, role: str) -> dict[str, str]:
        url = self._server.url
        if role == "remote" and self.link is not None:
            with self.redis() as redis:
                password = redis.get_connection_kwargs()["password"]
            url = f"redis://:{password}@{self.link.near}:{self.redis_port}"
        settings = {"redis_url": url, "data_dir": str(self.data_dir), "local_roots": str(self.inputs), **self.settings}
        variables = {f"MASKMERGE_{name.upper()}": value for name, value in settings.items()}
        return {**os.environ, **variables, MARK: self.mark, "OMP_NUM_THREADS": "1"}

    def keep_running(self) -> None:
        """Start what does not run."""
        for role, command in self._commands().items():
            process = self._processes.get(role)
            if process is None or process.poll() is not None:
                with self.log.open("ab") as log:
                    self._processes[role] = subprocess.Popen(
                        command, stdout=log, stderr=log, cwd=REPOSITORY, env=self._environment(role),
                        preexec_fn=partial(die_with_parent, os.getpid()),
                    )  # fmt: skip

    def find(self, role: str) -> list[psutil.Process]:
        """Return the processes that have a role now: redis, supervisor, api, inspector, worker or engine."""
        if role in ("redis", "supervisor"):
            return [psutil.Process(self._processes[role].pid)] if self._processes[role].poll() is None else []
        found = []
        for started in ("supervisor", "remote"):
            if started in self._processes and self._processes[started].poll() is None:
                tree = running(psutil.Process(self._processes[started].pid))
                found += [process for process, words in tree if self._role(started, words) == role]
        return found

    @staticmethod
    def _role(started: str, words: list[str]) -> str | None:
        if "serve" in words:
            return None
        if started == "remote" and "app.cli" in words:
            return "worker"
        return next((role for role, module in SERVED.items() if module in words), None)

    def everything(self) -> list[psutil.Process]:
        """Return all processes of the fleet, also those that nobody knows of any more."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def orphans(self) -> list[psutil.Process]:
        """Return the processes of the fleet that are below none of those that it started."""
        known = set()
        for process in self._processes.values():
            if process.poll() is None:
                known |= {found.pid for found, _ in running(psutil.Process(process.pid))}
        return [process for process in self.everything() if process.pid not in known]

    def redis(self) -> "Redis":
        return Redis.from_url(self._server.url, decode_responses=True)

    def _end(self) -> None:
        for role in ("remote", "supervisor", "redis"):
            process = self._processes.get(role)
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
        _kill(self.everything())


# --- faults -------------------------------------------------------------------------------------------

Fault = Callable[[Fleet, float], list[int]]
"""Does something to a fleet, for so many seconds where it lasts, and returns the ids of processes that it killed."""


def killed(role: str, which: Callable[[list[psutil.Process]], psutil.Process]) -> Fault:
    def kill(fleet: Fleet, hold_s: float) -> list[int]:
        found = fleet.find(role)
        return _kill([which(found)] if found else [])

    return kill


def all_killed(fleet: Fleet, hold_s: float) -> list[int]:
    return _kill(fleet.everything())


def _kill(processes: list[psutil.Process]) -> list[int]:
    ended = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            ended.append(process.pid)
    psutil.wait_procs(processes, timeout=10)
    return ended


def suspended(role: str, which: Callable[[list[psutil.Process]], psutil.Process]) -> Fault:
    """A process stands still, which is no end of it: others have to notice, or to wait."""

    def suspend(fleet: Fleet, hold_s: float) -> list[int]:
        found = fleet.find(role)
        if found:
            victim = which(found)
            with suppress(psutil.NoSuchProcess):
                victim.suspend()
                time.sleep(hold_s)
                victim.resume()
        return []

    return suspend


def disconnected(fleet: Fleet, hold_s: float) -> list[int]:
    """The worker behind the wire reaches nobody."""
    assert fleet.link is not None, "this fault is for fleets with a link"
    fleet.link.cut()
    time.sleep(hold_s)
    fleet.link.join()
    return []


def configured(begin: tuple[str, ...], end: tuple[str, ...]) -> Fault:
    """Redis refuses writes until it is told otherwise."""

    def configure(fleet: Fleet, hold_s: float) -> list[int]:
        _tell(fleet, begin)
        time.sleep(hold_s)
        _tell(fleet, end)
        return []

    return configure


def _tell(fleet: Fleet, command: tuple[str, ...]) -> None:
    while True:
        with suppress(RedisError), fleet.redis() as redis:
            redis.execute_command(*command)
            return
        fleet.keep_running()
        time.sleep(0.1)


def full(fleet: Fleet, hold_s: float) -> list[int]:
    """The file system of the data folder has no byte left. It has to be a small one."""
    filler = fleet.data_dir / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    time.sleep(hold_s)
    filler.unlink()
    return []
