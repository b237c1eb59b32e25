"""The page about the client and the command line: its programs and commands run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANGS_S, REPOSITORY, Service, tiny_recipe
from tests.pages import console_commands, matches, printed_by

PAGE = REPOSITORY / "docs" / "client.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
COMMANDS = console_commands(PAGE)
SAID = ["… tensors, … bytes\nsucceeded 0.5", "…succeeded", "invalid_request ['method…']", "at most 2048 rows…"]
"""What the programs print, in the order of the page."""


@pytest.fixture(scope="module")
def place(service: Service, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a recipe, and the variables by which commands find the service."""
    folder = tmp_path_factory.mktemp("place")
    recipe = {**tiny_recipe("a", "c", name="average"), "labels": {"team": "search"}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    environment = {
        **os.environ,
        "MASKMERGE_URL": service.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'app' / 'public'}",
    }
    return folder, environment


@pytest.fixture(scope="module")
def outputs(place: tuple[Path, dict[str, str]]) -> dict[str, str]:
    """What each command printed."""
    folder, environment = place
    commands = [command for command, _ in COMMANDS]
    return dict(zip(commands, printed_by(commands, folder, environment, HANGS_S), strict=False))


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=lambda text: text.split("\n")[0][:40])
def test_each_command_prints_what_the_page_says(outputs: dict[str, str], command: str, expected: str) -> None:
    assert matches(expected, outputs[command]), outputs[command]


@pytest.mark.parametrize(
    ("program", "expected"), list(zip(PROGRAMS, SAID, strict=True)), ids=["blocking", "async", "errors", "uploads"]
)
def test_each_program_runs(
    service: Service, place: tuple[Path, dict[str, str]], tmp_path: Path, program: str, expected: str
) -> None:
    recipe, environment = place
    (tmp_path / "inputs").symlink_to(service.inputs)
    service.finished(service.submit(json.loads((recipe / "recipe.json").read_text())))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=HANGS_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert matches(expected, done.stdout), done.stdout
