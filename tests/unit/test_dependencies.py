"""Whatever is imported is declared in pyproject.toml, for the process or the task that imports it."""

import ast
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OURS = {"app", "maskmerge", "worker", "tests", "bench", *(file.stem for file in (REPOSITORY / "examples").glob("*.py"))}


def names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def imported(files: Iterable[Path]) -> set[str]:
    """Top-level packages that are no part of Python and not ours."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - OURS


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["app", "worker/engine/catalog"], ["mcp", "tracing"]),
        (["worker"], ["worker"]),
        (["examples"], ["worker", "demo"]),
        (["bench"], ["worker", "demo", "dev"]),
        (["docs", "tests"], ["worker", "dev", "docs", "mcp", "tracing"]),
    ],
    ids=["api", "worker", "examples", "bench", "tests"],
)
def test_every_import_is_declared(folders: list[str], extras: list[str]) -> None:
    extra = [requirement for name in extras for requirement in PROJECT["optional-dependencies"][name]]
    declared = names([*PROJECT["dependencies"], *extra])
    distributions = packages_distributions()
    packages = imported(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py"))
    assert packages
    assert [name for name in packages if declared.isdisjoint(map(canonicalize_name, distributions[name]))] == []


def test_every_dependency_is_pinned() -> None:
    pinned = names(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    extra = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    declared = names([*PROJECT["dependencies"], *extra])
    assert declared - pinned == set()
