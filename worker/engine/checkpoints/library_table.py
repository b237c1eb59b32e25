"""Writes the table of transformers' models, for code that must not import transformers.

`python -m worker.engine.checkpoints.library_table` writes `catalog/checkpoints/library.zip`. The tensors of a class
depend on its configuration in ways that only its code tells. So each class is built, without memory for weights, from
many configurations that differ from the default in one key. The table has whatever holds for all of them. That takes
an hour or more. If it is stopped, the table has what is finished, and `--rest` goes on with what is not. Names of kinds
of model as arguments write these anew, and `--lists` the lists that hold for all kinds, which takes seconds.
"""

import json
import logging
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from inspect import getattr_static
from multiprocessing import Pool
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from transformers.activations import ACT2FN

from worker.engine.catalog.checkpoints.library import (
    ACTIVATIONS,
    AUTO_CLASSES,
    LAYER_KEYS,
    LAYER_TYPES,
    ROTARY,
    TABLE,
    TOKENIZERS,
    collapsed,
    in_files,
    member,
    state_of,
    type_name,
    value_at,
)
from worker.engine.catalog.checkpoints.tensor_names import layer_of
from worker.engine.checkpoints.library_refusals import ROTARY_VALUES, refusals, refused_too, words_in_code, words_of
from worker.engine.checkpoints.library_roles import roles_of
from worker.engine.checkpoints.library_tensors import FACTORS, Samples
from worker.engine.checkpoints.library_tokenizers import tokenizers_of_library
from worker.engine.checkpoints.library_variations import (
    Changes,
    Config,
    built,
    few_layers,
    is_list_of,
    plain,
    trial_of_config,
    trial_of_model,
    variations,
)
from worker.engine.runtime.libraries import (
    configuration_utils,
    conversion_mapping,
    core_model_loading,
    modeling_rope_utils,
    preload,
    transformers,
)

WRITTEN_AT_ONCE = 20
"""Number of kinds that are described between writing the table and writing it again."""
LONGEST_LIST = 128
"""Largest number of layers for which lists over layers are compared, to find their period."""
GENERAL = (
    "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText", "AutoModelForVisualQuestionAnswering",
    "AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForMultimodalLM",
    "AutoModelForPreTraining", "AutoModel", "AutoModelForTextEncoding",
)  # fmt: skip
"""Classes that load models which others load too; all others say more of a model, and each more than the next."""

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


def main(asked: Sequence[str]) -> None:
    """Write the table: as a whole, the kinds that it lacks (`--rest`), only its lists (`--lists`), or some kinds."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    preload()
    kept = {entry["model_type"]: entry for entry in kept_entries()} if asked else {}
    if asked == ["--rest"]:
        kinds = [kind for kind in sorted(transformers.CONFIG_MAPPING) if kind not in kept]
    else:
        kinds = [] if asked == ["--lists"] else list(asked or sorted(transformers.CONFIG_MAPPING))
    lists = lists_of_library()
    with Pool() as pool:
        for count, entry in enumerate(filter(None, pool.imap_unordered(described, kinds)), start=1):
            kept[entry["model_type"]] = entry
            if count % WRITTEN_AT_ONCE == 0:
                write(lists, kept)
    write(lists, kept)


def as_json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def write(lists: Config, entries: Mapping[str, Config]) -> None:
    """Write the table with the version of transformers; the same entries give the same bytes."""
    with ZipFile(TABLE, "w", ZIP_DEFLATED) as table:
        table.comment = comment()
        for name, content in lists.items():
            table.writestr(ZipInfo(name), as_json(content), ZIP_DEFLATED)
        for model_type, entry in sorted(entries.items()):
            table.writestr(ZipInfo(member(model_type)), as_json(entry), ZIP_DEFLATED)


def kept_entries() -> list[Config]:
    """Read the entries of all kinds of model from the table. Raises ValueError if it is of another version."""
    with ZipFile(TABLE) as table:
        if table.comment != comment():
            raise ValueError(f"the table is of {table.comment.decode()}: write it as a whole")
        return [json.loads(table.read(name)) for name in table.namelist() if name.endswith(member(""))]


def comment() -> bytes:
    return f"transformers {transformers.__version__}".encode()


def lists_of_library() -> Config:
    """Return the lists that hold for all kinds of model, by the names of their files in the table."""
    layer_types = {*configuration_utils.ALLOWED_LAYER_TYPES, *configuration_utils._LEGACY_LAYER_TYPE_REMAP}
    return {
        AUTO_CLASSES: auto_classes(),
        ACTIVATIONS: sorted(ACT2FN),
        LAYER_TYPES: sorted(layer_types),
        ROTARY: rotary_parameters(),
        TOKENIZERS: tokenizers_of_library(),
    }


def auto_classes() -> dict[str, str]:
    """Return the names of all classes that an Auto class makes, each with the one that says most of what it is for.

    A class that only Auto classes of parts make, such as `BeitBackbone`, loads itself.
    """
    by_name: dict[str, set[str]] = {}
    for auto_class in (one for name, one in modeling_auto().items() if name.startswith("AutoModel")):
        for made in auto_class._model_mapping._model_mapping.values():
            for name in (made,) if isinstance(made, str) else made:
                by_name.setdefault(name, set()).add(auto_class.__name__)
    alone = {name: name for kind in transformers.CONFIG_MAPPING for name in classes_of(kind)}
    return alone | {
        name: min(
            loading, key=lambda one: (not is_named_after(name, one), GENERAL.index(one) if one in GENERAL else -1, one)
        )
        for name, loading in sorted(by_name.items())
    }


def is_named_after(name: str, auto_class: str) -> bool:
    """Return whether a class's name ends like that of the Auto class, as `GitForCausalLM`."""
    ending = auto_class.removeprefix("AutoModel")
    return bool(ending) and name.endswith(ending)


