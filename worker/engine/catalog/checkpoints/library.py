"""Reads the table of transformers' models that `checkpoints.library_table` writes.

It has the names of classes, the tensors that each has, which of them are tied, and the meaning of a configuration's
missing keys. With it, code that must not import transformers decides the same as code that does.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

TABLE = Path(__file__).with_name("library.zip")
"""The table: one JSON file for each kind of model, so that only the needed one is read."""
LAYER = re.compile(
    r"(?P<stack>(?:.+?\.)??(?:layers|layer|h|blocks|block))\.(?P<number>[0-9]{1,6})\.(?P<inner>.+)", re.DOTALL
)
"""Matches the first number that follows the name of a list of layers: T5 has lists within its layers."""
LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers",
    "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
PRE_TRAINING = re.compile(r".*(ForPreTraining|ForMaskedLM|ForCausalLM|LMHeadModel|ForNextSentencePrediction)")
"""Matches names of classes that models are pre-trained as. Nothing reads their heads after fine-tuning."""
FLOAT = "__float__"
FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
OLDER_ROTARY = {
    "rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "global_rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor", "rotary_pct": "partial_rotary_factor",
    "rope_local_base_freq": "local_theta", "local_rope_theta": "local_theta", "rope_scaling": "rope_scaling",
}  # fmt: skip
"""Older keys of rotary positions, each with its name in `rope_parameters`, which now holds all of them."""
LOCAL_ATTENTION = "sliding_attention"

AUTO_CLASSES = "auto_classes"
"""Name of the table's file that has, for each class, the one that loads it."""
ACTIVATIONS = "activations"
"""Name of the table's file that lists the functions that a configuration may name."""
LAYER_TYPES = "layer_types"
"""Name of the table's file that lists the kinds of layers that a configuration may name."""
ROTARY = "rotary"
"""Name of the table's file that has, for each type of rotary positions, the parameters that it needs."""
TOKENIZERS = "tokenizers"
"""Name of the table's file of the classes of tokenizers, see `checkpoints.library_tokenizers`."""
ROTARY_UNKNOWN = "?"
"""Stands in a state for a type of rotary positions that transformers does not have."""
GATED = "gated"
"""Said of a key whose words are functions, which may follow `gated-`."""

Length = int | str | None
"""Length of an axis: a number, an expression of a configuration's keys as `2*a`, `a/b*c` or `a+b*c`, or None.

Products are computed from left to right, and a quotient has no fraction.
"""
FACTOR = re.compile(r"([*/]?)([^*/]+)")
"""Matches the factors of a term, each with the sign before it."""


@dataclass(frozen=True)
class Switch:
    """The key of a configuration that decides whether a class has a tensor, by the states of its values."""

    key: str
    on: frozenset[str]
    """States with which the class has the tensor; see `state_of`."""
    off: frozenset[str]
    """States with which it has not. Nothing is known of states in neither set."""


@dataclass(frozen=True)
class Refusals:
    """Values of a configuration that transformers refuses."""

    states: Mapping[str, Mapping[str, Mapping[str, str]]]
    """Maps a key, and a state of its value that is refused, to states of other keys; with one of them it is taken."""
    divides: Sequence[tuple[str, str]]
    """Pairs of keys whose first value must divide the second."""
    words: Mapping[str, str | Sequence[str]]
    """Maps a key to the words that it takes; `activations` or `gated` stands for the names of functions."""
    counts: Sequence[tuple[str, str]]
    """Pairs of a key that counts, or of a list, and a list that must have as many entries."""
    least: Sequence[tuple[str, str]]
    """Such pairs where a list may have more entries."""
    equals: Sequence[tuple[str, str]]
    """Pairs of a key and an expression of others that its value must equal."""


