"""Keeps what was predicted with a merge, so that another run of a bench computes only what is new or has changed."""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worker.engine.tasks.metrics import Array

ROOT = Path(__file__).resolve().parent.parent
ARITHMETIC = ("worker.engine.merging", "worker.engine.search")
"""Packages whose modules decide what a merge is. Their `__init__` modules only name others."""


@dataclass(frozen=True)
class Outcome:
    """What one backbone makes of one task's held-out rows, with the expert's own head and with it aligned."""

    kept: Array
    aligned: Array


@dataclass(frozen=True)
class Kept:
    """The outcomes of one merge, by task."""

    by_task: Mapping[str, Outcome]
    seconds: float
    """Seconds of CPU time that the merge took, without measuring the experts."""
    chosen: str = ""
    """Name of the candidate that a search chose."""


class ArrayStore:
    """Files of arrays in a folder, named by a digest of everything that they follow from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, identity: Any) -> dict[str, Array] | None:
        """Return the arrays that were kept under an identity, anything that is JSON."""
        path = self._path(identity)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def keep(self, identity: Any, arrays: Mapping[str, Any]) -> None:
        """Write arrays, all at once."""
        path = self._path(identity)
        unfinished = path.with_suffix(".new.npz")
        np.savez_compressed(unfinished, allow_pickle=False, **arrays)
        unfinished.replace(path)

    def _path(self, identity: Any) -> Path:
        text = json.dumps(identity, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"


class OutcomeStore:
    """The outcomes of merges in a folder."""

    def __init__(self, folder: Path) -> None:
        self._arrays = ArrayStore(folder)

    def find(self, identity: Any) -> Kept | None:
        """Return what was kept under an identity, anything that is JSON."""
        arrays = self._arrays.find(identity)
        if arrays is None:
            return None
        tasks = [str(task) for task in arrays["tasks"]]
        by_task = {task: Outcome(arrays[f"kept {task}"], arrays[f"aligned {task}"]) for task in tasks}
        return Kept(by_task, float(arrays["seconds"]), str(arrays["chosen"]))

    def keep(self, identity: Any, made: Kept) -> None:
        """Write outcomes, all at once."""
        arrays: dict[str, Any] = {"tasks": np.array(list(made.by_task)), "seconds": made.seconds}
        for task, outcome in made.by_task.items():
            arrays |= {f"kept {task}": outcome.kept, f"aligned {task}": outcome.aligned}
        self._arrays.keep(identity, arrays | {"chosen": np.array(made.chosen)})


def code_digest(modules: Iterable[str]) -> str:
    """Return a digest of modules, and of all that they import of ARITHMETIC; comments and docstrings do not count."""
    found: dict[str, str] = {}
    to_read = list(modules)
    while to_read:
        name = to_read.pop()
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if name in found or not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = ast.dump(_without_docstrings(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ARITHMETIC):
                to_read += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