def rotary_parameters() -> dict[str, list[str]]:
    """Return for each type of rotary positions the parameters without which every configuration refuses it."""
    found = {}
    for name in ("default", *sorted(modeling_rope_utils.ROPE_INIT_FUNCTIONS)):
        whole = {**ROTARY_VALUES, "rope_type": name}
        found[name] = [
            key
            for key in ROTARY_VALUES
            if refuses(
                transformers.LlamaConfig, "rope_parameters", {one: value for one, value in whole.items() if one != key}
            )
        ]
    return found


def described(model_type: str) -> Config | None:
    """Make one entry of the table; None if the configuration of the kind has no defaults."""
    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
        defaults = plain(config_class())
    except Exception:  # kinds made of others, which have no configuration of their own
        return None
    # The lists of factors of longrope have a length of each kind's own.
    rotary = sorted({*modeling_rope_utils.ROPE_INIT_FUNCTIONS} - {"longrope"})
    trial = trial_of_config(config_class, defaults)
    types = types_of(config_class)
    hints = {one.name: words_of(one.type) for one in fields(config_class)}
    found: Config = {
        "model_type": model_type,
        "defaults": defaults,
        "derived": derived_of(config_class, defaults),
        "aliases": dict(getattr(config_class, "attribute_map", {})),
        "types": types,
        "items": items_of(config_class, defaults),
        "stages": stages_of(config_class, defaults),
        "fixed": fixed_of(config_class),
        **refusals(trial, types, rotary, {key: words for key, words in hints.items() if words}),
        "architectures": {},
    }
    in_code = words_in_code(config_class.__module__)
    words = {key: in_code for key, value in defaults.items() if isinstance(value, str) and key not in found["words"]}
    refused: Config | None = None
    switches: Changes | None = None
    for name in sorted(classes_of(model_type), key=lambda name: (not name.endswith("Model"), len(name), name)):
        samples = samples_of(name, config_class, defaults, switches)
        if samples is None:
            continue
        trial, switches = samples.trial, samples.trial.turned
        own = refusals(trial, types, rotary, words) if refused is None else refused_too(trial, refused)
        refused = refused or own
        found["architectures"][name] = without_known({**entry_of(samples), **own}, found)
    return found


def without_known(entry: Config, kind: Config) -> Config:
    """Leave out of a class's entry what is refused of its kind anyway."""
    refused = {
        key: {state: unless for state, unless in states.items() if kind["refused"].get(key, {}).get(state) != {}}
        for key, states in entry.get("refused", {}).items()
    }
    left = {
        **entry,
        "refused": {key: states for key, states in refused.items() if states},
        **{
            key: [pair for pair in entry.get(key, ()) if pair not in kind[key]]
            for key in ("divides", "counts", "least", "equals")
        },
        "words": {key: words for key, words in entry.get("words", {}).items() if key not in kind["words"]},
    }
    return {key: value for key, value in left.items() if value or key == "prefix"}


def fixed_of(config_class: Any) -> list[str]:
    """Return the properties of a configuration that no value can be given to."""
    names = (name for name in dir(config_class) if not name.startswith("_"))
    properties = {name: getattr_static(config_class, name) for name in names}
    fixed = [name for name, one in properties.items() if isinstance(one, property) and one.fset is None]
    return sorted(name for name in fixed if refuses(config_class, name, 1))


