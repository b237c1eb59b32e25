"""`maskmerge verify`: whether the files of a folder are those of an artifact, and who says so."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from app.cli.exits import Exit, Stop
from app.contracts.printable import printable

LATER = (".git/", ".cache/", ".gitattributes")
"""Files that a repository's own tools put beside the artifact's."""


def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="An artifact's folder, or a copy of a repository that it was published in.",
            show_default=False,
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="FILE", exists=True, dir_okay=False, help="Public key, in PEM, that must have signed."
        ),
    ] = None,
) -> None:
    """Check that every file is as its provenance says and, with --key, that the owner of the key has signed that."""
    from app.contracts.provenance import problems

    try:
        found = json.loads(_statement(folder, key))
    except ValueError as error:
        raise Stop(f"{folder}: {error}") from error
    faults = [*problems(found)] or [*_faults(folder, found["subject"])]
    for fault in faults[:20]:
        print(printable(fault))
    if faults:
        raise Stop(f"{folder} is not what its provenance says ({len(faults)} faults)", Exit.ERROR)
    says = f"signed by the owner of {key}" if key else "the signature was not checked, since no --key is named"
    print(f"{len(found['subject'])} files are as the provenance says; {says}")


def _statement(folder: Path, key: Path | None) -> bytes:
    """Return the statement, which with a key is the one that was signed. Raises ValueError."""
    from app.contracts.provenance import PROVENANCE, SIGNED_PROVENANCE

    name = PROVENANCE if key is None else SIGNED_PROVENANCE
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError as error:
        lacking = "it was made by a service without MASKMERGE_SIGNING_KEY" if key else "it is no artifact"
        raise ValueError(f"there is no {name}: {lacking}") from error
    if key is None:
        return content
    from app.storage.signing_keys import verified

    return verified(content, key.read_bytes())


def _faults(folder: Path, subjects: list[dict[str, dict[str, str]]]) -> Iterator[str]:
    """Yield what is wrong with the files.

    A model that is published alone lies at the root of its repository, without the folder `model/`.
    """
    covered = set()
    for subject in subjects:
        name, wanted = str(subject["name"]), subject["digest"]["sha256"]
        places = [place for place in (name, name.removeprefix("model/")) if _is_below(folder, place)]
        if not places:
            yield f"{name} is missing"
            continue
        covered.add(places[0])
        if _sha256(folder / places[0]) != wanted:
            yield f"{places[0]} was changed"
    from app.contracts.provenance import UNCOVERED

    for name in sorted(_names(folder) - covered - {*UNCOVERED}):
        if not name.startswith(LATER):
            yield f"{name} is not part of the artifact"


def _is_below(folder: Path, name: str) -> bool:
    """Return whether a name is that of a file in the folder, and leads nowhere else."""
    return ".." not in name.split("/") and not name.startswith("/") and (folder / name).is_file()


def _names(folder: Path) -> set[str]:
    return {
        (Path(parent) / file).relative_to(folder).as_posix() for parent, _, files in os.walk(folder) for file in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