@dataclass(frozen=True)
class Architecture:
    """One class of transformers that has weights. In names, `{}` stands for the number of a layer."""

    name: str
    prefix: str
    """Prefix of the model below the head, which names in a checkpoint may lack."""
    ties: tuple[tuple[str, str, str | None], ...]
    """(copy, original, key): tensors that are one where the configuration's key is true, or always if it is None."""
    unsaved: frozenset[str]
    """Tensors that `save_pretrained` leaves out, because they follow from the configuration."""
    buffers: frozenset[str]
    untested: frozenset[str]
    """Keys that could not be varied when models were built, so that their effect on tensors is unknown."""
    unclear: Mapping[str, Sequence[str]]
    """Keys, such as lists, that change these tensors in a way that is not known."""
    optional: Mapping[str, Sequence[Length]]
    """Tensors that only some configurations have."""
    switched: Mapping[str, Sequence[Switch]]
    """Tensors of `optional` that follow keys: the class has such a tensor if all of its switches are on."""
    nulls: Mapping[str, str]
    """Expressions of the lengths that keys stand for where they are null."""
    refused: Refusals
    tensors: Mapping[str, Sequence[Length]]
    """Tensors that all configurations have."""
    layers: Mapping[str, Sequence[Length]]
    """Tensors that every layer of a list has."""
    converted: bool
    """Whether checkpoints have other tensor names than the model."""
    stored: Mapping[str, Sequence[str]]
    """Beginnings of names in the model, in whole words, each with those that names in a checkpoint may have instead."""
    embedding: str | None
    """The matrix that turns what the model reads into vectors, as the class itself says."""
    output: str | None
    """The matrix that gives logits of tokens, as the class itself says."""
    before: frozenset[str]
    """Tensors outside the layers that the model uses before them."""
    computed: frozenset[str]
    """Buffers that follow from the configuration, so that newer checkpoints do not have them."""

    @cached_property
    def all_names(self) -> frozenset[str]:
        return frozenset((*self.tensors, *self.layers, *self.optional, *self.targets, *self.buffers))

    @cached_property
    def targets(self) -> frozenset[str]:
        return frozenset(copy for copy, _, _ in self.ties)

    def reads(self, name: str) -> bool:
        """Return whether a model of the class has a tensor of this name."""
        layered = collapsed(name)
        return (
            name in self.tensors
            or layered in self.layers
            or layered in self.optional
            or name in self.targets
            or name in self.buffers
            or name in self.unsaved
        )

    def in_files(self, name: str) -> Iterator[str]:
        """Yield the names that a checkpoint may have for a tensor, or a module, of the model."""
        yield from in_files(name, self.stored)

    @cached_property
    def body(self) -> str:
        """What the names of tensors below the head begin with, which is nothing where the class itself is the model."""
        prefix = f"{self.prefix}."
        return prefix if any(name.startswith(prefix) for name in self.all_names) else ""

    @cached_property
    def names_in_model(self) -> Mapping[str, str]:
        """The names of tensors in checkpoints of other names than the model's, with `{}` as number of a layer."""
        return {file: name for name in sorted(self.all_names) for file in self.in_files(name) if file != name}

    @property
    def is_pre_training(self) -> bool:
        return PRE_TRAINING.fullmatch(self.name) is not None


@dataclass(frozen=True)
class ModelType:
    """One kind of model, by the `model_type` of its configuration."""

    model_type: str
    defaults: Mapping[str, Any]
    """All keys, each with the value that its absence means."""
    derived: Mapping[str, Mapping[str, Any]]
    """Keys whose missing value follows from other keys, each with the rule as far as it is known."""
    aliases: Mapping[str, str]
    """Other spellings of keys."""
    architectures: Mapping[str, Architecture]
    types: Mapping[str, Sequence[str]]
    """Types of JSON that keys take, for keys whose class refuses all others; see `type_name`."""
    items: Mapping[str, Sequence[str]]
    """Types of JSON of the entries of lists, for keys whose class refuses all others."""
    stages: str | None
    """The key that says how many stages a backbone has, as a number or by the length of a list; None if it is none."""
    fixed: frozenset[str]
    """Keys that no configuration may have, because the class works them out itself."""
    refused: Refusals