def classes_of(model_type: str) -> set[str]:
    """Return the names of the classes that any Auto class makes for this kind of model."""
    found: set[str] = set()
    for name, mapping in modeling_auto().items():
        named = mapping.get(model_type, ()) if name.startswith("MODEL") and name.endswith("MAPPING_NAMES") else ()
        found |= {named} if isinstance(named, str) else set(named)
    return found


def modeling_auto() -> Config:
    """Return what the module of the Auto classes has, by name."""
    return vars(sys.modules["transformers.models.auto.modeling_auto"])


# --- missing keys of configurations -----------------------------------------------------------------------


def derived_of(config_class: Any, defaults: Config) -> Config:
    """Find keys whose default follows from others: `{key: {"by", "is", "words", "period"}}`.

    Such a value follows from the keys `by`: it is an expression of them, or what `words` has for a word, or a list that
    repeats `period` over all layers.
    """
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
        words = {state_of(value_at(one, key)): one.get(name) for key in keys for one in others}
        if equal is not None:
            rule["is"] = equal
        elif len(keys) == 1 and len(words) > 1 and all(state.startswith("'") for state in words):
            rule["words"] = words
        elif isinstance(defaults.get(name), list):
            rule["period"] = period_of(config_class, defaults, name)
        found[name] = rule
    return found


def is_given(sample: Config, name: str, defaults: Config, keys: Collection[str]) -> bool:
    """Return whether the sample varies the key itself, rather than one that it follows from."""
    return sample.get(name) != defaults.get(name) and all(sample.get(key) == defaults.get(key) for key in keys)


def expression(lengths: Sequence[Any], samples: Sequence[Config], keys: Sequence[str]) -> str | None:
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


def items_of(config_class: Any, defaults: Config) -> dict[str, list[str]]:
    """Return the types of JSON of the entries of lists, for keys that take no lists of others."""
    found = {}
    for key, hint in ((one.name, one.type) for one in fields(config_class)):
        if "list" not in (taken_by(hint) or ()):
            continue
        own = defaults.get(key) if isinstance(defaults.get(key), list) else None
        taken = [
            name
            for name, samples in SAMPLES.items()
            if any(not refuses(config_class, key, [one] * len(own or [0])) for one in samples)
        ]
        if taken and len(taken) < len(SAMPLES) and all(type_name(one) in taken for one in own or ()):
            found[key] = sorted(taken)
    return dict(sorted(found.items()))


def stages_of(config_class: Any, defaults: Config) -> str | None:
    """Return the key that says how many stages a backbone has; None if it is none, or names them in another way."""

    def names(**changes: Any) -> list[str] | None:
        try:
            return list(config_class(**changes).stage_names)
        except Exception:
            return None

    usual = names()
    count = len(usual or ()) - 1
    if usual != ["stem", *(f"stage{number}" for number in range(1, count + 1))]:
        return None
    for key, value in defaults.items():
        less = value[:-1] if is_list_of(value, count) else value - 1 if type(value) is int and value == count else None
        if less is not None and names(**{key: less}) == usual[:-1]:
            return key
    return None


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


# --- classes ----------------------------------------------------------------------------------------------


def samples_of(name: str, config_class: Any, defaults: Config, switches: Changes | None) -> Samples | None:
    """Build models of a class; None if it cannot be built from a configuration alone."""
    model_class = class_named(name)
    if model_class is None:
        return None
    settings = few_layers(config_class, defaults)
    first = built(model_class, config_class, settings)
    if first is None:
        settings = {}
        first = built(model_class, config_class, settings)
    if first is None:
        return None
    return Samples(trial_of_model(model_class, config_class, settings, plain(first.config), switches), first)


def entry_of(samples: Samples) -> Config:
    """Return what the table says of a class's tensors."""
    first = samples.model
    conversions = conversion_mapping.get_model_conversion_mapping(first, add_legacy=False)
    names = [name for name, _ in first.named_parameters(remove_duplicate=False)]
    tensors = samples.tensors(first._keys_to_ignore_on_load_missing or ())
    return {
        "prefix": first.base_model_prefix,
        "ties": [[copy, original, samples.governed.get((copy, original))] for copy, original in sorted(samples.ties)],
        "unsaved": sorted(first._keys_to_ignore_on_save or ()),
        "buffers": sorted(name for name, _ in first.named_buffers() if layer_of(name) is None),
        "untested": sorted(samples.untested),
        **tensors,
        "converted": bool(conversions),
        "stored": stored_names(conversions, names) if conversions else {},
        **roles_of(first, {*tensors["tensors"], *tensors["optional"]}),
    }


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


if __name__ == "__main__":
    main(sys.argv[1:])
