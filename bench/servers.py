"""The service and its Redis as processes of a bench."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from redis import Redis
from redis.exceptions import RedisError

from app.contracts.api_keys import NewKey, Scope
from app.embedded_redis import EmbeddedRedis
from app.storage.api_keys import ApiKeys

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "bench"


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The embedded Redis. Its append-only file is off until `kept` turns it on: it would make filling take minutes."""
    server = EmbeddedRedis(folder)
    process = subprocess.Popen([*server.command, "--appendonly", "no"], stdout=subprocess.DEVNULL)
    try:
        with Redis.from_url(server.url) as client:
            while True:
                try:
                    client.ping()
                    break
                except RedisError:
                    time.sleep(0.05)
        yield server.url
    finally:
        process.terminate()
        process.wait()
        server.clean()


def kept(redis: Redis) -> None:
    """Have each write on disk before its answer, as the service has it."""
    redis.config_set("appendonly", "yes")
    while redis.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(0.05)


@dataclass
class Api:
    """A running API: its process, its port, and a key for it."""

    process: psutil.Process
    port: int
    key: str

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, headers={"Authorization": f"Bearer {self.key}"}
        )

    def cpu_s(self) -> float:
        """Processor time that it has used, without that of the processes that inspect requests."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: str, key: str, ready: str, **settings: str) -> Iterator[Api]:
    """Start `maskmerge COMMAND` with these settings, and wait until a path answers 200."""
    port = free_port()
    variables = {f"MASKMERGE_{name.upper()}": value for name, value in {**settings, "port": str(port)}.items()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASKMERGE_LOG_LEVEL": "WARNING", **variables}
    process = subprocess.Popen([sys.executable, "-m", "app.cli", command], env=environment)
    try:
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"maskmerge {command} does not start; its messages are above")
            time.sleep(0.05)
        yield Api(psutil.Process(process.pid), port, key)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def api(redis_url: str, folder: Path, **settings: str) -> Iterator[Api]:
    """The API alone, as a process, with a key."""
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        key = ApiKeys(redis, PREFIX).create(NewKey(scopes=[Scope.WRITE])).key
    with started("api", key, "/healthz", redis_url=redis_url, data_dir=str(folder), queue=PREFIX, **settings) as found:
        yield found
