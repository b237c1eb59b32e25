"""The command line, on servers that answer as they are told: exit statuses, JSON, what it loads and what it shows."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.cli.exits import Exit
from app.client import Status, steps
from tests.conftest import REPOSITORY, RESULT, tiny_recipe
from tests.servers import JOB_ID, STATUS, Answer, Server, job_body, refuses, sends

COMMANDS = {
    "run", "serve", "api", "worker", "settings", "submit", "wait", "status", "list", "logs", "cancel", "retry",
    "verify", "delete", "download", "methods", "scores", "keys",
}  # fmt: skip
ENDED: dict[str, tuple[dict[str, Any], Exit]] = {
    "succeeded": ({"status": "succeeded"}, Exit.OK),
    "failed": (
        {"status": "failed", "result": None, "error": {"code": "out_of_memory", "message": "8 GB are needed"}},
        Exit.FAILED,
    ),
    "cancelled": ({"status": "cancelled", "result": None}, Exit.CANCELLED),
    "not accepted": (
        {"status": "succeeded", "result": {**RESULT.model_dump(mode="json"), "accepted": False}},
        Exit.NOT_ACCEPTED,
    ),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.client.transport.BACKOFF_S", 0.01)
    monkeypatch.setattr(steps, "RECONNECT_S", 0.01)
    monkeypatch.delenv("MASKMERGE_API_KEY", raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny_recipe("a", "b")))
    return str(path)


def ends(changed: dict[str, Any]) -> list[Answer]:
    """The events of a job that ends, and the job."""
    told = f"id: 1\nevent: status\ndata: {STATUS % changed['status']}\n\n".encode()
    return [sends(200, told, "text/event-stream"), sends(204), sends(200, job_body(**changed))]


@pytest.mark.parametrize("name", ENDED)
@pytest.mark.parametrize("command", ["wait", "submit"])
def test_the_exit_status_says_how_a_job_ended(
    capsys: pytest.CaptureFixture[str], recipe: str, name: str, command: str
) -> None:
    changed, status = ENDED[name]
    arguments = ["wait", JOB_ID] if command == "wait" else ["submit", recipe, "--wait"]
    answers = ends(changed) if command == "wait" else [sends(202, job_body()), *ends(changed)]
    with Server(*answers) as server:
        assert main([*arguments, "--url", server.url]) == status
    printed = capsys.readouterr()
    assert changed["status"] in printed.out.splitlines()
    assert printed.err == ("maskmerge: out_of_memory: 8 GB are needed\n" if name == "failed" else "")
    with Server(*answers) as server:
        assert main([*arguments, "--url", server.url, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["status"] == changed["status"]


def test_what_a_service_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile, shown = "8 GB \x1b[2J\nare needed", "8 GB \\x1b[2J\\nare needed"
    changed, status = ENDED["failed"]
    failed = {**changed, "error": {**changed["error"], "message": hostile}}
    with Server(*ends(failed)) as server:
        assert main(["wait", JOB_ID, "--url", server.url]) == status
    assert capsys.readouterr().err == f"maskmerge: out_of_memory: {shown}\n"
    with Server(sends(200, job_body(**failed))) as server:
        assert main(["status", JOB_ID, "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"out_of_memory: {shown}"
    with Server(refuses(409, "conflict", hostile)) as server:
        assert main(["cancel", JOB_ID, "--url", server.url]) == 1
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["status", JOB_ID], job_body()),
        (["cancel", JOB_ID], job_body()),
        (["retry", JOB_ID], job_body()),
        (["list"], {"data": [{**job_body(), "request": None}], "next": None}),
    ],
    ids=["status", "cancel", "retry", "list"],
)
def test_json_is_what_the_service_answers(
    capsys: pytest.CaptureFixture[str], arguments: list[str], answer: dict[str, Any]
) -> None:
    with Server(sends(200, answer)) as server:
        assert main([*arguments, "--url", server.url, "--json"]) == Exit.OK
        [line] = capsys.readouterr().out.splitlines()
        assert json.loads(line)["id"] == JOB_ID
        assert main([*arguments, "--url", server.url]) == Exit.OK
    assert JOB_ID in capsys.readouterr().out


def test_a_list_stops_at_its_limit_over_pages(capsys: pytest.CaptureFixture[str]) -> None:
    page = {"data": [job_body(id=f"{number:028x}") for number in range(2)], "next": "1" * 28}
    with Server(sends(200, page)) as server:
        options = ["--limit", "3", "--status", "failed", "--label", "team=a:b", "--json"]
        assert main(["list", "--url", server.url, *options]) == Exit.OK
        assert len(server.asked) == 2
        assert server.asked[0][1] == "/jobs?limit=3&status=failed&label=team%3Aa%3Ab"
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_refusal_is_told_with_the_name_of_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(refuses(409, "conflict", "it has succeeded already", X_Request_ID="r1")) as server:
        assert main(["cancel", JOB_ID, "--url", server.url]) == Exit.ERROR
    assert capsys.readouterr().err == "maskmerge: it has succeeded already (request r1)\n"


def test_a_command_without_a_key_says_where_keys_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(refuses(401, "unauthenticated", "the request has no API key")) as server:
        assert main(["list", "--url", server.url]) == Exit.ERROR
    assert "MASKMERGE_API_KEY" in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == Exit.OK
    assert capsys.readouterr().out == f"maskmerge {version('maskmerge')}\n"


def test_where_nothing_answers_the_exit_status_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(sends(200, b"<html>", "text/html")) as server:
        assert main(["status", JOB_ID, "--url", server.url]) == Exit.UNREACHABLE
    assert "is no maskmerge service" in capsys.readouterr().err
    assert main(["status", JOB_ID, "--url", server.url]) == Exit.UNREACHABLE
    assert "`maskmerge serve` starts a service" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sbmit"], "Did you mean 'submit'?"),
        (["status"], "Missing argument"),
        (["status", JOB_ID, "--api-key", "mm_x"], "No such option"),
        (["list", "--label", "x"], "write KEY=VALUE"),
        (["list", "--status", "done"], "write queued, running"),
        (["submit", "nothing.json"], "does not exist"),
        (["keys", "create", "--scope", "all"], "must be 'read', 'write'"),
    ],
)
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(arguments) == Exit.USAGE
    assert says in capsys.readouterr().err


def test_a_recipe_that_says_a_thing_twice_is_refused_where_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("r.json", '{"base": 1, "base": 2}'), ("r.yaml", "base: 1\nbase: 2\n")):
        (tmp_path / name).write_text(text)
        assert main(["submit", str(tmp_path / name), "--url", "http://127.0.0.1:1"]) == Exit.ERROR
        assert name in capsys.readouterr().err


def test_keys_can_be_asked_of_a_service(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = {
        "id": "0" * 16, "prefix": "mm_0", "name": "ci", "tenant": "search", "scopes": ["write"],
        "created_at": "2030-01-01T00:00:00Z", "expires_at": None, "last_used_at": None, "revoked_at": None,
    }  # fmt: skip
    monkeypatch.setenv("MASKMERGE_API_KEY", "mm_admin")
    with Server(sends(201, {**key, "key": "mm_0_secret"}), sends(200, {"data": [key]}), sends(204)) as server:
        assert main(["keys", "create", "--name", "ci", "--url", server.url]) == Exit.OK
        assert capsys.readouterr().out == "mm_0_secret\n"
        assert main(["keys", "list", "--url", server.url]) == Exit.OK
        assert "never" in capsys.readouterr().out
        assert main(["keys", "revoke", "mm_" + "0" * 16, "--url", server.url, "--json"]) == Exit.OK
        assert json.loads(capsys.readouterr().out) == {"id": "0" * 16, "revoked": True}
    assert [(method, path) for method, path, _, _ in server.asked] == [
        ("POST", "/keys"), ("GET", "/keys"), ("DELETE", f"/keys/{'0' * 16}"),
    ]  # fmt: skip
    assert {headers["authorization"] for _, _, headers, _ in server.asked} == {"Bearer mm_admin"}


def test_the_key_is_in_no_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMERGE_API_KEY", "mm_secret")
    for answer in (refuses(401, "unauthenticated", "the key is unknown"), sends(200, b"<html>", "text/html")):
        with Server(answer) as server:
            assert main(["status", JOB_ID, "--url", server.url]) != Exit.OK
    assert main(["status", JOB_ID, "--url", server.url]) == Exit.UNREACHABLE
    printed = capsys.readouterr()
    assert "mm_secret" not in printed.out + printed.err


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)


def test_help_loads_nothing_that_takes_long_and_names_every_command() -> None:
    code = "import sys; from app.cli import main; main(['--help']); print(*sys.modules)"
    *help_lines, modules = python(code).stdout.splitlines()
    assert not {"torch", "pydantic", "httpx", "rich", "redis", "fastapi"} & set(modules.split())
    listed = help_lines[help_lines.index("Commands:") + 1 :]
    assert {line.split()[0] for line in listed if line.strip()} == COMMANDS


def test_commands_about_jobs_load_neither_torch_nor_the_api() -> None:
    with Server(sends(200, job_body())) as server:
        code = (
            f"import sys; from app.cli import main; main(['status', 'x', '--url', '{server.url}']); print(*sys.modules)"
        )
        modules = set(python(code).stdout.splitlines()[-1].split())
    assert not {"torch", "transformers", "numpy", "fastapi", "redis", "rq", "huggingface_hub"} & modules


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(shell: str) -> None:
    script = python("from app.cli import main; main([])", _MASKMERGE_COMPLETE=f"source_{shell}")
    assert script.returncode == 0, script.stderr
    assert "_MASKMERGE_COMPLETE=complete_" in script.stdout


def test_completion_knows_commands_and_states() -> None:
    def completed(line: str) -> set[str]:
        count = str(len(line.split(" ")) - 1)
        asked = {"_MASKMERGE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": count}
        return set(python("from app.cli import main; main([])", **asked).stdout.split())

    assert completed("maskmerge re") == {"retry"}
    assert completed("maskmerge list --status ") == {str(status) for status in Status}


def test_every_exit_status_is_documented() -> None:
    page = (REPOSITORY / "docs" / "client.md").read_text()
    for status in Exit:
        assert f"| {status.value} | " in page
