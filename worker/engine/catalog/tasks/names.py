"""Names of a head's labels, in config.json and in the rows of data sets."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d{0,300})?([eE][+-]?\d{1,3})?", re.ASCII)
BARE = re.compile(r"(?:label[ _-]?)?(\d{1,9})", re.ASCII | re.IGNORECASE)
"""A name that is only an id, as transformers gives to labels without names."""
DIGITS = re.compile(r"(?<!\d)\d{1,9}(?!\d)", re.ASCII)
LONGEST_NAME = 1000  # characters of a name that is compared in other spellings
SHOWN_NAME = 64


def normal(name: str) -> str:
    """Return a name in lower case, with one space for any of spaces, `_` and `-` between letters or digits.

    A text that is too long for a label's name stays unchanged, because normalising accents takes quadratic time.
    """
    if len(name) > LONGEST_NAME:
        return name
    folded = unicodedata.normalize("NFKC", name).casefold().strip(" \t\r\n_")
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", folded)


def are_bare(names: Iterable[tuple[str, int]]) -> bool:
    """Return whether every name is just its own id."""
    return all((found := BARE.fullmatch(name.strip())) and int(found[1]) == index for name, index in names)


def labels_in(info: CheckpointInfo, key: str) -> dict[str, Any]:
    """Return a table of labels, `id2label` or `label2id`. Raises InvalidCheckpoint where it is no object."""
    labels = info.config.get(key) or {}
    if not isinstance(labels, dict):
        raise InvalidCheckpoint(info.source, f"config.json has {key} that is no object")
    return labels


def label_ids(info: CheckpointInfo, outputs: int) -> tuple[dict[str, int], str]:
    """Return name → id, from id2label and label2id or else transformers' own names; and how the two tables differ.

    A table with transformers' own names, `LABEL_0` and so on, does not count if the other has names.
    """
    of_ids = [(str(name), index) for index, name in labels_in(info, "id2label").items()]
    of_names = list(labels_in(info, "label2id").items())
    named = [(key, table) for key, table in (("id2label", of_ids), ("label2id", of_names)) if table]
    tables = {key: _with_ids(info, key, table, outputs) for key, table in named}
    with_names = {key: table for key, table in tables.items() if not are_bare(table)}
    used = list((with_names or tables).values())
    if not used:
        return {f"LABEL_{index}": index for index in range(outputs)}, ""
    contradiction = _differently_named(*used) if len(used) == 2 else _named_twice(used[0])
    return {name: index for table in used for name, index in table}, contradiction


def _with_ids(info: CheckpointInfo, key: str, table: list[tuple[str, Any]], outputs: int) -> list[tuple[str, int]]:
    found = []
    for name, index in table:
        number = str(index)
        if not (number.isdecimal() and len(number) < 10 and int(number) < outputs):
            problem = f"config.json has {key} '{name[:SHOWN_NAME]}' = {number[:20]}; ids are 0 to {outputs - 1}"
            raise InvalidCheckpoint(info.source, problem)
        found.append((name, int(number)))
    return found


def _named_twice(table: list[tuple[str, int]]) -> str:
    ids: dict[str, int] = {}
    for name, index in table:
        if ids.setdefault(name, index) != index:
            return f"'{name[:SHOWN_NAME]}' is both the label {ids[name]} and the label {index}"
    return ""


def _differently_named(of_ids: list[tuple[str, int]], of_names: list[tuple[str, int]]) -> str:
    """Say where label2id contradicts id2label; it may have further names of the same ids."""
    named_by_id: dict[str, set[int]] = defaultdict(set)
    for name, index in of_ids:
        named_by_id[normal(name)].add(index)
    known = {(normal(name), index) for name, index in of_names}
    first_name = {index: name for name, index in reversed(of_ids)}
    for name, index in of_names:
        others = named_by_id.get(normal(name))
        if others and index not in others:
            return f"'{name[:SHOWN_NAME]}' is the label {min(others)} in id2label, and {index} in label2id"
        other = first_name.get(index)
        if not others and other is not None and (normal(other), index) not in known:
            return f"the label {index} is '{other[:SHOWN_NAME]}' in id2label, and '{name[:SHOWN_NAME]}' in label2id"
    return _named_twice(of_ids)


def number_in(label: Any) -> float | None:
    """Return the finite number that a label is, or that its text spells; None if it is something else."""
    if isinstance(label, bool) or (isinstance(label, str) and not NUMBER.fullmatch(label.strip())):
        return None
    try:
        value = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
