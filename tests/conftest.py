"""Real parts for the tests: a Redis server, tiny checkpoints, trained experts, the whole service as processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import pytest
from redis import Redis

from app.client import Client, Progress
from app.embedded_redis import EmbeddedRedis
from tests.tiny import tiny_base, tiny_checkpoint, write_rows
from worker.engine.catalog.contracts.report import MergeResult, Timings

REPOSITORY = Path(__file__).parent.parent
BASE_URL = "http://localhost"  # of clients that call the app without a socket; it refuses other hosts
HERE = ("127.0.0.1", 50000)  # address of such clients: without keys, this machine alone is answered
HANGS_S = 300.0  # what no machine takes, however slow and busy, to do what a test waits for
RESULT = MergeResult(
    models=[],
    metrics=None,
    mean_retention=None,
    min_retention=None,
    method={},
    timings=Timings(),
    peak_memory_bytes=1,
    device="cpu",
    notes=[],
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first, since the others run beside it; then as the folders say, unit tests last."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server of the tests' own. It waits for no disk; what survives a kill is tested on other servers."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    process = subprocess.Popen([*server.command, "--appendonly", "no"], stdout=subprocess.DEVNULL)
    with Redis.from_url(server.url) as client:
        wait_until(lambda: _answers(client), "Redis to answer")
    yield server.url
    process.terminate()
    process.wait()
    server.clean()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """An empty database."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        yield client


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except Exception:
        return False


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = HANGS_S, interval_s: float = 0.05) -> Any:
    """The condition's first true value; fails the test when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s} s for {what}")
        time.sleep(interval_s)


def keeps_within(promise_s: float, attempt: Callable[[], float]) -> None:
    """Asserts that what the attempt did took it no longer than promised, as it says in seconds: at the third time at
    the latest, since the machine may be busy with something else."""
    taken: list[float] = []
    while not taken or (taken[-1] > promise_s and len(taken) < 3):
        taken.append(attempt())
    assert taken[-1] <= promise_s, f"took {taken} s"


@dataclass
class Service:
    """`maskmerge serve` as a process, and a client of it."""

    data_dir: Path
    inputs: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    key: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, timeout=HANGS_S, headers=headers)

    @property
    def log(self) -> str:
        return (self.data_dir.parent / "serve.log").read_text()

    def start(self, workers: int = 1) -> None:
        command = [sys.executable, "-m", "app.cli", "serve", "--data-dir", str(self.data_dir)]
        command += ["--port", str(self.port), "--local-root", str(self.inputs), "--workers", str(workers)]
        with (self.data_dir.parent / "serve.log").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=REPOSITORY)
        self.wait_ready()

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process is None or self.process.poll() is None, self.log
            return self.get_or_none("/readyz") is not None

        wait_until(is_ready, "the service to be ready")

    def stop(self) -> int:
        """Ctrl-C, as a person would; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(HANGS_S)

    def get_or_none(self, path: str) -> httpx.Response | None:
        """The answer if it is 200."""
        try:
            with self.http as http:
                response = http.get(path)
        except httpx.TransportError:
            return None
        return response if response.status_code == 200 else None

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.http as http:
            return http.get(path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        with self.http as http:
            return http.post(path, **options)

    def submit(self, recipe: dict[str, Any]) -> str:
        response = self.post("/merge", json=recipe)
        assert response.status_code == 202, response.text
        job_id: str = response.json()["id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
        return job

    def finished(self, job_id: str) -> dict[str, Any]:
        """The job once it is final, however often the service goes away meanwhile."""

        def final() -> dict[str, Any] | None:
            response = self.get_or_none(f"/jobs/{job_id}")
            job = response.json() if response else None
            return job if job and job["finished_at"] else None

        job: dict[str, Any] = wait_until(final, f"job {job_id} to end")
        assert_tells_no_paths(json.dumps(job))
        return job

    def submit_held(self, recipe: dict[str, Any]) -> tuple[str, psutil.Process]:
        """A job that the only worker has in hand, and its engine, which was suspended before. To be resumed or
        killed."""
        engine: psutil.Process = wait_until(lambda: self.processes().get("engine"), "the engine")
        engine.suspend()
        job_id = self.submit(recipe)
        wait_until(lambda: self.job(job_id)["status"] == "running", "the job to run")
        return job_id, engine

    def stand_still(self, job_id: str, phase: str) -> psutil.Process:
        """The engine of the only worker, suspended as soon as the job is seen in the phase, which has to last long
        enough for that. To be resumed or killed."""
        with Client(self.url, api_key=self.key or None, timeout_s=HANGS_S) as client:
            for event in client.events(job_id):
                if isinstance(event.data, Progress) and event.data.phase == phase:
                    engine = self.processes()["engine"]
                    engine.suspend()
                    return engine
        pytest.fail(f"job {job_id} was not seen {phase}")

    def processes(self) -> dict[str, psutil.Process]:
        """What runs now, by role: supervisor, redis, api, inspector, worker, engine, renderer."""
        assert self.process is not None
        found: dict[str, psutil.Process] = {}
        for process, words in running(psutil.Process(self.process.pid)):
            for role, mark in ROLES.items():
                if any(mark in word for word in words):
                    found.setdefault(role, process)  # a copy of the inspector comes after it
                    break
        return found


def running(parent: psutil.Process) -> list[tuple[psutil.Process, list[str]]]:
    """The process and those under it, each with the words of its command; without those that end meanwhile."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # of which a zombie is one
                found.append((process, process.cmdline()))
    return found


ROLES = {
    "engine": "worker.engine_process",
    "inspector": "app.services.inspector",
    "renderer": "worker.engine.runtime.rendering",
    "redis": "-server",  # of Redis or Valkey
    "supervisor": "serve",
    "api": "app.cli",
    "worker": "worker",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoints/{a,b,c,grade}` of one ancestor with 2, 3, 2 labels and one number, and `rows/….jsonl` for them;
    the ancestor is `checkpoints/base`."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_base(root / "checkpoints" / "base")
    for seed, (name, labels) in enumerate({"a": 2, "b": 3, "c": 2, "grade": 1}.items()):
        tiny_checkpoint(root / "checkpoints" / name, labels=labels, seed=seed)
        write_rows(root / "rows" / f"{name}.jsonl", count=200, labels=labels, seed=seed)
    return root


def make_service(root: Path, inputs: Path, **environment: str) -> Service:
    (root / "data").mkdir()
    return Service(root / "data", inputs, free_port(), environment)


@pytest.fixture
def new_service(tmp_path: Path, tiny_inputs: Path) -> Iterator[Callable[..., Service]]:
    """Makes services, not yet started, with further variables; those that a failed test leaves running are stopped."""
    made: list[Service] = []

    def make(**environment: str) -> Service:
        made.append(make_service(tmp_path, tiny_inputs, **environment))
        return made[-1]

    yield make
    for service in made:
        if service.process is not None and service.process.poll() is None:
            service.stop()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    """One running service for the tests that leave it as they found it."""
    service = make_service(tmp_path_factory.mktemp("service"), tiny_inputs, MASKMERGE_PREDICT_SECONDS=str(HANGS_S))
    service.start()
    yield service
    before = service.processes()
    assert service.stop() == 0
    assert not [process for process in before.values() if process.is_running()], "a process was left behind"


def tiny_recipe(*names: str, **method: Any) -> dict[str, Any]:
    """A merge of tiny checkpoints with data sets and evaluations."""
    return {
        "method": {"name": "mask_fisher", "examples": 64, **method} if "name" not in method else method,
        "models": [
            {
                "name": name,
                "checkpoint": f"local:checkpoints/{name}",
                "dataset": {"source": f"local:rows/{name}.jsonl", "label": "label"},
                "evaluation": {"source": f"local:rows/{name}.jsonl", "limit": 50},
            }
            for name in names or ("a", "b")
        ],
    }


SEEDS = count()


def measured_anew(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its rows in an order that no other has, so that it finds nobody's statistics."""
    for model in recipe["models"]:
        model["dataset"]["seed"] = next(SEEDS)
    return recipe


class Answer(Protocol):
    """A response, of whichever client."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def text(self) -> str: ...
    def json(self) -> Any: ...


def assert_problem(response: Answer, status: int, code: str) -> None:
    """Every refusal has one shape (RFC 9457)."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "code", "detail", "instance", "errors", "request_id"}
    assert (body["status"], body["code"]) == (status, code)
    assert body["detail"]
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert_tells_no_paths(response.text)


def assert_tells_no_paths(text: str) -> None:
    """Inputs and data folders of the tests are temporary ones; libraries lie below the interpreter's folder."""
    for folder in (tempfile.gettempdir(), sys.prefix, "site-packages", str(REPOSITORY)):
        assert folder not in text, text
