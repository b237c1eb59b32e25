"""Turns paths of this machine in a recipe, as users of mergekit write them, into references that the service knows.

A service only reads its local roots, and does not say where they are; who runs the command line on its machine knows.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from app.contracts.models import GivenStatistics
from app.contracts.references import is_reference

MERGEKIT_KEYS = frozenset({"model", "base_model", "tokenizer_source", "source"})
OWN_KEYS = frozenset({"checkpoint", "base", "source", *GivenStatistics.model_fields})
WORDS = ("base", "union")
"""Words that a recipe may have in place of a tokenizer's source."""


Upload = Callable[[Path], str]
"""Sends a file or folder of this machine to the service, and returns its reference."""


@dataclass(frozen=True)
class _Service:
    """What a service can read of this machine."""

    roots: Sequence[Path]
    usable: Callable[[Path, Path], bool]
    """Returns whether what lies at a path (the second argument) may be read under a root."""
    upload: Upload | None


class PathError(ValueError):
    """A path cannot become a reference; the message names the field and the path, and says what to do."""


def with_references(
    recipe: Any, roots: Sequence[Path], *, follows_links: bool = False, upload: Upload | None = None
) -> Any:
    """Return the recipe, mergekit's or our own, with `local:PATH` for each folder or file of this machine in it.

    As in mergekit, a name that exists as a path from the working directory is that path, and else a name on the hub.

    Args:
        roots: local roots of the service, as its settings have them.
        follows_links: whether a root is passed over where links lead out of it, which the service would refuse.
        upload: sends a path that lies under no root to the service, once; None where such a path is refused.

    Raises:
        PathError: a path does not exist, or lies under no root.
    """
    if not isinstance(recipe, dict):
        return recipe
    keys = MERGEKIT_KEYS if "merge_method" in recipe else OWN_KEYS
    service = _Service(roots, _holds if follows_links else _is_above, upload and cache(upload))
    return _walked(recipe, keys, "", lambda field, name: _references(field, name, service))


def taken_for_the_hubs(recipe: Any, fields: Collection[str]) -> list[str]:
    """Return the names in these fields of a recipe of mergekit that are no references or paths of this machine."""
    found: list[str] = []

    def look(field: str, name: str) -> str:
        found.extend(part for part in name.split("+") if field in fields)
        return name

    if isinstance(recipe, dict) and "merge_method" in recipe:
        _walked(recipe, MERGEKIT_KEYS, "", look)
    return [name for name in dict.fromkeys(found) if name and name not in WORDS and not is_reference(name)]


def _walked(value: Any, keys: frozenset[str], field: str, reference: Callable[[str, str], str]) -> Any:
    if isinstance(value, list):
        return [_walked(one, keys, f"{field}.{index}", reference) for index, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        where = f"{field}.{key}".removeprefix(".")
        is_name = key in keys and isinstance(inner, str)
        found[key] = reference(where, inner) if is_name else _walked(inner, keys, where, reference)
    return found


def _is_above(root: Path, path: Path) -> bool:
    return path.is_relative_to(root)


def _holds(root: Path, path: Path) -> bool:
    """Return whether a file, or a folder with its entries, lies under a root, whatever links it is made of."""
    real, entries = root.resolve(), path.iterdir() if path.is_dir() else ()
    return path.is_relative_to(root) and all(one.resolve().is_relative_to(real) for one in (path, *entries))


def _references(field: str, name: str, service: _Service) -> str:
    """Return the reference of a model, or of a model and its adapter (`BASE+ADAPTER`)."""
    if name in WORDS or not name or "\0" in name:
        return name
    if Path(name).exists():
        return _reference(field, name, service)
    return "+".join(_reference(field, part, service) for part in name.split("+"))


def _reference(field: str, name: str, service: _Service) -> str:
    if is_reference(name):
        return name
    path = Path(os.path.abspath(Path(name).expanduser()))  # not resolved: the service follows links itself
    if not path.exists():
        if name.startswith(("/", ".", "~")):
            raise PathError(f"{field}: there is no '{name}' on this machine")
        return name
    given = [Path(os.path.abspath(root.expanduser())) for root in service.roots]
    for number, root in enumerate(given):
        if not service.usable(root, path):
            continue
        relative = path.relative_to(root)
        earlier = next((other for other in given[:number] if (other / relative).exists()), None)
        if earlier is not None:
            raise PathError(
                f"{field}: '{name}' is local:{relative} of {root}, but {earlier}, which goes first, has one too"
            )
        return f"local:{relative}"
    if service.upload is not None:
        return service.upload(path)
    where = (
        f"under none of {', '.join(map(str, service.roots))}" if service.roots else "and no local root is known here"
    )
    raise PathError(
        f"{field}: '{name}' is a path of this machine, {where}; give --local-root DIR, a folder above it that the "
        "service was started with as --local-root, or --upload to send it, or write hf:NAME if it is a name on the hub"
    )
