"""Uploads: which files are taken, what a folder's manifest says, and how an upload is described.

The service and its client both read this, so that what one sends the other takes.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["file", "folder"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

SAFETENSORS = ".safetensors"
PARQUET = ".parquet"
TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md", ".jinja")
TOKENIZERS = (".model", ".spm", ".codes", ".tokenizer")
"""Endings of tokenizer files that are not text, or not always."""
ENDINGS = (SAFETENSORS, PARQUET, *TEXTS, *TOKENIZERS)
MOST_NAME_BYTES = 200
MOST_FILES = 1200  # weights and descriptions of the largest checkpoint that is read
MAX_MANIFEST_BYTES = 500_000
MOST_DEPTH = 2  # modules and chat templates of a checkpoint lie in folders of their own, one level down


class UploadStatus(BaseModel):
    """How much of an upload is there."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    sha256: str
    """SHA-256 of all bytes, in hexadecimal digits."""
    kind: Kind
    """Whether it is a file, or the manifest of a folder."""
    name: str | None
    """Name of a file, whose ending says its format; null for a folder."""
    bytes: int
    """Size of the whole upload; of a folder, that of its manifest."""
    received_bytes: int
    """Number of bytes that are there, from the first. The next request begins with the one after them."""
    complete: bool
    """Whether all bytes are there and were checked. Only then can a job read them."""
    expires_at: datetime
    """Time at which the upload is removed if nothing uses it until then."""
    reference: str
    """What a recipe names it by."""


def name_problem(name: str) -> str | None:
    """Say why a file of this name is not taken; None if it is. The name has no folders."""
    if not name or "/" in name or "\\" in name or not name.isprintable():
        return "it is no name of a file, without folders, in printable characters"
    if name.startswith("."):
        return "it begins with a dot"
    if len(name.encode(errors="replace")) > MOST_NAME_BYTES:
        return f"it is longer than {MOST_NAME_BYTES} bytes"
    if ending(name) not in ENDINGS:
        return (
            f"files that end in '{ending(name)}' are not taken, since they may be pickles or code; those that are "
            f"end in {', '.join(ENDINGS)}"
        )
    return None


def ending(name: str) -> str:
    """Return the end of a name that says its format, as `.jsonl`, in small letters."""
    return PurePosixPath(name).suffix.lower()


def group(name: str) -> str:
    """Return what files of this ending are checked as when they are complete: safetensors, Parquet, or any other."""
    return ending(name) if ending(name) in (SAFETENSORS, PARQUET) else ""


class ManifestError(ValueError):
    """The manifest of a folder is malformed, or names what no folder may have; the message says which."""


def read_manifest(content: bytes) -> dict[str, str]:
    """Return the sha256 of each file by its path in the folder. Raises ManifestError."""
    try:
        said = json.loads(content.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"it is no JSON ({type(error).__name__})") from None
    files = said.get("files") if isinstance(said, dict) and said.keys() == {"files"} else None
    if not isinstance(files, dict) or not files:
        raise ManifestError('write it as {"files": {"config.json": "<sha256>", …}}, with nothing beside')
    if len(files) > MOST_FILES:
        raise ManifestError(f"it has {len(files)} files; {MOST_FILES} are allowed")
    for path, sha256 in files.items():
        parts = path.split("/")
        if len(parts) > MOST_DEPTH:
            raise ManifestError(f"{_shown(path)} is more than one folder deep, or no relative path")
        for part in parts[:-1]:
            is_long = len(part.encode(errors="replace")) > MOST_NAME_BYTES
            if not part or part.startswith(".") or "\\" in part or not part.isprintable() or is_long:
                raise ManifestError(f"{_shown(path)} is no relative path below the folder")
        problem = name_problem(parts[-1])
        if problem is not None:
            raise ManifestError(f"{_shown(path)}: {problem}")
        if not isinstance(sha256, str) or not _is_digest(sha256):
            raise ManifestError(f"{_shown(path)} has no sha256, of 64 digits and letters a to f")
        if "/" in path and parts[0] in files:
            raise ManifestError(f"{_shown(parts[0])} is both a file and a folder")
    return files


def manifest(files: Mapping[str, str]) -> bytes:
    """Return the manifest of a folder: the same files always give the same bytes, and so the same digest."""
    content = {"files": dict(sorted(files.items()))}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ManifestError("it has a key twice")
    return found


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _shown(path: str) -> str:
    return f"'{path[:MOST_NAME_BYTES]}'"
