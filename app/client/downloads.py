"""Downloads of artifacts: each file is checked, and goes on where it was cut."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from app.client import calls
from app.client.errors import DownloadFailed, Refused, Unreachable
from app.client.steps import Do, Next, Open, Patience, Send, Sleep, Steps
from app.contracts.artifacts import FileEntry, Listing

BLOCK_BYTES = 1 << 20
LINKED = ".safetensors"
"""Suffix of the files that are linked where they have the same content; a small file may be edited, and is copied."""
RANGE_NOT_SATISFIABLE = 416

OnBytes = Callable[[int, int], Any]
"""Called with the number of bytes that are there, and the number in all."""


def download(job_id: str, folder: Path, on_bytes: OnBytes | None = None) -> Steps:
    """Download every file of the artifact that is not there yet. Raises DownloadFailed."""
    listing: Listing = yield Send(calls.artifacts(job_id))
    paths = {file.name: _place(folder, file.name) for file in listing.files}
    sizes = {file.sha256: file.bytes for file in listing.files}  # files of the same content are fetched once
    done: dict[str, Path] = {}
    total, before = sum(sizes.values()), 0

    def tell(there: int) -> None:
        if on_bytes is not None:
            on_bytes(before + there, total)

    for file in listing.files:
        path = paths[file.name]
        if (yield Do(path.exists)):
            if (yield Do(partial(_sha256, path))) != file.sha256:
                raise DownloadFailed(f"{path} is there with other content; download to another folder")
        elif file.sha256 in done:
            yield Do(partial(_repeat, done[file.sha256], path))
        else:
            yield from _fetch(file, path, tell)
        if file.sha256 not in done:
            done[file.sha256] = path
            before += file.bytes
            tell(0)


def archive(job_id: str, path: Path) -> Steps:
    """Download the artifact as one tar. It is made while it is sent, so a cut one begins anew the next time."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        yield Open(calls.archive(job_id))
        with unfinished.open("wb") as stream:
            while (block := (yield Next())) is not None:
                stream.write(block)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _fetch(file: FileEntry, path: Path, tell: Callable[[int], None]) -> Steps:
    """Fetch one file under another name, which it keeps until it is whole and its sha256 is right.

    What a cut leaves under that name is gone on with, now or by a later download.
    """
    if not file.href.startswith("/"):  # the API key is for this service alone
        raise DownloadFailed(f"{file.name} is said to be at {file.href[:200]!r}, which is no path of the service")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{file.sha256[:16]}.partial")
    with unfinished.open("a+b") as stream:
        digest = hashlib.sha256()
        there: int = yield Do(partial(_read, stream, digest))
        etag, patience = f'"{file.sha256}"', Patience()
        while there < file.bytes or file.bytes == 0:
            tell(there)
            try:
                response: httpx.Response = yield Open(calls.file(file.href, there, etag))
                if there and _first_byte(response) != there:  # the whole file comes, since it is not the same any more
                    digest, there = hashlib.sha256(), 0
                    stream.truncate(0)
                etag = response.headers.get("ETag", etag)
                while (block := (yield Next())) is not None:
                    there += len(block)
                    if there > file.bytes:  # a server that goes on would fill the disk
                        break
                    digest.update(block)  # some ten microseconds, less than to hand it to a thread
                    stream.write(block)
                    tell(there)
                    patience.reset()
                break
            except Unreachable as error:
                yield Sleep(patience.pause_s(error))
            except Refused as error:
                if error.status != RANGE_NOT_SATISFIABLE or not there:
                    yield Sleep(patience.pause_s(error))
                digest, there = hashlib.sha256(), 0
                stream.truncate(0)
    if there > file.bytes or digest.hexdigest() != file.sha256:
        unfinished.unlink()
        raise DownloadFailed(f"{file.name} did not arrive as announced (sha256 {file.sha256}); download it again")
    unfinished.replace(path)


def _place(folder: Path, name: str) -> Path:
    """Return where a file belongs. Raises DownloadFailed where that is outside the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or path.resolve() == folder.resolve():
        raise DownloadFailed(f"{name} would lie outside {folder}")
    return path


def _first_byte(response: httpx.Response) -> int:
    found = re.match(r"bytes ([0-9]{1,15})-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found and response.status_code == 206 else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(stream: BinaryIO, digest: Any) -> int:
    """Digest what is there already, and return how many bytes that are."""
    stream.seek(0)
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return stream.tell()


def _repeat(existing: Path, path: Path) -> None:
    """Give a file a second name, or copy it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == LINKED:
        try:
            os.link(existing, path)
            return
        except OSError:  # the file system has no hard links
            pass
    shutil.copyfile(existing, path)
