"""`maskmerge serve` runs Redis, API and workers as children of one process, which restarts them and stops them all."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from app.contracts.lifetime import die_with_parent
from app.contracts.settings import Settings
from app.embedded_redis import EmbeddedRedis, wait_for
from app.storage.api_keys import ApiKeys
from app.storage.artifacts import open_artifacts
from app.storage.connection import connect_for_answers
from app.storage.data_folder import lock
from app.storage.keys import Keys
from app.storage.versions import upgrade_folder, upgrade_redis
from app.tls import Certificate

TICK_S = 0.1
ASK_S = 0.5  # whether the API is ready: each question is a line in its log
STOP_S = 15  # time that a child has before it is killed
LONGEST_BACKOFF_S = 10.0
STEADY_S = 30.0  # a child that ran for so long starts again at once

logger = logging.getLogger("maskmerge")


@dataclass
class Child:
    """A process that should run, and how often it has failed to."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    start_at: float = field(default=0.0)


class Supervisor:
    """Starts Redis (unless `settings.redis_url` names one), API and workers, and keeps them running.

    It has one thread, so that children may be started with a hook that ties their life to this process.

    Args:
        is_quiet: whether what Redis prints is dropped.
    """

    def __init__(self, settings: Settings, *, is_quiet: bool = False) -> None:
        self._settings = settings
        self._is_quiet = is_quiet
        self._stopping = False
        self._lock = -1
        self._redis: EmbeddedRedis | None = None
        self._children: list[Child] = []
        self._variables: dict[str, str] = {}

    def run(self) -> int:
        """Run until SIGTERM or Ctrl-C.

        Raises:
            DataDirInUse, NoRedisServer, NewerData, ValueError, OSError: it cannot start.
        """
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        signal.signal(signal.SIGINT, self._ask_to_stop)
        _check_free(self._settings.host, self._settings.port)
        Certificate.of(self._settings)  # raises what would keep the API from starting
        with self.started(Child("api", [sys.executable, "-m", "app.cli", "api"])) as url:
            with connect_for_answers(url) as redis:
                ApiKeys(redis, self._settings.prefix).require(self._settings)
            ask_at: float | None = time.monotonic()
            while not self._stopping:
                self.keep_running()
                if ask_at is not None and time.monotonic() >= ask_at:
                    ask_at = None if self._announce() else time.monotonic() + ASK_S
                time.sleep(TICK_S)
        return 0

    @contextmanager
    def started(self, *others: Child) -> Iterator[str]:
        """Yield the URL of Redis, which runs; workers and others run once `keep_running` is called, again and again.

        All of them are stopped at the end. Raises as `run` does.
        """
        data_dir = self._settings.data_dir.resolve()
        # If there is none, no child can start.
        open_artifacts(self._settings.artifact_store, data_dir, self._settings.object_storage)
        data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock(data_dir, lambda: self._stopping)
        try:
            upgrade_folder(data_dir)
            url = self._start_redis(data_dir)
            with connect_for_answers(url) as redis:
                upgrade_redis(redis, Keys(self._settings.prefix))
            self._variables = self._environment(url, data_dir)
            self._children.extend(others)
            for number in range(1, self._settings.workers + 1):
                self._children.append(Child(f"worker {number}", [sys.executable, "-m", "worker"]))
            yield url
        finally:
            self._stop()

    @property
    def failures(self) -> int:
        """How often a child that should run has ended, one time soon after the other."""
        return max(child.failures for child in self._children)

    def _start_redis(self, data_dir: Path) -> str:
        if self._settings.redis_url is not None:
            return self._settings.redis_url.get_secret_value()
        self._redis = EmbeddedRedis(data_dir)
        child = Child("redis", self._redis.command)
        self._children.append(child)
        self._spawn(child, dict(os.environ))
        wait_for(self._redis, child.process, lambda: self._stopping)
        return self._redis.url

    def _environment(self, redis_url: str, data_dir: Path) -> dict[str, str]:
        """Return the settings as the children read them; secrets travel here and not in argv."""
        environment = dict(os.environ)
        for name in type(self._settings).model_fields:
            value = getattr(self._settings, name)
            if name == "redis_url":
                value = redis_url
            elif name == "data_dir":
                value = data_dir
            elif name == "local_roots":
                value = ":".join(str(root.resolve()) for root in value)
            elif isinstance(value, tuple | dict):
                value = self._settings.text(name)
            if value is not None:
                environment[f"MASKMERGE_{name.upper()}"] = str(value)
        return environment

    def keep_running(self) -> None:
        """Start the children that do not run, after a pause that grows while they fail."""
        now = time.monotonic()
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                steady = now - child.started > STEADY_S
                child.failures = 0 if steady else child.failures + 1
                wait = min(LONGEST_BACKOFF_S, 0.1 * 2**child.failures)
                logger.warning("%s ended with %s; again in %.1f s", child.name, child.process.returncode, wait)
                child.process = None
                child.start_at = now + wait
            if child.process is None and now >= child.start_at:
                self._spawn(child, self._variables)

    def _spawn(self, child: Child, environment: dict[str, str]) -> None:
        parent = os.getpid()
        child.started = time.monotonic()
        child.process = subprocess.Popen(
            child.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if self._is_quiet and child.name == "redis" else None,
            # Ctrl-C in a terminal is for the supervisor, which stops the others in order.
            start_new_session=True,
            # Children hold the lock too: a successor waits until all of them are gone, and never runs beside them.
            pass_fds=[self._lock],
            preexec_fn=lambda: die_with_parent(parent),
        )

    def _announce(self) -> bool:
        base = self._settings.url
        try:
            # The certificate is for the names that clients use, and this is the service asking itself over loopback.
            if httpx.get(f"{base}/readyz", timeout=1, verify=False).status_code != 200:  # noqa: S501
                return False
        except httpx.HTTPError:
            return False
        logger.info("ready on %s, documentation on %s/docs", base, base)
        return True

    def _ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _stop(self) -> None:
        """Stop API and workers first, and Redis when nobody needs it any more."""
        redis = [child for child in self._children if child.name == "redis"]
        for group in ([child for child in self._children if child.name != "redis"], redis):
            running = [child.process for child in group if child.process is not None]
            for process in running:
                process.terminate()
            deadline = time.monotonic() + STOP_S
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if self._redis is not None:
            self._redis.clean()
        if self._lock >= 0:
            os.close(self._lock)


def _check_free(host: str, port: int) -> None:
    """Raise OSError when the API could not listen there; otherwise every restart of the API would say so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
            ) from error
