"""Uploads of this machine's files: what is there already is not sent again, and what was cut goes on."""

import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.client import calls
from app.client.downloads import OnBytes
from app.client.errors import Refused, Unreachable, UploadFailed
from app.client.steps import Do, Emit, Patience, Send, Sleep, Step, Steps
from app.contracts.uploads import Kind, UploadStatus, ending, group, manifest, name_problem
from worker.engine.catalog.checkpoints.files import INNER_FOLDER

CHUNK_BYTES = 8_000_000  # sent in half a minute by a line of 2 Mbit/s
OUT_OF_STEP_S = 0.1


@dataclass(frozen=True)
class _Content:
    """Bytes that are to be sent, and what they are announced as."""

    kind: Kind
    name: str | None
    sha256: str
    size: int
    read: Callable[[int, int], bytes]
    """Returns at most so many bytes (the second argument) from a place (the first) on."""


def upload(path: Path, on_bytes: OnBytes | None = None) -> Steps:
    """Upload a file, or the files of a folder and then its manifest, and emit the reference. Raises UploadFailed."""
    found: list[tuple[str, Path]] = yield Do(partial(_files, path))
    contents: dict[str, _Content] = {}
    for name, file in found:
        contents[name] = yield Do(partial(_of_file, file))
    listed = _of_manifest({name: content.sha256 for name, content in contents.items()})
    sizes = {content.sha256: content.size for content in contents.values()}  # what is there twice is sent once
    total, before = sum(sizes.values()), 0

    def tell(there: int) -> None:
        if on_bytes is not None:
            on_bytes(before + there, total)

    if path.is_dir():
        status = yield from _status(listed.sha256)
        if status is not None and status.complete:  # so it has all its files
            before = total
            tell(0)
            yield Emit(status.reference)
            return
    reference = ""
    for content in {content.sha256: content for content in contents.values()}.values():
        reference = yield from _send(content, tell)
        before += content.size
        tell(0)
    if path.is_dir():
        reference = yield from _send(listed, lambda there: None)
    else:
        status = yield from _status(contents[path.name].sha256)
        if status is not None and ending(status.name or "") != ending(path.name):  # by which jobs tell its format
            raise UploadFailed(
                f"the service has the content of {path} as {status.name}; delete {reference} there first"
            )
    yield Emit(reference)


def _send(content: _Content, tell: Callable[[int], None]) -> Generator[Step, Any, str]:
    """Send what is missing of an upload, and return its reference."""
    patience = Patience()
    while True:
        try:
            status = yield from _status(content.sha256)
            while status is None or not status.complete:
                there = 0 if status is None else status.received_bytes
                tell(there)
                block = yield Do(partial(content.read, there, CHUNK_BYTES))
                call = calls.send_upload(content.sha256, content.kind, content.name, there, block, content.size)
                status = yield Send(call)
                patience.reset()
            return _reference(status, content)
        except Refused as error:
            if error.code == "wrong_offset":  # an answer was lost, or somebody else sends the same
                yield Sleep(OUT_OF_STEP_S)
            elif error.code == "conflict" and error.retry_after_s is not None:  # somebody else is sending it
                yield Sleep(error.retry_after_s)
            else:
                yield Sleep(patience.pause_s(error))
        except Unreachable as error:
            yield Sleep(patience.pause_s(error))


def _reference(status: UploadStatus, content: _Content) -> str:
    """Return what recipes name an upload by. Raises UploadFailed where it is there as something else."""
    if status.kind != content.kind or group(status.name or "") != group(content.name or ""):
        raise UploadFailed(f"the service has {content.sha256} as {status.name or 'a folder'}; delete it there first")
    return status.reference


def _status(sha256: str) -> Generator[Step, Any, UploadStatus | None]:
    """Return how much of an upload is there; None where nothing is."""
    try:
        status: UploadStatus = yield Send(calls.upload(sha256))
    except Refused as error:
        if error.status != 404:
            raise
        return None
    return status


def _files(path: Path) -> list[tuple[str, Path]]:
    """Return the files to send, by the names that they have in the folder. Raises UploadFailed, OSError."""
    if path.is_file():
        problem = name_problem(path.name)
        if problem is not None:
            raise UploadFailed(f"{path}: {problem}")
        return [(path.name, path)]
    if not path.is_dir():
        raise UploadFailed(f"there is no file or folder {path}")
    found = sorted(_taken(path))
    if not found:
        raise UploadFailed(f"{path} has no file that the service takes; pickles must be converted to safetensors first")
    return found


def _taken(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files that the service takes, of a checkpoint's folder and those of its modules and templates."""
    for entry in folder.iterdir():
        if entry.is_file() and name_problem(entry.name) is None:
            yield entry.name, entry
        elif entry.is_dir() and INNER_FOLDER.fullmatch(entry.name):  # not what training has left there
            for inner in entry.iterdir():
                if inner.is_file() and name_problem(inner.name) is None:
                    yield f"{entry.name}/{inner.name}", inner


def _of_file(path: Path) -> _Content:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return _Content("file", path.name, sha256, os.fstat(stream.fileno()).st_size, partial(_read, path))


def _of_manifest(files: dict[str, str]) -> _Content:
    content = manifest(files)
    sha256 = hashlib.sha256(content).hexdigest()
    return _Content("folder", None, sha256, len(content), lambda first, most: content[first : first + most])


def _read(path: Path, first: int, most: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(first)
        return stream.read(most)
