"""Whatever API and worker import is declared in pyproject.toml, for the process that imports it."""

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
OURS = {"app", "worker"}


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


API = [*(REPOSITORY / "app").rglob("*.py"), *(REPOSITORY / "worker/engine/catalog").rglob("*.py")]
WORKER = list((REPOSITORY / "worker").rglob("*.py"))


@pytest.mark.parametrize(("files", "extras"), [(API, ()), (WORKER, ("worker",))], ids=["api", "worker"])
def test_every_import_is_declared(files: list[Path], extras: tuple[str, ...]) -> None:
    extra = [requirement for name in extras for requirement in PROJECT["optional-dependencies"][name]]
    declared = names([*PROJECT["dependencies"], *extra])
    distributions = packages_distributions()
    packages = imported(files)
    assert {"pydantic", "pydantic_core"} <= packages
    assert [name for name in packages if declared.isdisjoint(map(canonicalize_name, distributions[name]))] == []


def test_every_dependency_is_pinned() -> None:
    pinned = names(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    declared = names([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["worker"]])
    assert declared - pinned == set()
