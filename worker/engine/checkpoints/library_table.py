"""Writes the table of transformers' models, for code that must not import transformers.

`python -m worker.engine.checkpoints.library_table` writes `catalog/checkpoints/library.zip`. The tensors of a class
depend on its configuration in ways that only its code tells. So each class is built, without memory for weights, from
many configurations that differ from the default in one key. The table has whatever holds for all of them.
"""

import json
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import torch
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from worker.engine.catalog.checkpoints.config_differences import HARMLESS, is_of_training
from worker.engine.catalog.checkpoints.library import (
    ACTIVATIONS,
    LAYER_KEYS,
    TABLE,
    Length,
    collapsed,
    in_files,
    member,
    value_at,
)
from worker.engine.catalog.checkpoints.tensor_names import layer_of
from worker.engine.runtime.libraries import conversion_mapping, core_model_loading, preload, transformers

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Path = tuple[str, ...]

FEW_LAYERS = 2
DEFAULT_LABELS = 2
FACTORS = (2, 3, 4)
"""Factors by which lengths may be multiples of sizes."""
KIND_KEYS = (
    "attn_layer", "hybrid", "pattern", "_period", "_offset", "sparse_step",
    "first_k_dense", "mlp_only", "moe_layer", "cross_attention_layers", "full_attn_idxs", "dense_layers",
    "lorb", "kv_source", "kv_shared", "per_layer", "interleave", "every",
)  # fmt: skip
"""Parts of names of keys that may give layers different tensors, which a change of one key may not show."""
DERIVED_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "transformers_version")
"""Keys that follow from the number of layers."""
LONGEST_LIST = 128
"""Largest number of layers for which lists over layers are compared, to find their period."""
WORDS: Mapping[str, tuple[str, ...]] = {"feed_forward_proj": ("gated-gelu", "relu"), "ffn_type": ("gated-gelu",)}
"""Settings in words that change the set of tensors."""
BLOCKS = (
    "attention",
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "mamba",
    "conv",
    "hybrid",
    "recurrent",
)
LAYER_WORDS: Mapping[str, tuple[str, ...]] = {
    "layer_types": (*BLOCKS, "chunked_attention", "moe", "mlp"),
    "layers_block_type": (*BLOCKS, "recurrent", "moe", "mlp"),
    "mlp_layer_types": ("dense", "sparse"),
}
"""Keys of lists over layers, each with the kinds of layers that it may name."""
SHOWN = frozenset({"head_dim", "n_inner", "n_ctx"})
"""Keys that may differ between checkpoints, because shapes show them."""


PLAIN_TYPES: Mapping[Any, str] = {
    bool: "bool", int: "int", float: "float", str: "text", NoneType: "null", list: "list", tuple: "list",
    dict: "object",
}  # fmt: skip
"""Names of JSON's types, by Python's."""
SAMPLES: Mapping[str, tuple[Any, ...]] = {
    "bool": (True, False), "int": (0, 1, 3), "float": (0.0, 0.5, 3.0), "text": ("x", ""), "null": (None,),
    "list": ([], [1], [1, 1], ["x"]), "object": ({}, {"x": 1}),
}  # fmt: skip
"""Values of each type."""


@dataclass
class Seen:
    """Counts of the tensors and lists of layers in the models of one class that were built so far."""

    models: int = 0
    outer: dict[str, int] = field(default_factory=dict)
    """Number of models that have the tensor."""
    stacks: dict[str, int] = field(default_factory=dict)
    """Number of models that have the list of layers."""
    inner: dict[tuple[str, str], int] = field(default_factory=dict)
    """Number of models that have the tensor in every layer of the list."""
    inner_somewhere: set[tuple[str, str]] = field(default_factory=set)


