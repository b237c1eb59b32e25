"""`maskmerge api` and `maskmerge worker` as parts of a deployment, and `maskmerge serve` where it cannot start."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from redis import Redis

from tests.conftest import HANGS_S, REPOSITORY, Service, free_port, tiny_recipe, wait_until

MASKMERGE = [sys.executable, "-m", "app.cli"]


def test_api_and_worker_run_as_parts_against_a_redis_of_their_own(
    redis: Redis, redis_url: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "MASKMERGE_REDIS_URL": redis_url,
        "MASKMERGE_DATA_DIR": str(tmp_path / "data"),
        "MASKMERGE_LOCAL_ROOTS": str(tiny_inputs),
    }
    api, worker = (
        subprocess.Popen([*MASKMERGE, *part], env=environment, cwd=REPOSITORY)
        for part in (["api", "--port", str(port)], ["worker"])
    )
    service = Service(tmp_path / "data", tiny_inputs, port)
    try:
        wait_until(lambda: service.get_or_none("/healthz"), "the API")
        service.wait_ready()
        assert service.finished(service.submit(tiny_recipe()))["status"] == "succeeded"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(HANGS_S) == 0
        response = service.get("/readyz")
        assert (response.status_code, response.json()["errors"][0]["field"]) == (503, "workers")
        waiting = service.submit(tiny_recipe("a", name="average"))
        assert service.job(waiting)["status"] == "queued"
    finally:
        for process in (api, worker):
            process.terminate()
            process.wait(HANGS_S)
    assert api.returncode in (0, -signal.SIGTERM)  # uvicorn shuts down and then ends as the signal asked


@pytest.mark.long
def test_serve_uses_the_redis_it_is_given(redis: Redis, redis_url: str, new_service: Callable[..., Service]) -> None:
    service = new_service(MASKMERGE_REDIS_URL=redis_url)
    service.start()
    assert "redis" not in service.processes()
    assert service.finished(service.submit(tiny_recipe("a", name="average")))["status"] == "succeeded"
    assert service.stop() == 0
    assert redis.exists("maskmerge:jobs")


def test_serve_says_at_once_that_its_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*MASKMERGE, "serve", "--data-dir", str(tmp_path), "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=HANGS_S, check=False)
    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_long_body_is_refused_before_it_is_sent(service: Service) -> None:
    """The announced length is enough: nothing of the 10 GB is waited for."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=HANGS_S) as connection:
        head = "POST /merge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Content-Length: 10000000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.long
def test_a_service_started_again_on_its_folder_still_has_its_jobs(new_service: Callable[..., Service]) -> None:
    service = new_service()
    service.start()
    job_id = service.submit(tiny_recipe("a", name="average"))
    before = service.finished(job_id)
    assert service.stop() == 0
    service.start()
    assert service.job(job_id) == before
    assert httpx.get(f"http://127.0.0.1:{service.port}/jobs/{job_id}/archive").status_code == 200
    assert service.stop() == 0
