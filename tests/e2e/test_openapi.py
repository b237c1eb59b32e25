"""The service against its own OpenAPI document: schemathesis looks for answers that the document does not have.

All of its checks run but `positive_data_acceptance`: a recipe that fits the schema may well be refused.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.contracts.errors import Problem
from tests.conftest import HANGS_S, REPOSITORY, Service, make_service, tiny_recipe

TAKE_RECIPES = "^/merge|^/scores$"
REVOKE = "^/keys/"  # it would find the id of the key that it has


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    """A service with a key, which it makes itself: without any, callers of this machine need none."""
    service = make_service(tmp_path_factory.mktemp("service"), tiny_inputs)
    command = [sys.executable, "-m", "app.cli", "keys", "create", "--scope", "admin"]
    command += ["--data-dir", str(service.data_dir)]
    service.key = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=True).stdout.strip()
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    """A merge that succeeded."""
    job = service.finished(service.submit(tiny_recipe("a", "b")))
    assert job["status"] == "succeeded"
    return job


def find_faults(service: Service, folder: Path, *options: str, **values: str) -> str:
    """What schemathesis reports. The test fails when it finds anything.

    Args:
        values: what it takes for parameters of paths; of others, and those left out, it makes its own.
    """
    config = folder / "schemathesis.toml"
    given = [f'"path.{name}" = {json.dumps(value)}' for name, value in values.items()]
    header = f'headers = {{ Authorization = "Bearer {service.key}" }}'
    config.write_text("\n".join([header, "[parameters]", *given, ""]))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{service.url}/openapi.json", "--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    command += ["--continue-on-failure", "--no-color", "--request-timeout", str(HANGS_S), *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=2 * HANGS_S, check=False)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
    assert service.get("/jobs").status_code == 200, "its key was not valid all the time"
    return result.stdout


def test_what_there_is_answers_as_the_document_says(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    digest = service.get("/scores").json()["data"][0]["digest"]
    key = service.post("/keys", json={}).json()["id"]
    report = find_faults(
        service, tmp_path, "--exclude-path-regex", TAKE_RECIPES, "--exclude-method", "DELETE",
        "--phases", "coverage,fuzzing", "-n", "10",
        job_id=job["id"], digest=digest, key_id=key, name="models/a/config.json",
    )  # fmt: skip
    assert "Missing test data" not in report, "what is there was not found"
    assert service.job(job["id"])["status"] == "succeeded"


def test_what_there_is_not_answers_as_the_document_says(service: Service, tmp_path: Path) -> None:
    find_faults(service, tmp_path, "--exclude-path-regex", f"{TAKE_RECIPES}|{REVOKE}", "--phases", "fuzzing", "-n", "3")


def test_recipes_are_answered_as_the_document_says(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    """Their schemas have thousands of edges, which the phase `coverage` tries all; it runs before releases."""
    find_faults(service, tmp_path, "--include-path-regex", TAKE_RECIPES, "--phases", "examples,fuzzing", "-n", "10")


def test_every_answer_has_its_media_type_and_every_problem_its_code(service: Service) -> None:
    document = service.get("/openapi.json").json()
    codes = document["components"]["schemas"]["ProblemBody"]["properties"]["code"]["enum"]
    assert set(codes) == {problem.code for problem in Problem}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                expected = {"4XX": {"application/problem+json"}, "5XX": {"application/problem+json"}}.get(status)
                found = set(response.get("content", ()))
                assert found == (expected or found), (path, method, status)
                assert found or status in ("204", "304"), (path, method, status)
            for parameter in operation.get("parameters", ()):
                assert "null" not in json.dumps(parameter["schema"]), (path, parameter["name"])