def main(model_types: Sequence[str]) -> None:
    """Write the table, or print its entries for some kinds of model."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    preload()
    entries = filter(None, map(described, model_types or sorted(transformers.CONFIG_MAPPING)))
    if model_types:
        for entry in entries:
            sys.stdout.write(as_json(entry) + "\n")
            sys.stdout.flush()
    else:
        write(entries)


def as_json(entry: Config) -> str:
    return json.dumps(entry, separators=(",", ":"))


def write(entries: Iterable[Config]) -> None:
    """Write the table with the version of transformers; the same entries give the same bytes."""
    with ZipFile(TABLE, "w", ZIP_DEFLATED) as table:
        table.comment = f"transformers {transformers.__version__}".encode()
        table.writestr(ZipInfo(ACTIVATIONS), json.dumps(sorted(ACT2FN)), ZIP_DEFLATED)
        for entry in entries:
            table.writestr(ZipInfo(member(entry["model_type"])), as_json(entry), ZIP_DEFLATED)


def described(model_type: str) -> Config | None:
    """Make one entry of the table; None if the configuration of the kind has no defaults."""
    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
        defaults = plain(config_class())
    except Exception:  # kinds made of others, which have no configuration of their own
        return None
    found: Config = {
        "model_type": model_type,
        "defaults": defaults,
        "derived": derived_of(config_class, defaults),
        "aliases": dict(getattr(config_class, "attribute_map", {})),
        "types": types_of(config_class),
        "architectures": {},
    }
    for name in sorted(classes_of(model_type)):
        built = architecture(name, config_class, defaults)
        if built is not None:
            found["architectures"][name] = built
    return found


def classes_of(model_type: str) -> set[str]:
    """Return the names of the classes that any Auto class makes for this kind of model."""
    auto = sys.modules["transformers.models.auto.modeling_auto"]
    found: set[str] = set()
    for mapping in (name for name in vars(auto) if name.endswith("MAPPING_NAMES") and name.startswith("MODEL")):
        named = getattr(auto, mapping).get(model_type, ())
        found |= {named} if isinstance(named, str) else set(named)
    return found


def plain(config: Any) -> Config:
    """Return the whole configuration as `save_pretrained` would write it."""
    return dict(json.loads(json.dumps(type(config)._encode_special_floats(config.to_dict()), default=str)))


# --- missing keys of configurations -----------------------------------------------------------------------


def derived_of(config_class: Any, defaults: Config) -> Config:
    """Find keys whose default follows from others: `{key: {"by": keys, "is": expression, "period": list}}`."""
    by: dict[str, set[str]] = {}
    samples = [defaults]
    for key, value in defaults.items():
        for other in variations(key, value):
            try:
                varied = plain(config_class(**{key: other}))
            except Exception:  # noqa: S112 - there is no such model
                continue
            samples.append({**varied, key: other})
            for name in varied.keys() | defaults.keys():
                if name != key and varied.get(name) != defaults.get(name):
                    by.setdefault(name, set()).add(key)
    found = {}
    for name, keys in sorted(by.items()):
        rule: Config = {"by": sorted(keys)}
        # A key that the sample sets itself may have any value.
        following = [sample for sample in samples if name not in sample or sample is defaults or name in by]
        lengths = [sample.get(name) for sample in following if not is_given(sample, name, defaults, keys)]
        others = [sample for sample in following if not is_given(sample, name, defaults, keys)]
        equal = expression(lengths, others, sorted(keys))
        if equal is not None:
            rule["is"] = equal
        elif isinstance(defaults.get(name), list):
            rule["period"] = period_of(config_class, defaults, name)
        found[name] = rule
    return found


def is_given(sample: Config, name: str, defaults: Config, keys: Collection[str]) -> bool:
    """Return whether the sample varies the key itself, rather than one that it follows from."""
    return sample.get(name) != defaults.get(name) and all(sample.get(key) == defaults.get(key) for key in keys)


def expression(lengths: Sequence[Any], samples: Sequence[Config], keys: Iterable[str]) -> str | None:
    """Find an expression of keys (inner ones after a dot) that equals every length: `a`, `a*b`, `a/b` or `2*a`."""
    if not all(type(length) is int for length in lengths):
        return None
    columns = {key: [value_at(sample, key) for sample in samples] for key in keys}
    columns = {key: values for key, values in columns.items() if all(type(value) is int for value in values)}
    for key, values in columns.items():
        if values == lengths:
            return key
    for factor in FACTORS:
        for key, values in columns.items():
            if [factor * value for value in values] == lengths:
                return f"{factor}*{key}"
    for one, ours in columns.items():
        for other, theirs in columns.items():
            if one < other and [a * b for a, b in zip(ours, theirs, strict=True)] == lengths:
                return f"{one}*{other}"
            if one != other and all(theirs) and [a // b for a, b in zip(ours, theirs, strict=True)] == lengths:
                return f"{one}/{other}"
    return None


def period_of(config_class: Any, defaults: Config, name: str) -> list[Any] | None:
    """Find the period that a list over layers repeats for any number of layers; None if there is none."""
    count = next((key for key in LAYER_KEYS if type(defaults.get(key)) is int), None)
    if count is None:
        return None
    lists = []
    for layers in (LONGEST_LIST, LONGEST_LIST - 1, 5):
        try:
            lists.append(plain(config_class(**{count: layers}))[name])
        except Exception:
            return None
        if not isinstance(lists[-1], list) or len(lists[-1]) != layers:
            return None
    longest = lists[0]
    for length in range(1, LONGEST_LIST // 4):
        if all(one == longest[place % length] for values in lists for place, one in enumerate(values)):
            return list(longest[:length])
    return None


def variations(key: str, value: Any) -> list[Any]:
    """Return other values of a key, for a model that is otherwise the same."""
    if key in HARMLESS - SHOWN or is_of_training(key) or key.endswith("_token_id"):
        return []
    if key in WORDS:
        return list(WORDS[key])
    if key in LAYER_WORDS and isinstance(value, list):
        return [[word] * len(value) for word in LAYER_WORDS[key]]
    if isinstance(value, bool):
        return [not value]
    if type(value) is int:
        return [2] if value <= 0 else [value * 2] if key in LAYER_KEYS else [value * 2, 0]
    return [8] if value is None else []


# --- types of values --------------------------------------------------------------------------------------


def types_of(config_class: Any) -> dict[str, list[str]]:
    """Return the types of JSON that each key of a configuration takes, where the class refuses all other types."""
    found = {}
    for key, hint in ((one.name, one.type) for one in fields(config_class)):
        taken = taken_by(hint)
        if taken is not None and not key.startswith("_"):
            others = [name for name in SAMPLES if name not in taken]
            if all(refuses(config_class, key, value) for name in others for value in SAMPLES[name]):
                found[key] = sorted(taken)
    return dict(sorted(found.items()))


def taken_by(hint: Any) -> set[str] | None:
    """Return the types of JSON that a type hint allows; None if JSON has no such type."""
    origin = get_origin(hint)
    if hint in PLAIN_TYPES or origin in PLAIN_TYPES:
        return {PLAIN_TYPES[origin or hint]}
    if origin is Literal:
        names = [PLAIN_TYPES.get(type(one)) for one in get_args(hint)]
    elif origin in (Union, UnionType):
        names = []
        for one in get_args(hint):
            inner = taken_by(one)
            names += [None] if inner is None else [*inner]
    elif origin is Annotated:
        return taken_by(get_args(hint)[0])
    else:
        return None
    return None if None in names else {name for name in names if name}


def refuses(config_class: Any, key: str, value: Any) -> bool:
    try:
        config_class(**{key: value})
    except Exception:
        return True
    return False


# --- tensors of a class -----------------------------------------------------------------------------------


def architecture(name: str, config_class: Any, defaults: Config) -> Config | None:
    """Make the entry of one class: names, ties and sizes. None if it cannot be built from a configuration alone."""
    model_class = class_named(name)
    if model_class is None:
        return None
    settings = few_layers(config_class, defaults)
    base = built(model_class, config_class, settings)
    if base is None:
        settings = {}
        base = built(model_class, config_class, settings)
    if base is None:
        return None
    config = plain(base.config)
    shapes = shapes_of(base)
    seen = Seen()
    count(seen, shapes)
    ties = {pair: [()] for pair in ties_of(base)}
    governed: dict[tuple[str, str], str] = {}
    samples = [(with_labels(config), shapes)]
    tried, worked = set[str](), set[str]()
    for path, other in varied_paths(config):
        where = ".".join(path)
        model = built(model_class, config_class, with_value(settings, config, path, other))
        tried.add(where)
        if model is None:
            continue
        worked.add(where)
        new = shapes_of(model)
        count(seen, new)
        now = set(ties_of(model))
        if path[-1] == "tie_word_embeddings":
            for pair in now ^ ties.keys():
                governed[pair] = where
                ties.setdefault(pair, [()])
        samples.append((with_labels(plain(model.config), path, other), new))
    kinds = any(part in key for key in flat(config) for part in KIND_KEYS)
    conversions = conversion_mapping.get_model_conversion_mapping(base, add_legacy=False)
    targets = {target for target, _ in ties}
    required, layers, optional = {}, {}, set()
    numbers = [key for key in paths_of(config) if type(value_at(samples[0][0], key)) is int]
    sizes = {tensor: dims(tensor, samples, [*numbers, "num_labels"]) for tensor in shapes}
    missable = [re.compile(pattern) for pattern in base._keys_to_ignore_on_load_missing or ()]
    for tensor, times in seen.outer.items():
        may_be_missing = any(pattern.search(tensor) for pattern in missable)
        if times == seen.models and tensor not in targets and not may_be_missing:
            required[tensor] = sizes.get(tensor, [])
        else:
            optional.add(tensor)
    for stack, inner in seen.inner_somewhere:
        first = next((t for t in shapes if in_stack(t, stack, inner)), None)
        if not kinds and seen.inner.get((stack, inner), 0) == seen.stacks[stack] and first is not None:
            layers[f"{stack}.{{}}.{inner}"] = sizes[first]
        else:
            optional.add(f"{stack}.{{}}.{inner}")
    found = {
        "prefix": model_class.base_model_prefix,
        "ties": [[t, s, governed.get((t, s))] for t, s in sorted(ties)],
        "unsaved": sorted(base._keys_to_ignore_on_save or ()),
        "buffers": sorted(name for name, _ in base.named_buffers() if layer_of(name) is None),
        "untested": sorted(tried - worked),
        "optional": sorted(optional),
        "tensors": dict(sorted(required.items())),
        "layers": dict(sorted(layers.items())),
    }
    if conversions:
        found |= {"converted": True, "stored": stored_names(conversions, shapes)}
    return {key: value for key, value in found.items() if value or key == "prefix"}


def stored_names(conversions: Sequence[Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Return beginnings of the names of a model's tensors, each with those that names in checkpoints may have instead.

    Tensors that are stored in parts are left out. Whether a checkpoint has the prefixes that transformers takes off as
    it loads it depends on the checkpoint, so both ways count.
    """
    reversed_ = [one.reverse_transform() for one in reversed(conversions)]
    converters = [one for one in reversed_ if isinstance(one, core_model_loading.WeightConverter)]
    renamings = [one for one in reversed_ if isinstance(one, core_model_loading.WeightRenaming)]
    fixed = [one for one in renamings if not isinstance(one, core_model_loading.PrefixChange)]
    wanted: dict[str, list[str]] = {}
    for name in names:
        if core_model_loading.apply_converters(name, converters)[1] is None:
            files = [core_model_loading.apply_renamings(name, some) for some in (fixed, renamings)]
            others = list(dict.fromkeys(collapsed(one) for one in files))
            if all(("{}" in one) is ("{}" in collapsed(name)) for one in others):
                wanted[collapsed(name)] = others
    found: dict[str, list[str]] = {}
    for name, others in sorted(wanted.items()):
        parts = [one.split(".") for one in (name, *others)]
        while all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
            parts = [one[:-1] for one in parts]
        start, *rest = (".".join(one) for one in parts)
        if rest != [start]:
            found.setdefault(start, rest)
    exceptions = {name: files for name, files in wanted.items() if [*in_files(name, found)] != files}
    return {**found, **exceptions}


