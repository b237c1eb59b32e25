"""`maskmerge verify`: whether the files of a folder are those of an artifact, and who says so."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.exits import Exit, Stop
from app.contracts.printable import printable

NOT_COVERED = (".gitattributes", ".git/", ".cache/huggingface/")
"""Files and folders, by their whole names, that the hub, git and the hub's own program put beside the artifact's."""
OF_EARLIER_RELEASES = ("README.md", "manifest.json")
"""Files that provenance of earlier releases did not cover."""


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
        names = _names(folder)
        found = _parsed(_statement(folder, names, key), "the provenance")
        faults, aside = [*problems(found)], list[str]()
        if not faults:
            faults, aside = _compared(folder, names, found)
    except (ValueError, OSError) as error:
        raise Stop(printable(f"{folder}: {error}")) from error
    for fault in faults[:20]:
        print(printable(fault))
    if faults:
        raise Stop(f"{folder} is not what its provenance says ({len(faults)} faults)", Exit.ERROR)
    says = f"signed by the owner of {key}" if key else "the signature was not checked, since no --key is named"
    print(f"{len(names) - len(aside)} files are as the provenance says; {says}")
    if aside:
        print(printable(f"not covered: {', '.join(aside)}; nobody vouches for what is in there"))


def _names(folder: Path) -> set[str]:
    """Return the names of all files, where a folder that is not covered is one, and ends with a slash.

    Raises:
        ValueError: the folder has links, which may lead anywhere, or what is neither file nor folder.
    """

    def fails(error: OSError) -> None:
        raise error

    found = set()
    for parent, folders, files in os.walk(folder, onerror=fails):
        for entry in (*folders, *files):
            path = Path(parent) / entry
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise ValueError(f"{name} is a link, and an artifact has none; verify a copy of the files themselves")
            if entry in folders and f"{name}/" in NOT_COVERED:
                folders.remove(entry)
                found.add(f"{name}/")
            elif entry not in folders:
                if not path.is_file():
                    raise ValueError(f"{name} is neither a file nor a folder")
                found.add(name)
    return found


def _statement(folder: Path, names: set[str], key: Path | None) -> bytes:
    """Return the statement, which with a key is the one that was signed. Raises ValueError."""
    from app.contracts.provenance import PROVENANCE, SIGNED_PROVENANCE

    for name in (PROVENANCE, *([SIGNED_PROVENANCE] if key else [])):
        if name not in names:
            lacking = (
                "it is no artifact" if name == PROVENANCE else "it was made by a service without MASKMERGE_SIGNING_KEY"
            )
            raise ValueError(f"there is no {name}: {lacking}")
    readable = (folder / PROVENANCE).read_bytes()
    if key is None:
        return readable
    from app.storage.signing_keys import verified

    signed = verified((folder / SIGNED_PROVENANCE).read_bytes(), key.read_bytes())
    if readable != signed:
        raise ValueError(f"{PROVENANCE} was changed: it is not what {SIGNED_PROVENANCE} has, which was signed")
    return signed


def _parsed(content: bytes, what: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON that can be read ({type(error).__name__})") from error


def _compared(folder: Path, names: set[str], statement: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what is wrong with the files, and the names of those that the provenance does not cover.

    A model that is published alone lies at the root of its repository, without the folder `model/`.
    """
    from app.contracts.provenance import PROVENANCE, SIGNED_PROVENANCE, manifest_digest_of, subjects_of

    faults = []
    covered = {PROVENANCE, SIGNED_PROVENANCE}
    is_apart = any(name.startswith("model/") for name in names)
    for subject, wanted in subjects_of(statement).items():
        name = subject if is_apart else subject.removeprefix("model/")
        if name not in names:
            faults.append(f"{subject} is missing")
            continue
        covered.add(name)
        if _sha256(folder / name) not in wanted:
            faults.append(f"{name} was changed")
    digest = manifest_digest_of(statement)
    if digest is not None:
        covered.add("manifest.json")
        faults += _faults_of_manifest(folder, names, digest)
    others = sorted(names - covered)
    aside = [name for name in others if name in (*NOT_COVERED, *OF_EARLIER_RELEASES)]
    return [*faults, *(f"{name} is not part of the artifact" for name in others if name not in aside)], aside


def _faults_of_manifest(folder: Path, names: set[str], wanted: str) -> Iterator[str]:
    """Yield what is wrong with the manifest, whose entries for the provenance are compared with the files."""
    from app.contracts.provenance import NO_SUBJECTS, PROVENANCE, SIGNED_PROVENANCE, as_manifest, manifest_digest

    if "manifest.json" not in names:
        yield "manifest.json is missing"
        return
    content = (folder / "manifest.json").read_bytes()
    try:
        found = _parsed(content, "the manifest")
        listed = [file for file in found["files"] if file["name"] in NO_SUBJECTS]
        there = [
            {"name": name, "bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in (SIGNED_PROVENANCE, PROVENANCE)
            if name in names
        ]
        is_same = manifest_digest(found) == wanted and as_manifest(found) == content and listed == there
    except (ValueError, KeyError, TypeError, RecursionError):
        is_same = False
    if not is_same:
        yield "manifest.json was changed"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
