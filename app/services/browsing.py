"""Finds what recipes may name: checkpoints and data sets under a tenant's local roots, and models of its merges."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG
from worker.engine.catalog.data.rows import FORMATS, PARQUET

MOST_FOUND = 500  # of each kind, which is more than anybody reads
MOST_ENTRIES = 20_000  # files and folders that are looked at, so that a page is there within a second
DEEPEST = 6
MARKS = ("config.json", ADAPTER_CONFIG)
"""Files that a folder has which is a checkpoint or an adapter."""


@dataclass(frozen=True)
class Found:
    checkpoints: list[str]
    """References, in order."""
    datasets: list[str]
    is_whole: bool
    """Whether all was looked at."""


def found_below(roots: Sequence[Path]) -> Found:
    """List checkpoints and files of rows below the roots. Links and hidden folders are not followed.

    Where roots have the same path, the first one counts, as for references.
    """
    checkpoints: dict[str, None] = {}
    datasets: dict[str, None] = {}
    looked_at = 0
    for root in roots:
        for folder, files in _folders(root, DEEPEST):
            looked_at += 1 + len(files)
            where = folder.relative_to(root).as_posix()
            if any(mark in files for mark in MARKS) and where != ".":
                checkpoints[f"local:{where}"] = None
                continue
            for name in files:
                if Path(name).suffix.lower() in (*FORMATS, PARQUET):
                    datasets[f"local:{name if where == '.' else f'{where}/{name}'}"] = None
            if looked_at > MOST_ENTRIES:
                break
    is_whole = looked_at <= MOST_ENTRIES and max(len(checkpoints), len(datasets)) <= MOST_FOUND
    return Found(sorted(checkpoints)[:MOST_FOUND], sorted(datasets)[:MOST_FOUND], is_whole)


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each with the names of its files. What cannot be listed is left out."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
            files = [entry.name for entry in found if entry.is_file()]
            folders = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    yield folder, files
    if depth and not any(mark in files for mark in MARKS):
        for name in folders:
            if not name.startswith("."):
                yield from _folders(folder / name, depth - 1)