def class_named(name: str) -> Any:
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs a library that is not there
        return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def in_stack(tensor: str, stack: str, inner: str) -> bool:
    layer = layer_of(tensor)
    return layer is not None and (layer.stack, layer.inner) == (stack, inner)


def dims(tensor: str, samples: Sequence[tuple[Config, Shapes]], keys: Sequence[str]) -> list[Length]:
    """Return for each axis its fixed length, or the expression that equals it in every sample, or else None."""
    having = [(config, shapes[tensor]) for config, shapes in samples if tensor in shapes]
    if len({len(shape) for _, shape in having}) != 1:
        return []
    found: list[Length] = []
    for axis in range(len(having[0][1])):
        lengths = [shape[axis] for _, shape in having]
        is_fixed = len(set(lengths)) == 1
        found.append(lengths[0] if is_fixed else expression(lengths, [config for config, _ in having], keys))
    return found


def with_labels(config: Config, path: Path = (), value: Any = None) -> Config:
    """Add the number of labels, which configurations do not hold as a number."""
    return {**config, "num_labels": value if path == ("num_labels",) else DEFAULT_LABELS}


def paths_of(config: Config) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


def few_layers(config_class: Any, defaults: Config) -> Config:
    """Return settings for a model with as few layers as possible, but two, so that they can differ."""
    settings: Config = {}
    for key, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            fewer = {inner: FEW_LAYERS for inner in LAYER_KEYS if type(value.get(inner)) is int}
            other: Any = {**{inner: one for inner, one in value.items() if inner not in DERIVED_LISTS}, **fewer}
        elif key in LAYER_KEYS and type(value) is int and value > FEW_LAYERS:
            other = FEW_LAYERS
        else:
            continue
        try:
            config_class(**{**settings, key: other})
        except Exception:  # noqa: S112 - there is no such model
            continue
        settings[key] = other
    return settings


