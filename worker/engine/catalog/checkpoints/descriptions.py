"""Checks the files beside the weights: their sizes, the modules that they list, and code that they name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.architectures import architecture_of
from worker.engine.catalog.checkpoints.files import MODULES, WEIGHTS, described_files, file_names, size_limit
from worker.engine.catalog.checkpoints.json_files import parsed_json, read_file, read_json
from worker.engine.catalog.checkpoints.library import model_type_of
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_DESCRIPTION_BYTES, MAX_DESCRIPTION_FILES
from worker.engine.catalog.checkpoints.pointers import BEGINNING, refuse_stand_in
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


def check_folder(path: Path, source: str) -> None:
    """Raise InvalidCheckpoint where there is no folder, and for a tokenizer that names code to run."""
    if not path.is_dir():
        raise InvalidCheckpoint(source, "not a folder; a checkpoint is a folder written by save_pretrained()")
    check_description(path, source)
    file = path / "tokenizer_config.json"
    if file.exists():
        refuse_code(file.name, read_json(file, source, MAX_CONFIG_BYTES), source)


def check_description(path: Path, source: str) -> None:
    """Check sizes and first bytes of the files beside the weights.

    Raises:
        InvalidCheckpoint: one is too large, all together are too large, or one is a pointer or a web page.
    """
    names = described_files({*file_names(path)})
    sizes = {}
    for name in names:
        file = path / name
        if not file.is_file():
            continue
        sizes[name] = file.stat().st_size
        if sizes[name] > size_limit(name):
            raise InvalidCheckpoint(source, f"{name} is larger than {size_limit(name)} bytes", file=name)
        with file.open("rb") as stream:
            refuse_stand_in(name, stream.read(BEGINNING), source)
    whole = sum(size for name, size in sizes.items() if not name.endswith(WEIGHTS))
    if whole > MAX_DESCRIPTION_BYTES:
        problem = f"its files beside the weights have {whole} bytes; {MAX_DESCRIPTION_BYTES} are allowed"
        raise InvalidCheckpoint(source, problem)
    if MODULES in sizes:
        module_entries(path / MODULES, source)
    if len(sizes) > MAX_DESCRIPTION_FILES:
        problem = f"it has {len(sizes)} files beside the weights; {MAX_DESCRIPTION_FILES} are allowed"
        raise InvalidCheckpoint(source, problem)


def refuse_code(name: str, content: Mapping[str, Any], source: str) -> None:
    """Raise InvalidCheckpoint where a configuration names code to run."""
    if content.get("auto_map"):
        raise InvalidCheckpoint(
            source, f"{name} has auto_map, which would run code from the checkpoint; this service never does"
        )


def has_library_class(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has the model's own class, so that code beside the checkpoint is not needed."""
    kind = model_type_of(config.get("model_type", ""))
    name = architecture_of(config)
    return kind is not None and (not name or name in kind.architectures)


def without_code(config: dict[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a model's configuration without the code that it names, and a note where it named some.

    Raises:
        InvalidCheckpoint: it names code, and transformers has no class of its own in its place.
    """
    if not config.get("auto_map") or not has_library_class(config):
        refuse_code("config.json", config, source)
        return config, ()
    note = f"config.json of {source} has auto_map: its code was not run, the class is transformers' own"
    return {key: value for key, value in config.items() if key != "auto_map"}, (note,)


def module_entries(file: Path, source: str) -> list[dict[str, Any]]:
    """Return the entries of a `modules.json`; `path` and `type` of each are text.

    Raises:
        InvalidCheckpoint: it is malformed, or the transformer lies in a sub-folder, as old versions saved it.
    """
    try:
        entries = parsed_json(read_file(file, source, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InvalidCheckpoint(source, f"{file.name} is not a JSON list of modules")
    for entry in entries:
        texts = [entry.get(key) for key in ("path", "type")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidCheckpoint(source, f"{file.name} has an entry without a path and a type")
    folder = entries[0]["path"]
    if folder and entries[0]["type"].endswith("Transformer"):
        problem = f"{file.name} says that its transformer lies in the folder {folder[:100]!r}, as old versions had it"
        advice = "save it anew by SentenceTransformer('IN').save_pretrained('OUT')"
        raise InvalidCheckpoint(source, f"{problem}; {advice}", file=file.name)
    return entries
