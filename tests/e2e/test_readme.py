"""The README's commands, run as they stand in one shell, and what they print compared with what it says."""

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

TIMEOUT_S = 1400  # two trainings, two merges, two services, beside other tests: twenty minutes where AVX-512 is missing
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)
MARK = "@@@ "


def console_commands(page: Path) -> list[tuple[str, str]]:
    """(command, expected output) of every console block, in order; `…` stands for anything."""
    commands: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines(keepends=True):
            if line.startswith("$ "):
                commands.append((line[2:].strip(), ""))
            else:
                command, expected = commands[-1]
                commands[-1] = (command, expected + line)
    return commands


def matches(expected: str, actual: str) -> bool:
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", expected.strip()))
    return re.fullmatch(pattern, actual.strip(), re.DOTALL) is not None


COMMANDS = [(command, expected) for command, expected in console_commands(REPOSITORY / "README.md")]


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What each command printed. `make test` is left out: it is what runs this."""
    commands = [command for command, _ in COMMANDS if command != "make test"]
    script = "".join(f"{command}\necho; echo '{MARK}'\n" for command in commands)
    shell = subprocess.Popen(
        ["bash", "-m"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "100", "PS1": ""},
        start_new_session=True,
    )
    with shell:  # else its pipes stay open when it takes too long
        try:
            printed, _ = shell.communicate(script + "wait\n", timeout=TIMEOUT_S)
        finally:
            if shell.poll() is None:
                started = psutil.Process(shell.pid).children(recursive=True)
                shell.kill()
                for process in started:
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
                psutil.wait_procs(started)
    parts = printed.split(f"\n{MARK}\n")
    return dict(zip(commands, parts, strict=False))


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
    assert len(re.findall(r"accuracy │ +0\.\d{4} │ +0\.\d{4} │ +0\.\d{4} │ +\d\.\d{4}", shown)) == 2, shown


def test_the_session_leaves_no_process_behind(outputs: dict[str, str]) -> None:
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "make demo" in outputs
    assert not [line for line in running.splitlines() if ".demo/data" in line]