def built(model_class: Any, config_class: Any, settings: Config) -> Any:
    """Build the model without memory for its weights; None where there is no such model, or it is very large."""
    try:
        with torch.device("meta"), no_init_weights():
            return model_class._from_config(config_class(**settings), attn_implementation="eager")
    except Exception:
        return None


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def ties_of(model: Any) -> list[tuple[str, str]]:
    """Return pairs (copy, original) of tied tensors outside the layers."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return [(target, source) for target, source in pairs if not any(part.isdigit() for part in target.split("."))]


def count(seen: Seen, shapes: Mapping[str, tuple[int, ...]]) -> None:
    seen.models += 1
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in shapes:
        layer = layer_of(name)
        if layer is None:
            seen.outer[name] = seen.outer.get(name, 0) + 1
        else:
            stacks.setdefault(layer.stack, {}).setdefault(layer.number, set()).add(layer.inner)
    for stack, layers in stacks.items():
        seen.stacks[stack] = seen.stacks.get(stack, 0) + 1
        for inner in set.union(*layers.values()):
            seen.inner_somewhere.add((stack, inner))
        for inner in set.intersection(*layers.values()):
            seen.inner[stack, inner] = seen.inner.get((stack, inner), 0) + 1


def varied_paths(config: Config) -> Iterator[tuple[Path, Any]]:
    """Yield keys, including those of inner configurations, each with another value."""
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from (((key, inner), v) for inner, one in value.items() for v in variations(inner, one))
        yield from (((key,), other) for other in variations(key, value))
    if "num_labels" not in config:
        yield ("num_labels",), DEFAULT_LABELS + 1
        yield ("num_labels",), 1


def with_value(settings: Config, config: Config, path: Path, value: Any) -> Config:
    if len(path) == 1:
        return {**settings, path[0]: value}
    inner = {key: one for key, one in config[path[0]].items() if key not in ("transformers_version",)}
    return {**settings, path[0]: {**inner, path[1]: value}}


def flat(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, Mapping):
            yield from flat(value)


if __name__ == "__main__":
    main(sys.argv[1:])