TYPE_NAMES: Mapping[type, str] = {
    bool: "bool", int: "int", float: "float", str: "text", type(None): "null", list: "list", dict: "object",
}  # fmt: skip


def type_name(value: Any) -> str:
    """Return the table's name of a JSON value's type."""
    return TYPE_NAMES[type(value)]


def model_type_of(model_type: str) -> ModelType | None:
    """Return the entry of a kind of model; None if transformers does not have it."""
    return _kind(model_type) if isinstance(model_type, str) else None


@lru_cache(maxsize=1)
def _table() -> ZipFile:
    """Read the table into memory, because copies of a process would share a file's position. This takes 10 ms."""
    return ZipFile(BytesIO(TABLE.read_bytes()))


@lru_cache(maxsize=64)
def _kind(model_type: str) -> ModelType | None:
    try:
        content = json.loads(_table().read(member(model_type)))
    except KeyError:
        return None
    architectures = {
        name: Architecture(
            name=name,
            prefix=found["prefix"],
            ties=tuple((copy, original, key) for copy, original, key in found.get("ties", ())),
            unsaved=frozenset(found.get("unsaved", ())),
            buffers=frozenset(found.get("buffers", ())),
            untested=frozenset(found.get("untested", ())),
            unclear=found.get("unclear", {}),
            optional=found.get("optional", {}),
            switched={
                tensor: tuple(Switch(key, frozenset(on), frozenset(off)) for key, on, off in switches)
                for tensor, switches in found.get("switched", {}).items()
            },
            nulls=found.get("nulls", {}),
            refused=_refusals(found),
            tensors=found.get("tensors", {}),
            layers=found.get("layers", {}),
            converted=found.get("converted", False),
            stored=found.get("stored", {}),
            embedding=found.get("embedding"),
            output=found.get("output"),
            before=frozenset(found.get("before", ())),
            computed=frozenset(found.get("computed", ())),
        )
        for name, found in content["architectures"].items()
    }
    return ModelType(
        model_type,
        decoded(content["defaults"]),
        content["derived"],
        content["aliases"],
        architectures,
        content["types"],
        content.get("items", {}),
        content.get("stages"),
        frozenset(content["fixed"]),
        _refusals(content),
    )


def _refusals(content: Mapping[str, Any]) -> Refusals:
    divides = tuple((divisor, multiple) for divisor, multiple in content.get("divides", ()))
    counts, least, equals = (tuple(map(tuple, content.get(key, ()))) for key in ("counts", "least", "equals"))
    return Refusals(content.get("refused", {}), divides, content.get("words", {}), counts, least, equals)


def member(model_type: str) -> str:
    """Return the name of the table's file for this kind."""
    return f"{model_type}.json"


def architecture(config: Mapping[str, Any], name: str) -> Architecture | None:
    """Return the entry of a class; None if transformers does not have it for this kind of model."""
    kind = model_type_of(config.get("model_type", ""))
    return kind.architectures.get(name) if kind else None


def collapsed(name: str) -> str:
    """Return a tensor's name with `{}` in place of its layer's number."""
    match = LAYER.fullmatch(name)
    return f"{match['stack']}.{{}}.{match['inner']}" if match else name


def in_files(name: str, stored: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the names that a checkpoint may have for what is `name` in a model, see `Architecture.stored`."""
    layer, found = LAYER.fullmatch(name), collapsed(name)
    start = max((start for start in stored if f"{found}.".startswith(f"{start}.")), key=len, default=None)
    for other in () if start is None else stored[start]:
        renamed = other + found.removeprefix(start or "")
        yield renamed.replace("{}", layer["number"]) if layer else renamed
    if start is None:
        yield name


# --- configurations ---------------------------------------------------------------------------------------


def decoded(value: Any) -> Any:
    """Decode floats that JSON cannot hold, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT} and isinstance(value[FLOAT], str) and value[FLOAT] in FLOATS:
            return FLOATS[value[FLOAT]]
        return {key: decoded(one) for key, one in value.items()}
    return [decoded(one) for one in value] if isinstance(value, list) else value


