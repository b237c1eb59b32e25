"""The service against its own OpenAPI document: schemathesis looks for answers that the document does not have.

All of its checks run but `positive_data_acceptance`: a recipe that fits the schema may well be refused.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.contracts.errors import Problem
from tests.conftest import HANGS_S, REPOSITORY, Service, make_service, tiny_recipe
from tests.receivers import receiving

TAKE_RECIPES = "^/merge|^/scores$"
SENDS = "^/webhooks/test"  # it would send to addresses that it makes up
REVOKE = "^/keys/"  # it would find the id of the key that it has


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    """A service with a key, which it makes itself: without any, callers of this machine need none."""
    service = make_service(tmp_path_factory.mktemp("service"), tiny_inputs, MASKMERGE_WEBHOOK_ALLOW_PRIVATE="true")
    command = [sys.executable, "-m", "app.cli", "keys", "create", "--scope", "admin"]
    command += ["--data-dir", str(service.data_dir)]
    service.key = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=True).stdout.strip()
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def job(service: Service) -> Iterator[dict[str, Any]]:
    """A merge that succeeded, and told a receiver so."""
    assert service.post("/webhooks/secret", json={}).status_code == 201
    with receiving() as receiver:
        job = service.finished(service.submit({**tiny_recipe("a", "b"), "webhook": {"url": receiver.url}}))
        assert job["status"] == "succeeded"
        yield job


def find_faults(
    service: Service, folder: Path, *options: str, hooks: dict[str, Any] | None = None, **values: str
) -> str:
    """What schemathesis reports. The test fails when it finds anything.

    Args:
        hooks: what it posts as a merge; what it makes up when None.
        values: what it takes for parameters of paths; of others, and those left out, it makes its own.
    """
    config = folder / "schemathesis.toml"
    given = [f'"path.{name}" = {json.dumps(value)}' for name, value in values.items()]
    header = f'headers = {{ Authorization = "Bearer {service.key}" }}'
    config.write_text("\n".join([header, "[parameters]", *given, ""]))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{service.url}/openapi.json", "--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    command += ["--continue-on-failure", "--no-color", "--request-timeout", str(HANGS_S), *options]
    environment = dict(os.environ)
    if hooks is not None:
        environment |= {"SCHEMATHESIS_HOOKS": "tests.recipes_for_schemathesis", "PYTHONPATH": str(REPOSITORY)}
        environment |= {"MASKMERGE_TEST_RECIPE": json.dumps(hooks)}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2 * HANGS_S, check=False
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
    assert service.get("/jobs").status_code == 200, "its key was not valid all the time"
    return result.stdout


@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("coverage,fuzzing", marks=pytest.mark.long)])
def test_what_there_is_answers_as_the_document_says(
    service: Service, job: dict[str, Any], tmp_path: Path, phases: str
) -> None:
    digest = service.get("/scores").json()["data"][0]["digest"]
    key = service.post("/keys", json={}).json()["id"]
    sha256 = hashlib.sha256(b"{}").hexdigest()
    with service.http as http:
        assert http.put(f"/uploads/{sha256}", params={"name": "rows.jsonl"}, content=b"{}").is_success
    report = find_faults(
        service, tmp_path, "--exclude-path-regex", f"{TAKE_RECIPES}|{SENDS}|/redeliver$", "--exclude-method", "DELETE",
        "--phases", phases, "-n", "4",
        job_id=job["id"], digest=digest, key_id=key, name="models/a/config.json",
        sha256=sha256, n="1",
    )  # fmt: skip
    assert "Missing test data" not in report, "what is there was not found"
    assert service.job(job["id"])["status"] == "succeeded"


@pytest.mark.long
def test_what_there_is_not_answers_as_the_document_says(service: Service, tmp_path: Path) -> None:
    find_faults(
        service, tmp_path, "--exclude-path-regex", f"{TAKE_RECIPES}|{SENDS}|{REVOKE}", "--phases", "fuzzing", "-n", "3"
    )


def test_recipes_are_answered_as_the_document_says(service: Service, job: dict[str, Any], tmp_path: Path) -> None:
    """Their schemas have thousands of edges, which the phase `coverage` tries all; it runs before releases."""
    find_faults(service, tmp_path, "--include-path-regex", TAKE_RECIPES, "--phases", "examples,fuzzing", "-n", "5")


def test_operations_follow_each_other_as_the_document_says(
    service: Service, job: dict[str, Any], tmp_path: Path
) -> None:
    """A tenant's jobs are made, watched, cancelled, tried again and deleted in every order, and nobody else's."""
    admin = service.key
    made = service.post("/keys", json={"tenant": "others", "scopes": ["write"]}).json()
    service.key = made["key"]
    try:
        report = find_faults(
            service, tmp_path, "--phases", "stateful", "--mode", "positive", "-n", "6",
            "--exclude-path-regex", f"^/scores$|{SENDS}", hooks=tiny_recipe("a", "b", name="average"),
        )  # fmt: skip
        jobs = service.get("/jobs", params={"limit": 100}).json()["data"]
    finally:
        service.key = admin
    assert "Stateful" in report
    assert service.job(job["id"])["status"] == "succeeded", "another tenant's job was changed"
    assert job["id"] not in {other["id"] for other in jobs}


def test_keys_are_made_and_revoked_as_the_document_says(service: Service, tmp_path: Path) -> None:
    find_faults(
        service, tmp_path, "--phases", "stateful", "-n", "10", "--include-path-regex", "^/keys",
        "--exclude-operation-id", "list_keys",  # from which it would go on to revoke its own
    )  # fmt: skip
    keys = service.get("/keys").json()["data"]
    assert [key for key in keys if key["revoked_at"] is not None], "no link led from a new key to its revocation"


def test_every_answer_has_its_media_type_and_every_problem_its_code(service: Service) -> None:
    document = service.get("/openapi.json").json()
    codes = document["components"]["schemas"]["ProblemBody"]["properties"]["code"]["enum"]
    assert set(codes) == {problem.code for problem in Problem}
    told = document["components"]["responses"]
    assert {status for problem in Problem for status in [f"Problem{problem.status}"]} == set(told)
    for response in told.values():
        assert set(response["content"]) == {"application/problem+json"}
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert response == {"$ref": f"#/components/responses/Problem{status}"}, (path, method, status)
            else:
                assert response.get("content") or status in ("204", "304"), (path, method, status)
        for parameter in operation.get("parameters", ()):
            assert "null" not in json.dumps(parameter["schema"]), (path, parameter["name"])


def test_everything_is_described_and_every_body_and_answer_has_an_example(service: Service) -> None:
    document = service.get("/openapi.json").json()
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            assert described.get("description"), f"{name}.{field}"
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for path, method, operation in operations(document):
        assert operation["description"], (path, method)
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], (path, method, parameter["name"])
        for kind, body in operation.get("requestBody", {}).get("content", {}).items():
            assert body.get("examples") or body.get("example"), (path, method, kind)
        for status, answer in operation["responses"].items():
            content = answer.get("content", {})
            assert "application/json" not in content or content["application/json"]["example"], (path, method, status)


def test_links_lead_from_a_job_to_all_that_can_be_done_with_it(service: Service) -> None:
    document = service.get("/openapi.json").json()
    known = {operation["operationId"]: operation for _, _, operation in operations(document)}
    of_a_job = {
        "get_job",
        "cancel_job",
        "retry_job",
        "delete_job",
        "events",
        "list_files",
        "report",
        "archive",
        "list_deliveries",
    }
    for name, status in (("merge", "202"), ("put_merge", "200"), ("score", "202"), ("list_jobs", "200")):
        assert set(known[name]["responses"][status]["links"]) >= of_a_job
    assert set(known["create_key"]["responses"]["201"]["links"]) == {"revoke_key"}
    assert set(known["list_files"]["responses"]["200"]["links"]) == {"get_file"}
    assert set(known["list_deliveries"]["responses"]["200"]["links"]) == {"redeliver"}
    for operation in known.values():
        for response in operation["responses"].values():
            for link in response.get("links", {}).values():
                taken = {p["name"] for p in known[link["operationId"]]["parameters"] if p["in"] == "path"}
                assert set(link["parameters"]) == taken


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields path, method and operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation
