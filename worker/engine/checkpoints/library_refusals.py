"""Finds the values of a configuration that transformers refuses, for the table that `library_table` writes.

A value counts as refused if it is refused beside the default values, and beside other values of as many switches as can
be changed together. If another value of one switch makes it taken, the table names that switch.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path as File
from typing import Any, get_args

from transformers.activations import ACT2FN

from worker.engine.catalog.checkpoints.library import (
    ACTIVATIONS,
    GATED,
    LAYER_KEYS,
    ROTARY_UNKNOWN,
    state_of,
    type_name,
)
from worker.engine.catalog.checkpoints.settings import DROPOUT
from worker.engine.checkpoints.library_variations import (
    PARTS_OF_WIDTHS,
    WORDS,
    Changes,
    Config,
    Path,
    Trial,
    is_list_of,
)

NO_WORD = "nosuchword"
TEXT = re.compile(r"""['"]([A-Za-z][A-Za-z0-9_-]{1,30})['"]""")
NOT_TRIED = ("architectures", "dtype", "id2label", "label2id", "transformers_version")
"""Keys that are checked by rules of their own."""
NOT_MULTIPLIED = (*LAYER_KEYS, "num_labels")
"""Keys of numbers that give a model many more parts when they grow."""
ROTARY_VALUES: Mapping[str, Any] = {
    "rope_theta": 10_000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "short_factor": [1.0], "long_factor": [1.0],
}  # fmt: skip
"""Parameters of rotary positions that every type takes."""


def refusals(
    trial: Trial, types: Mapping[str, Sequence[str]], rotary: Iterable[str], words: Mapping[str, Sequence[str]]
) -> Config:
    """Return what is refused near the trial's configuration, see `library.Refusals`.

    Args:
        types: types of values, for keys that take no other; values of others are not tried.
        rotary: types of rotary positions.
        words: for keys, the words that they may take; each is tried.
    """
    refused: dict[str, dict[str, dict[str, str]]] = {}
    divides, taken = [], {}
    for path in trial.paths:
        where, value = ".".join(path), trial.at(path)
        if path[-1] in NOT_TRIED or DROPOUT.fullmatch(path[-1]):
            continue
        # Inner configurations are kinds of their own, whose entries have what they refuse.
        for other in extremes(trial, path, rotary) if len(path) == 1 else ():
            if type_name(other) not in types.get(where, (type_name(other),)):
                continue
            unless = refused_unless(trial, path, other)
            if unless is not None:
                refused.setdefault(where, {})[state_of(other)] = unless
        if is_width(path, value):
            divides += [[where, ".".join(multiple)] for multiple in multiples(trial, path)]
        known = taken_words(trial, path, value, words)
        if known:
            taken[where] = known
    counts, least = counted_lists(trial)
    return {
        "refused": refused,
        "divides": divides,
        "words": taken,
        "counts": counts,
        "least": least,
        "equals": equal_numbers(trial),
    }


def counted_lists(trial: Trial) -> tuple[list[list[str]], list[list[str]]]:
    """Return `counts` and `least` of the table, see `library.Refusals`."""
    counts: list[list[str]] = []
    least: list[list[str]] = []
    for path in trial.paths:
        value = trial.at(path)
        count = len(value) if isinstance(value, list) else value
        if type(count) is not int or count < 2 or len(path) > 1:
            continue
        less = value[:-1] if isinstance(value, list) else count - 1
        lists = {other: one for other in trial.paths if other != path and is_list_of(one := trial.at(other), count)}
        shorter: dict[Path, Any] = {other: one[:-1] for other, one in lists.items()}
        if not lists or trial.takes({**shorter, path: value}) or not trial.takes({**shorter, path: less}):
            continue
        for left, whole in lists.items():
            one_shorter = trial.takes({**lists, left: shorter[left], path: value})
            one_whole = trial.takes({**shorter, left: whole, path: less})
            pair = [path[0], ".".join(left)]
            if isinstance(value, list) and pair[::-1] in (*counts, *least):
                continue
            if not one_shorter:
                (least if one_whole else counts).append(pair)
    return counts, least


def equal_numbers(trial: Trial) -> list[list[str]]:
    """Return pairs of a key and the quotient of two others that its value must equal."""
    numbers = {path: one for path in trial.paths if len(path) == 1 and type(one := trial.at(path)) is int and one > 1}
    found = []
    for path, own in numbers.items():
        if trial.takes({path: 2 * own}):
            continue
        for (one, a), (other, b) in product(numbers.items(), numbers.items()):
            if one in (path, other) or other == path or a // b != own or a % b:
                continue
            taken: list[Changes] = [{one: 2 * a, path: 2 * own}, {one: 2 * a, other: 2 * b, path: own}]
            refused: list[Changes] = [{one: 2 * a, path: own}, {other: 2 * b, path: own}]
            if all(map(trial.takes, taken)) and not any(map(trial.takes, refused)):
                found.append([path[0], f"{one[0]}/{other[0]}"])
    return found


def refused_too(trial: Trial, known: Config) -> Config:
    """Return what of the refusals of one class of a kind holds for another; all are of the layers that both have."""
    values = {state_of(other): other for other in (None, True, False, -1, 0, -0.5, 0.5, 1.0, 1.5)}
    refused = {
        where: {
            state: unless
            for state, unless in states.items()
            if state in values and (path := path_of(trial, where)) and not trial.takes({path: values[state]})
        }
        for where, states in known["refused"].items()
        if where != "rope_parameters"
    }
    if "rope_parameters" in known["refused"]:
        refused["rope_parameters"] = known["refused"]["rope_parameters"]
    divides = [
        pair
        for pair in known["divides"]
        if (path := path_of(trial, pair[0])) and not trial.takes({path: trial.non_divisor()})
    ]
    words = {
        where: taken
        for where, taken in known["words"].items()
        if (path := path_of(trial, where)) and not trial.takes({path: NO_WORD})
    }
    return {**known, "refused": refused, "divides": divides, "words": words}


