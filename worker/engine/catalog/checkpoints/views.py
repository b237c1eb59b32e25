"""Opens checkpoints, each by a view: which files it has is decided once, and each of them is opened once.

A view is a private folder of a checkpoint's files. Files that describe it are copied; weight files are links to the
open files, so that a file that is put in their place later is not read. Configurations lose the keys that steer what
libraries load. Everything after this reads only the view.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from worker.engine.catalog.checkpoints.descriptions import has_library_class
from worker.engine.catalog.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    INDEX,
    INNER_FOLDER,
    PICKLES,
    WEIGHTS,
    described_files,
    size_limit,
    weights_among,
)
from worker.engine.catalog.checkpoints.inspection import TOO_MANY_OPEN, readable
from worker.engine.catalog.checkpoints.json_files import parsed_json
from worker.engine.catalog.checkpoints.licences import CARD, MAX_FRONT_MATTER_BYTES
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_DESCRIPTION_BYTES
from worker.engine.catalog.checkpoints.pointers import ANNEXED, not_there
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset

MAX_NAMES = 100_000  # names in a folder and its sub-folders; more would take long to list
STEERING = re.compile(
    r"transformers_weights|custom_pipelines|_?(attn|experts)_implementation.*|use_kernels|kernel_config|trust_remote_code"
    r"|device_map|tp_plan|pp_plan|weights_only|compile_config|gradient_checkpointing|torchscript|output_attentions"
    r"|output_hidden_states|name_or_path|(vocab|tokenizer|merges|spm)_file|fast_tokenizer_files"
)
"""Keys of `config.json` that select the files, code or kernels that a library takes, and how it runs a model."""
STEERING_OF = {
    "tokenizer_config.json": re.compile(
        r".*_files?|name_or_path|init_inputs|sp_model_kwargs|trust_remote_code|tokenizer_object"
    ),
    "special_tokens_map.json": re.compile(
        r"(?!(additional|extra|model_specific)_special_tokens$|.*_token$).*", re.DOTALL
    ),
    "generation_config.json": re.compile(r"custom_generate|trust_remote_code|compile_config"),
}
"""Such keys of other files, by the file's name; only keys of the outermost object count."""
LABELS = ("label2id", "id2label")
"""Keys of objects whose own keys a user chooses."""
CODE = re.compile("auto_map")
CONFIGURATIONS = ("config.json", ADAPTER_CONFIG)


class Views:
    """Makes views, and removes them all at the end of its context.

    Args:
        folder: folder in which views are made and left, because its owner removes it; None for temporary ones.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._parent = folder
        self._opened = ExitStack()

    def __enter__(self) -> "Views":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def open(self, path: Path, source: str, root: Path) -> Path:
        """Make a view of the checkpoint folder `path`.

        Args:
            source: name of the checkpoint in messages.
            root: folder in which every file must lie, whatever links lead to it.

        Raises:
            InvalidCheckpoint: the folder or a file that is needed lies outside `root`, is no regular file, is too
                large, or cannot be read.
        """
        view = self._folder()
        with readable(source):
            _fill(view, _Checkpoint(path, source, root, self._opened))
        return view

    def open_file(self, path: Path, source: str, root: Path) -> Path:
        """Open a data set's file, and return a link to it with the same name; `path` itself where it cannot be opened.

        Raises:
            InvalidDataset: the file lies outside `root`, was changed to a link while it was opened, or is a pipe or
                device, whose readers may wait for ever.
        """
        link = self._folder() / path.name
        try:
            descriptor = open_beneath(path, root, self._opened)
            if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode) and not stat.S_ISDIR(mode):
                raise InvalidDataset(source, "it is no regular file")
            link.symlink_to(descriptor_path(descriptor))
        except LinkOut as error:
            raise InvalidDataset(source, "it is a symbolic link out of the allowed folders") from error
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:
                raise
            if error.errno == errno.ELOOP:
                raise InvalidDataset(source, "it was changed while it was opened; try again") from error
            return path  # its reader says why it cannot be opened
        return link

    def _folder(self) -> Path:
        if self._parent is not None:
            return Path(mkdtemp(dir=self._parent))
        return Path(self._opened.enter_context(TemporaryDirectory(prefix="maskmerge-view-")))


class LinkOut(Exception):
    """A link leads out of the folder that the file must lie in."""


def open_beneath(path: Path, root: Path, opened: ExitStack) -> int:
    """Return a descriptor for reading `path`, which stays open as long as `opened`.

    Links that lead to another place below `root` count as that place. The path is opened a folder at a time without
    following links, so that a link that is put there meanwhile is an error.

    Raises:
        LinkOut: a link leads out of `root`.
        OSError: it cannot be opened; ELOOP for a link that leads nowhere or was put there meanwhile.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if not real.is_relative_to(root):
        raise LinkOut(path.name)
    with ExitStack() as walking:
        folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        walking.callback(os.close, folder)
        *parents, name = real.relative_to(root).parts or (".",)
        for part in parents:
            folder = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            walking.callback(os.close, folder)
        # Opening a pipe would wait for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    opened.callback(os.close, descriptor)
    return descriptor


def descriptor_path(descriptor: int) -> str:
    """Return a path by which libraries open the same file again, whatever happened to its name."""
    return f"/proc/self/fd/{descriptor}"