def encoded(value: Any) -> Any:
    """Invert `decoded`, for files that every JSON reader accepts."""
    if isinstance(value, float):
        name = next((name for name, known in FLOATS.items() if repr(known) == repr(value)), None)
        return value if name is None else {FLOAT: name}
    if isinstance(value, Mapping):
        return {key: encoded(one) for key, one in value.items()}
    return [encoded(one) for one in value] if isinstance(value, list | tuple) else value


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the missing keys of a configuration, in the spelling of newer versions of transformers.

    A missing key stays missing if it follows from others in a way that is not known here.
    """
    kind = model_type_of(config.get("model_type", ""))
    known = {kind.aliases.get(key, key) if kind else key: value for key, value in config.items()}
    if kind:
        known |= {key: value for key, value in config.items() if key not in kind.aliases}
    known = with_rotary(known, kind.defaults.get("rope_parameters") if kind else None)
    if kind is None:
        return known
    filled = dict(known)
    for key, default in kind.defaults.items():
        own = known.get(key)
        if isinstance(default, Mapping) and "model_type" in default:
            if isinstance(own, Mapping):
                filled[key] = completed({"model_type": default["model_type"], **own})
            elif own is None and key not in kind.derived:
                filled[key] = completed(default)
        elif key in kind.derived:
            if own is None:
                filled.pop(key, None)
        elif key not in known:
            filled[key] = default
    for key, rule in kind.derived.items():
        if key not in filled:
            value = _derived(rule, filled, kind)
            if value is not None:
                filled[key] = value
    return filled


def _derived(rule: Mapping[str, Any], config: Mapping[str, Any], kind: ModelType) -> Any:
    """Return the value that a missing key stands for; None if that is not known."""
    if "is" in rule:
        return value_of(rule["is"], config)
    if "words" in rule:
        return rule["words"].get(state_of(config.get(rule["by"][0])))
    period = rule.get("period")
    others = [key for key in rule["by"] if key not in LAYER_KEYS]
    count = next((config[key] for key in LAYER_KEYS if key in rule["by"] and type(config.get(key)) is int), None)
    if not period or count is None or any(config.get(key) != kind.defaults.get(key) for key in others):
        return None
    return [period[place % len(period)] for place in range(min(count, 10_000))]


def with_rotary(config: Mapping[str, Any], default: Any = None) -> dict[str, Any]:
    """Write rotary positions as newer versions of transformers do: one object of all their parameters.

    Args:
        default: the object to use where the configuration says nothing.
    """
    known = dict(config)
    if "rope_type" in known:  # `rope_parameters` itself
        return known
    keys = [key for key in OLDER_ROTARY if key in known and (default is None or not _is_own(key, default))]
    older = {OLDER_ROTARY[key]: known.pop(key) for key in keys}
    older = {key: value for key, value in older.items() if value is not None}
    scaling = older.pop("rope_scaling", None)
    local = older.pop("local_theta", None)
    given = known.get("rope_parameters")
    if default is None and given is None and not older and not scaling:
        return known
    scaling = dict(scaling) if isinstance(scaling, Mapping) else {}
    if "type" in scaling:
        scaling = {"rope_type": scaling.pop("type"), **scaling}
    if isinstance(default, Mapping) and any(isinstance(part, Mapping) for part in default.values()):
        given = given if isinstance(given, Mapping) else {}
        known["rope_parameters"] = {
            kind: {
                **part,
                **({} if kind == LOCAL_ATTENTION else {**older, **scaling}),
                **({"rope_theta": local} if kind == LOCAL_ATTENTION and local is not None else {}),
                **(given.get(kind) or {}),
            }
            for kind, part in default.items()
            if isinstance(part, Mapping)
        }
    elif given is None or isinstance(given, Mapping):
        absent = default if isinstance(default, Mapping) else {"rope_type": "default"}
        # transformers takes `rope_scaling` in place of `rope_parameters` where both are there.
        known["rope_parameters"] = {**absent, **older, **(scaling or given or {})}
    return known


def _is_own(key: str, default: Any) -> bool:
    """Return whether newer versions still keep the key outside the object of rotary parameters."""
    return key == "partial_rotary_factor" and not (isinstance(default, Mapping) and key in default)


def value_of(length: Length, config: Mapping[str, Any]) -> int | None:
    """Return the length of an axis; None if the configuration does not give it."""
    if not isinstance(length, str):
        return length
    total = 0
    for term in length.split("+"):
        found = 1
        for sign, part in FACTOR.findall(term):
            value = int(part) if part.isdecimal() else value_at(config, part)
            if type(value) is not int or (sign == "/" and not value):
                return None
            found = found // value if sign == "/" else found * value
        total += found
    return total


def with_nulls(found: Architecture, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the lengths that keys of a completed configuration stand for where they are null."""
    lengths = {key: value_of(rule, config) for key, rule in found.nulls.items() if config.get(key) is None}
    return {**config, **lengths} if lengths else config


