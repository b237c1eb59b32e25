"""Lines of the log: their formats, the facts that they have, and the secrets that they never have."""

import json
import logging
import subprocess
import sys
from threading import Thread
from typing import Any

import pytest

from app.observability.context import add_facts, concerning, facts, process_concerns
from app.observability.logs import JsonLines, TextLines, without_secrets
from tests.conftest import REPOSITORY

SECRETS = [
    "mm_0123456789abcdef_" + "A" * 43,
    "whsec_" + "bWFza21lcmdl" * 3,
    "hf_" + "x" * 34,
    "redis://:hunter2-hunter2@10.0.0.1:6379/0",
]


def line(message: str, *values: object, **options: Any) -> logging.LogRecord:
    record = logging.LogRecord(
        "worker.tasks", logging.WARNING, __file__, 1, message, values, options.pop("exc_info", None)
    )
    record.__dict__.update(options)
    return record


def test_a_json_line_has_time_level_process_logger_message_and_the_facts() -> None:
    record = line("%s ends\nearly", "it", status=200, color_message="\x1b[1m")
    record.created = 1_796_092_296.8155
    with concerning(request_id="r", tenant="search"), concerning(job="j", attempt=2):
        text = JsonLines("worker").format(record)
    assert "\n" not in text
    assert json.loads(text) == {
        "time": "2026-12-01T02:31:36.815Z", "level": "WARNING", "process": "worker", "logger": "worker.tasks",
        "message": "it ends\nearly", "request_id": "r", "tenant": "search", "job": "j", "attempt": 2, "status": 200,
    }  # fmt: skip


def test_a_json_line_has_the_trace_of_an_error() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = line("it failed", exc_info=sys.exc_info())
    assert json.loads(JsonLines("api").format(record))["exception"].endswith("ValueError: broken")


def test_a_text_line_ends_with_the_facts() -> None:
    with concerning(job="j", attempt=2):
        text = TextLines().format(line("it ends"))
    assert text.endswith(" WARNING worker.tasks it ends job=j attempt=2")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("formatter", [TextLines(), JsonLines("api")], ids=["text", "json"])
def test_no_line_has_a_secret_wherever_it_was_quoted(formatter: logging.Formatter, secret: str) -> None:
    try:
        raise ValueError(secret)
    except ValueError:
        record = line("said %s", secret, exc_info=sys.exc_info(), route=secret)
    text = formatter.format(record)
    for part in ("A" * 43, "bWFza21lcmdl", "x" * 34, "hunter2"):
        assert part not in text
    assert secret[:3] in text, "what kind of secret it was is told"


def test_what_only_resembles_a_secret_stays() -> None:
    for text in ("hf:org/name", "mm_0123456789abcdef revoked", "http://host:8000/a@b", "GET /jobs in 1.0 ms"):
        assert without_secrets(text) == text


def test_facts_are_of_their_task_and_end_with_it() -> None:
    seen: list[Any] = []
    with concerning(job="a"):
        add_facts(tenant="t")
        other = Thread(target=lambda: seen.append(dict(facts())))
        other.start()
        other.join()
        assert facts() == {"job": "a", "tenant": "t"}
    assert facts() == {}
    assert seen == [{}], "another thread does something else"


def test_facts_of_a_process_are_of_all_its_threads() -> None:
    seen: list[Any] = []
    process_concerns({"job": "a"})
    try:
        other = Thread(target=lambda: seen.append(dict(facts())))
        other.start()
        other.join()
    finally:
        process_concerns({})
    assert seen == [{"job": "a"}]


ENDS = """
import logging, threading, warnings
from app.observability.logs import adopt, configure
configure("INFO", "json", "api")
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
adopt()
library.warning("from a library")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("the end")
"""


def test_warnings_libraries_and_ends_of_threads_and_process_are_lines_too() -> None:
    ran = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, cwd=REPOSITORY)
    lines = [json.loads(text) for text in ran.stderr.splitlines()]
    assert ran.returncode == 1
    assert [found["logger"] for found in lines] == ["library", "py.warnings", "app", "app"]
    assert [found.get("exception", "").rpartition("\n")[2] for found in lines[2:]] == [
        "ZeroDivisionError: division by zero",
        "RuntimeError: the end",
    ]
