"""The README's commands, run as they stand in one shell, and what they print compared with what it says."""

import re
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.pages import console_commands, matches, printed_by

TIMEOUT_S = 840  # two trainings, two merges, two services, beside other tests: ten minutes where AVX-512 is missing
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)
COMMANDS = console_commands(REPOSITORY / "README.md")


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What each command printed. `make test` is left out: it is what runs this."""
    commands = [command for command, _ in COMMANDS if command != "make test"]
    printed = printed_by(commands, REPOSITORY, {"COLUMNS": "100", "PS1": ""}, TIMEOUT_S)
    return dict(zip(commands, printed, strict=False))


def test_the_readme_has_commands() -> None:
    assert [command for command, _ in COMMANDS][:2] == ["make demo", "make serve > serve.log 2>&1 &"]
    assert COMMANDS[-1][0] == "make test"


@pytest.mark.parametrize(("command", "expected"), COMMANDS[:-1], ids=lambda text: text.split("\n")[0][:40])
def test_each_command_prints_what_the_readme_says(outputs: dict[str, str], command: str, expected: str) -> None:
    assert command in outputs, "the shell did not get so far"
    if expected:
        assert matches(expected, outputs[command]), outputs[command]


def test_the_demo_shows_the_table_and_where_the_artifact_is(outputs: dict[str, str]) -> None:
    shown = outputs["make demo"]
    for words in ("topics", "sentiment", "plain average", "retention", "The artifact is in", "curl "):
        assert words in shown
    for begun in ("training topics: 0 of", "training sentiment: 0 of", "scoring", "evaluating"):  # off a terminal
        assert begun in shown
    assert len(re.findall(r"accuracy │ +0\.\d{4} │ +0\.\d{4} │ +0\.\d{4} │ +\d\.\d{4}", shown)) == 2, shown


def test_the_session_leaves_no_process_behind(outputs: dict[str, str]) -> None:
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "make demo" in outputs
    assert not [line for line in running.splitlines() if ".demo/data" in line]