def state_of(value: Any) -> str:
    """Return the state of a configuration's value: what the table tells apart of it, beside its size."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        if value <= 0:
            return "zero" if value == 0 else "negative"
        return "share" if value < 1 else "one" if value == 1 else "number"
    if isinstance(value, Mapping):
        kind = value.get("rope_type")
        return f"rotary {kind}" if isinstance(kind, str) else "object"
    return f"'{value}'" if isinstance(value, str) else "list" if value else "empty"


@lru_cache(maxsize=1)
def tokenizer_table() -> dict[str, Any]:
    """Return what the table says of tokenizers, see `checkpoints.library_tokenizers.tokenizers_of_library`."""
    found: dict[str, Any] = json.loads(_table().read(TOKENIZERS))
    return found


@lru_cache(maxsize=1)
def auto_classes() -> Mapping[str, str]:
    """Return the names of classes, each with that of the class that loads it, as `AutoModelForMaskedLM`."""
    found: Mapping[str, str] = json.loads(_table().read(AUTO_CLASSES))
    return found


@lru_cache(maxsize=1)
def activations() -> frozenset[str]:
    """Return the names of all activation functions that a configuration may name."""
    return frozenset(json.loads(_table().read(ACTIVATIONS)))


@lru_cache(maxsize=1)
def layer_types() -> frozenset[str]:
    """Return the names of all kinds of layers that a configuration may name."""
    return frozenset(json.loads(_table().read(LAYER_TYPES)))


@lru_cache(maxsize=1)
def rotary_types() -> Mapping[str, Sequence[str]]:
    """Return the types of rotary positions, each with the names of the parameters that it needs."""
    found: Mapping[str, Sequence[str]] = json.loads(_table().read(ROTARY))
    return found


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value of a key, with inner keys after a dot; None if it is missing."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None  # type: ignore[assignment]
    return config


def ties(found: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (copy, original) of the tensors that a completed configuration makes one."""
    for copy, original, key in found.ties:
        if key is None or value_at(config, key):
            yield copy, original


def says_untied(config: Mapping[str, Any], key: str) -> str:
    """Say in words that a configuration ties no matrices by this key, or that the library's default does not."""
    is_said = value_at(config, key) is not None
    return f"its configuration says {key}: false" if is_said else f"its configuration has no {key}, which is then false"


def others_of(kind: ModelType, names: Collection[str]) -> list[Architecture]:
    """Return the classes of this kind that have one of these tensors."""
    return [one for one in kind.architectures.values() if any(one.reads(name) for name in names)]