def path_of(trial: Trial, where: str) -> Path | None:
    """Return the path of a key, if the trial's configuration has it."""
    path = tuple(where.split("."))
    return path if path in trial.paths else None


def extremes(trial: Trial, path: Path, rotary: Iterable[str]) -> Iterator[Any]:
    """Yield values that are unusual for a key, one for each state that they may be in."""
    value = trial.at(path)
    if isinstance(value, bool):
        yield from (not value, None)
    elif isinstance(value, int):
        yield from (-1, 0, None)
    elif isinstance(value, float):
        yield from (-0.5, 0.0, 0.5, 1.0, 1.5, None)
    elif value is None:
        yield from (True, -1, 0)
    elif path[-1] == "rope_parameters" and isinstance(value, dict):
        is_nested = any(isinstance(part, dict) for part in value.values())
        # Of a class with a type of its own, which this list lacks, no type is known to be refused.
        is_listed = value.get("rope_type", "default") in ("default", *rotary)
        for name in ("default",) if is_nested else (*rotary, *((ROTARY_UNKNOWN,) if is_listed else ())):
            factors = [1.0] * rotary_pairs(trial, path, value)
            lists = {"short_factor": factors, "long_factor": factors}
            yield {**({} if is_nested else value), **ROTARY_VALUES, **lists, "rope_type": name}
    else:
        yield None


def rotary_pairs(trial: Trial, path: Path, rotary: Mapping[str, Any]) -> int:
    """Return how many pairs of numbers rotary positions turn in an attention head, as far as it can be told; else 1."""
    config = trial.config if len(path) == 1 else trial.config[path[0]]
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    width = config.get("head_dim") or (width // heads if type(width) is int and type(heads) is int and heads else 2)
    share = rotary.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    return max(int(width * share) // 2, 1)


def refused_unless(trial: Trial, path: Path, value: Any) -> dict[str, str] | None:
    """Return the switches, each with its other state, that make a refused value taken; None if it is not refused."""
    if trial.takes({path: value}):
        return None
    turned = {other: one for other, one in trial.turned.items() if other != path}
    if not trial.takes({**turned, path: value}) and trial.takes(turned):
        return {}
    found = {other: one for other, one in turned.items() if trial.takes({other: one, path: value})}
    return {".".join(other): state_of(one) for other, one in found.items()} or None


def is_size(key: str) -> bool:
    """Return whether a number may grow; a model would have many more layers, or no row for a token's id."""
    return key not in NOT_MULTIPLIED and not key.endswith("_token_id")


def is_width(path: Path, value: Any) -> bool:
    return type(value) is int and value > 1 and any(part in path[-1] for part in PARTS_OF_WIDTHS)


def multiples(trial: Trial, path: Path) -> list[Path]:
    """Return the keys whose values the value of a key must divide."""
    prime, own = trial.non_divisor(), trial.at(path)
    turned = {other: one for other, one in trial.turned.items() if other != path}
    if trial.takes({path: prime}) or trial.takes({**turned, path: prime}):
        return []
    numbers = {
        other: number
        for other in trial.paths
        if other != path and is_size(other[-1]) and type(number := trial.at(other)) is int and number > 1
    }
    grown: dict[Path, Any] = {other: number * prime for other, number in numbers.items() if number % own == 0}
    fitting: dict[Path, Any] = {other: 1 for other, number in numbers.items() if number < own and own % number == 0}
    for beside in (fitting, {}):
        if trial.takes({**beside, **grown, path: prime}):
            without = ({other: one for other, one in grown.items() if other != left} for left in grown)
            return [
                left
                for left, rest in zip(grown, without, strict=True)
                if not trial.takes({**beside, **rest, path: prime})
            ]
    return []


def taken_words(trial: Trial, path: Path, value: Any, words: Mapping[str, Sequence[str]]) -> str | list[str] | None:
    """Return the words that a key takes, or the name of a list of functions; None if it takes any word."""
    if path[-1] == "model_type":  # a part of a model may be of any kind, and only some were tried
        return None
    known = words.get(path[-1], ())
    if not isinstance(value, str) and not (value is None and known):
        return None
    if refused_unless(trial, path, NO_WORD) != {}:
        return None
    if path[-1] in WORDS or value in ACT2FN:
        if trial.takes({path: "gated-silu"}) and not trial.takes({path: f"gated-{NO_WORD}"}):
            return GATED
        if all(trial.takes({path: name}) for name in ("silu", "tanh", "gelu_new")):
            return ACTIVATIONS
    found = [word for word in known if trial.takes({path: word})]
    return found if value is None or value in found else None


def words_of(hint: Any) -> list[str]:
    """Return the words that a type hint lists."""
    if isinstance(hint, str):
        return [hint]
    return [word for one in get_args(hint) for word in words_of(one)]


@cache
def words_in_code(module: str) -> list[str]:
    """Return the texts in the files of a kind of model that may be words of its configuration."""
    folder = File(sys.modules[module].__file__ or "").parent
    files = [*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")]
    return sorted({word for file in files for word in TEXT.findall(file.read_text(encoding="utf-8"))})