class _Checkpoint:
    """A checkpoint's folder: its names, and its files opened."""

    def __init__(self, path: Path, source: str, root: Path, opened: ExitStack) -> None:
        self.source = source
        self._path = path
        self._root = root
        self._opened = opened
        if not path.is_dir():
            raise InvalidCheckpoint(source, "not a folder; a checkpoint is a folder written by save_pretrained()")

    def names(self) -> list[str]:
        """Return the names of the folder's files, and of those in its sub-folders that may hold files of a checkpoint.

        Raises:
            InvalidCheckpoint: there are more than `MAX_NAMES`.
        """
        found: list[str] = []
        for entry in _entries(self._path):
            if entry.is_dir(follow_symlinks=False):
                inner = _entries(Path(entry.path)) if INNER_FOLDER.fullmatch(entry.name) else ()
                found += (f"{entry.name}/{file.name}" for file in inner)
            elif not _leads_nowhere(entry) or _is_annexed(entry.path):
                found.append(entry.name)
            if len(found) > MAX_NAMES:
                raise InvalidCheckpoint(self.source, f"its folder has more than {MAX_NAMES} files")
        return found

    def open(self, name: str) -> int:
        """Open a regular file, and return its descriptor. Raises InvalidCheckpoint, which names the fault."""
        reads(self.source, name)
        if _is_annexed(self._path / name) and not (self._path / name).exists():
            raise not_there(name, ANNEXED, self.source)
        try:
            descriptor = open_beneath(self._path / name, self._root, self._opened)
        except LinkOut as error:
            problem = f"{name} is a symbolic link out of the allowed folders"
            raise InvalidCheckpoint(self.source, problem, file=name) from error
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:  # nothing is wrong with the file
                raise
            if error.errno == errno.ELOOP:
                problem = f"{name} is a symbolic link in a circle, or was changed while it was opened"
                raise InvalidCheckpoint(self.source, problem, file=name) from error
            raise InvalidCheckpoint(self.source, f"{name} cannot be read: {error.strerror}", file=name) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidCheckpoint(self.source, f"{name} is not a regular file", file=name)
        return descriptor


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Return whether a name is a broken link, which counts as missing."""
    return entry.is_symlink() and not os.path.lexists(os.path.realpath(entry.path))


def _is_annexed(path: str | Path) -> bool:
    """Return whether a name is a link into the store of git-annex, where a file is only once it was fetched."""
    return os.path.islink(path) and "/annex/objects/" in os.readlink(path)


def _fill(view: Path, folder: _Checkpoint) -> None:
    names = folder.names()
    described = [name for name in described_files(names) if name != INDEX]
    left = MAX_DESCRIPTION_BYTES
    for name in described:
        if name.endswith(WEIGHTS):  # weights of a module
            _link(view, folder, name)
        else:
            left -= _copy(view, folder, name, left)

    def read(name: str) -> bytes:
        nonlocal left
        left -= _copy(view, folder, name, left)
        return (view / name).read_bytes()

    for name in weights_among(names, read):
        _link(view, folder, name)
    for name in (*PICKLES, ADAPTER_PICKLE):
        if name in names:  # it is not opened; its presence explains why other files are missing
            (view / name).touch()
    if CARD in names:
        with suppress(InvalidCheckpoint):  # no number depends on it
            content = _read(folder.open(CARD), MAX_FRONT_MATTER_BYTES)
            (view / CARD).write_bytes(content)


def _link(view: Path, folder: _Checkpoint, name: str) -> None:
    """Make a link to an open file, which is read where it is."""
    (view / name).parent.mkdir(exist_ok=True)
    (view / name).symlink_to(descriptor_path(folder.open(name)))


def _copy(view: Path, folder: _Checkpoint, name: str, most: int) -> int:
    """Copy a file that describes the checkpoint, and return its number of bytes."""
    descriptor = folder.open(name)
    found = os.fstat(descriptor)
    if found.st_size > size_limit(name):
        raise InvalidCheckpoint(folder.source, f"{name} is larger than {size_limit(name)} bytes", file=name)
    if found.st_size > most:
        problem = f"configuration, tokenizer and index are larger than {MAX_DESCRIPTION_BYTES} bytes ({name})"
        raise InvalidCheckpoint(folder.source, problem, file=name)
    content = _read(descriptor, found.st_size)
    if name in CONFIGURATIONS:
        content = _without(STEERING, content, is_deep=True)
    elif name in STEERING_OF:
        content = _without(STEERING_OF[name], content)
    if name == "tokenizer_config.json" and (view / "tokenizer.json").exists() and _has_own_class(view):
        content = _without(CODE, content)
    target = view / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))  # `checkpoint_state` depends on it
    return found.st_size


def _read(descriptor: int, size: int) -> bytes:
    found = bytearray()
    while len(found) < size and (more := os.pread(descriptor, size - len(found), len(found))):
        found += more
    return bytes(found)


def _has_own_class(view: Path) -> bool:
    """Return whether transformers has the model's own classes; then a tokenizer with `tokenizer.json` needs no code."""
    try:
        config = parsed_json((view / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and has_library_class(config)


def _without(keys: re.Pattern[str], content: bytes, is_deep: bool = False) -> bytes:
    """Return a configuration without `keys`. It is unchanged if it has none of them, or is no JSON.

    `inspect_checkpoint` refuses what is no JSON.

    Args:
        is_deep: whether keys of inner objects count too.
    """
    if len(content) > MAX_CONFIG_BYTES:
        return content
    try:
        values = parsed_json(content)
        kept = _without_keys(values, keys, is_deep)
    except (ValueError, RecursionError):
        return content
    return content if kept == values else json.dumps(kept, ensure_ascii=False, indent=2).encode()


def _without_keys(values: Any, keys: re.Pattern[str], is_deep: bool) -> Any:
    """Return a JSON value without the keys of its objects that `keys` matches wholly."""
    if isinstance(values, dict):
        return {
            key: _without_keys(value, keys, is_deep) if is_deep and key not in LABELS else value
            for key, value in values.items()
            if not keys.fullmatch(key)
        }
    if isinstance(values, list) and is_deep:
        return [_without_keys(value, keys, is_deep) for value in values]
    return values
