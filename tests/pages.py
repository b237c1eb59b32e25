"""Pages of the documentation, and their commands."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.conftest import REPOSITORY

MARK = "@@@ "
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))


class Command(NamedTuple):
    """A command of a `console` block, and what the page says that it prints; `…` stands for anything."""

    line: str
    expected: str = ""


def console_commands(page: Path) -> list[Command]:
    """The commands of every console block, in order. Lines that begin with `> ` go on with the command before."""
    commands: list[Command] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines(keepends=True):
            if line.startswith("$ "):
                commands.append(Command(line[2:].rstrip("\n")))
            elif line.startswith("> ") and not commands[-1].expected:
                commands[-1] = Command(f"{commands[-1].line}\n{line[2:].rstrip()}")
            else:
                commands[-1] = Command(commands[-1].line, commands[-1].expected + line)
    return commands


def matches(expected: str, actual: str) -> bool:
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", expected.strip()))
    return re.fullmatch(pattern, actual.strip(), re.DOTALL) is not None


def printed_by(commands: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float) -> list[str]:
    """What each command printed, run in one shell. Fewer than there are commands, where the shell did not get so far.

    What a command left running in the background is ended if the shell takes longer than it may.
    """
    ready = ":"  # what the shell itself says as it starts is printed with this
    script = "".join(f"{command}\necho; echo '{MARK}'\n" for command in (ready, *commands))
    shell = subprocess.Popen(
        ["bash", "-m"], cwd=folder, env={**os.environ, **environment}, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with shell:  # else its pipes stay open when it takes too long
        try:
            printed, _ = shell.communicate(script + "wait\n", timeout=timeout_s)
        finally:
            if shell.poll() is None:
                started = psutil.Process(shell.pid).children(recursive=True)
                shell.kill()
                for process in started:
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
                psutil.wait_procs(started)
    return printed.split(f"\n{MARK}\n")[1:-1]
