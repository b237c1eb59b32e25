"""Finds a checkpoint's class in transformers, and the tensors that this class does not read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from worker.engine.catalog.checkpoints.architectures import WITHOUT_HEAD, Use, labels_of, use_of
from worker.engine.catalog.checkpoints.config_differences import is_harmless, same
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import (
    ACTIVATIONS,
    Architecture,
    Length,
    ModelType,
    activations,
    collapsed,
    completed,
    model_type_of,
    says_untied,
    state_of,
    ties,
    value_at,
    value_of,
    with_nulls,
)
from worker.engine.catalog.checkpoints.settings import FUNCTIONS, POSITIONS, check_settings, refused_values
from worker.engine.catalog.checkpoints.tensor_names import layer_of, own_names
from worker.engine.catalog.checkpoints.weights import require_kind
from worker.engine.catalog.families import backbone_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

HARMLESS_WORDS = ("act", "activation", "dtype", "implementation", "mode", "method", "activation_function")
"""Ends of keys whose values are words and change no tensor."""
PREFERRED = ("ForConditionalGeneration", "ForMaskedLM", "ForCausalLM", "LMHeadModel")
"""Ends of class names; if several classes have the same tensors, as tied ones do, the first end is preferred."""
PRE_TRAINING_HEADS = (
    "cls", "lm_head", "lm_predictions", "mask_predictions", "discriminator_predictions", "generator_predictions",
    "generator_lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector",
)  # fmt: skip
"""Modules of pre-training heads, also those of classes that transformers no longer has."""
CHECKED = ("rope_parameters", "layer_types", "out_features", "out_indices")
"""Keys that `settings` checks, and that change no tensor of a model with a head."""
LISTED = 3  # number of classes or tensors that a message names


@dataclass(frozen=True)
class Identity:
    """A checkpoint with its class in transformers; None where transformers has none of its name."""

    info: CheckpointInfo
    """The checkpoint, with `architectures` in its configuration."""
    known: Architecture | None = None
    notes: tuple[str, ...] = ()
    leftovers: frozenset[str] = field(default_factory=frozenset)
    """Tensors of heads that pre-training left, which are not merged."""

    @cached_property
    def names(self) -> dict[str, str]:
        """The name that the model gives each tensor, by its name on disk."""
        return own_names(self.known, self.info.tensors) if self.known else {name: name for name in self.info.tensors}

    @cached_property
    def without_leftovers(self) -> CheckpointInfo:
        tensors = {name: tensor for name, tensor in self.info.tensors.items() if name not in self.leftovers}
        return replace(self.info, tensors=tensors)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, with defaults for its missing keys."""
        return completed(self.info.config)

    @cached_property
    def uncertain(self) -> frozenset[str] | None:
        """Tensors of which the table does not tell what this configuration makes of them; None if it tells of none.

        The table tells of all if it was made from configurations like this one.
        """
        kind = model_type_of(self.info.model_type)
        if kind is None or self.known is None or self.known.converted or self.info.config.get("per_layer_config"):
            return None
        # It is not known which other keys a class reads.
        counts = {key for key, value in self.info.config.items() if type(value) is int and not is_harmless(key)}
        beside = {key for key in counts if not key.endswith("_token_id") and key not in POSITIONS}
        beside -= kind.defaults.keys() | kind.aliases.keys()
        unusual = {*_unusual(self.config, completed(kind.defaults), self.known.untested)}
        unusual -= {key for key in unusual if _is_spelled_out(kind, key, self.config.get(key))}
        unusual -= {key for key in unusual if self.known.refused.words.get(key) == ACTIVATIONS}
        if beside or not unusual <= self.known.unclear.keys():
            return None
        return frozenset(name for key in unusual for name in self.known.unclear[key])

    @property
    def is_usual(self) -> bool:
        """Whether the table was made from configurations like this one, so that it has all tensors."""
        return self.uncertain == frozenset()

    @cached_property
    def unread(self) -> list[str]:
        """Tensors that the class does not have.

        If the configuration is like none in the table, only heads that other classes of the kind have are listed. If
        the class renames its tensors, nothing is known.
        """
        kind = model_type_of(self.info.model_type)
        if kind is None or self.known is None or self.known.converted:
            return []
        family = backbone_of(self.info.model_type)
        slot = family.slot if family and self.known.name == family.head.architecture else lambda name: None
        unread = [name for name, own in self.names.items() if not self._reads(own) and slot(name) is None]
        if self.is_usual:
            return unread
        outer = [name for name in unread if layer_of(self.names[name]) is None]
        return [name for name in outer if _is_read(name, kind.architectures.values())]

    def _reads(self, own: str) -> bool:
        """Return whether the class has a tensor of this name under this configuration."""
        return self.known is not None and self.known.reads(own) and self.is_switched(collapsed(own)) is not False

    def is_switched(self, pattern: str) -> bool | None:
        """Return whether the configuration gives the class an optional tensor; None if that is not known."""
        switches = self.known.switched.get(pattern, ()) if self.known else ()
        if not switches or self.uncertain is None or pattern in self.uncertain:
            return None
        states = [(switch, state_of(value_at(self.config, switch.key))) for switch in switches]
        if any(state in switch.off for switch, state in states):
            return False
        return True if all(state in switch.on for switch, state in states) else None


def identify(info: CheckpointInfo) -> Identity:
    """Find the class of a checkpoint: the one that `architectures` names, or else the only one with its tensors.

    If the tensors of the named class are not known, as of `TFBertForSequenceClassification`, the only class with a head
    that has the checkpoint's tensors counts, because two such heads may be of different tasks.

    Raises:
        InvalidCheckpoint: config.json names no class and not exactly one class has the tensors, or it names a class
            that lacks the checkpoint's head.
    """
    require_kind(info)
    check_settings(info)
    kind, stated = model_type_of(info.model_type), _stated(info)
    if len(stated) == 1:
        if stated[0].endswith("PreTrainedModel"):
            problem = f"architectures in config.json names {stated[0][:100]}, which computes nothing by itself"
            raise InvalidCheckpoint(info.source, f"{problem}; name the model's own class")
        if kind is None:
            return Identity(info)
        named = kind.architectures.get(stated[0])
        found_class = named or _fitting_classifier(info, kind)
        if found_class is None:
            return Identity(info, notes=(_unknown_class(info, stated[0]),))
        known = found_class
        said = f"names {stated[0][:100]}, whose tensors are not known here"
    else:
        named, known = None, _inferred(info, kind, stated)
        said = "names several architectures" if stated else "names no architectures"
    notes: tuple[str, ...] = ()
    if named is None:
        notes = (f"config.json of {info.source} {said}; by its tensors it is a {known.name}",)
        info = replace(info, config={**info.config, "architectures": [known.name]})
    found = Identity(info, known, notes)
    if kind is None:
        return found
    leftovers = _leftovers(found, known, kind)
    _refuse_other_head(found, known, kind, leftovers)
    if leftovers:
        notes = (*notes, f"{_listed(sorted(leftovers))} of {info.source} was left out: {known.name} does not read it")
    return replace(found, notes=notes, leftovers=leftovers)


def _stated(info: CheckpointInfo) -> list[str]:
    stated = info.config.get("architectures")
    if stated is None:
        return []
    if not isinstance(stated, list) or not all(isinstance(name, str) and name for name in stated):
        problem = f"architectures in config.json is {str(stated)[:100]!r}, not a list of one class's name"
        raise InvalidCheckpoint(info.source, problem)
    return list(dict.fromkeys(stated))


def _unknown_class(info: CheckpointInfo, name: str) -> str:
    return (
        f"the tensors of {name[:100]}, which config.json of {info.source} names as its class, are not known here; they "
        "were merged by their names alone"
    )


def _inferred(info: CheckpointInfo, kind: ModelType | None, stated: Sequence[str]) -> Architecture:
    """Return the only class that has the checkpoint's tensors, among those of the kind or those that are stated."""
    said = f"names several architectures ({', '.join(stated)[:200]})" if stated else "has no architectures"
    ask = "name the one class that the checkpoint is"
    if kind is None:
        problem = f"config.json {said}, and of model_type '{info.model_type[:100]}' no tensors are known; {ask}"
        raise InvalidCheckpoint(info.source, problem)
    candidates = [one for name, one in kind.architectures.items() if not stated or name in stated]
    fitting = _fitting(info, kind, candidates)
    if not fitting:
        heads = [name for name in info.tensors if layer_of(name) is None][:LISTED]
        problem = (
            f"config.json {said}, and its tensors ({', '.join(heads)}, …) are those of no class of {kind.model_type}"
        )
        raise InvalidCheckpoint(info.source, f"{problem}; {ask}")
    if len(fitting) > 1:
        problem = f"config.json {said}, and its tensors are those of {' and of '.join(one.name for one in fitting)}"
        raise InvalidCheckpoint(info.source, f"{problem}; {ask}")
    return fitting[0]


def _fitting_classifier(info: CheckpointInfo, kind: ModelType) -> Architecture | None:
    """Return the only class with the checkpoint's tensors, if it has a head for a task; otherwise None.

    A head for the same task is meant if the name that the checkpoint gives its class ends as such names do. Of several
    classes with the same tensors it is the only one for that task.
    """
    fitting, stated = _fitting(info, kind, kind.architectures.values()), use_of(info.config)
    if len(fitting) > 1:
        fitting = [one for one in fitting if _use_as(info, one) == stated]
    one = fitting[0] if len(fitting) == 1 else None
    if one is None or one.is_pre_training or one.name.endswith(("Model", *PREFERRED)):
        return None
    return one if stated.auto_class == WITHOUT_HEAD or stated == _use_as(info, one) else None


def _use_as(info: CheckpointInfo, one: Architecture) -> Use:
    return use_of({**info.config, "architectures": [one.name]})


def _fitting(info: CheckpointInfo, kind: ModelType, candidates: Iterable[Architecture]) -> list[Architecture]:
    """Return the classes that have the checkpoint's tensors; if there are several, those that are likely."""
    candidates = list(candidates)
    fitting: list[Architecture] = []
    for may_have_leftovers in (False, True):
        fitting = fitting or [one for one in candidates if _fits(one, info, kind, may_have_leftovers)]
    if len(fitting) > 1:
        fitting = _preferred(fitting, info.config)
    if len(fitting) > 1 and info.config.get("id2label"):  # multiple-choice models have no labels
        fitting = [one for one in fitting if not one.name.endswith("ForMultipleChoice")]
    return fitting


def _fits(one: Architecture, info: CheckpointInfo, kind: ModelType, may_have_leftovers: bool) -> bool:
    if one.converted:
        return False
    found = Identity(info, one)
    unread = set(found.unread)
    if may_have_leftovers:
        unread -= _leftovers(found, one, kind)
    if unread or _absent(found, one):
        return False
    return not found.is_usual or next(_misshapen(found, one), None) is None


def _preferred(fitting: Sequence[Architecture], config: Mapping[str, Any]) -> list[Architecture]:
    """Choose among several classes that do different things with the same tensors of a language model."""
    endings = [ending for ending in PREFERRED if any(one.name.endswith(ending) for one in fitting)]
    heads = [one for one in fitting if not one.is_pre_training and not one.name.endswith(("Model", *PREFERRED))]
    if heads or not endings:
        return list(fitting)
    wanted = endings[-1] if config.get("is_decoder") else endings[0]
    return [one for one in fitting if one.name.endswith(wanted)]


def _leftovers(found: Identity, known: Architecture, kind: ModelType) -> frozenset[str]:
    """Return the unread tensors of heads that other classes of the kind are pre-trained with."""
    others = [one for one in kind.architectures.values() if one.is_pre_training and one is not known]
    bodies = [one for one in kind.architectures.values() if one.name.endswith("Model") and not one.is_pre_training]
    leftovers = set()
    for name, own in found.names.items():
        head = own.partition(".")[0]
        if head in PRE_TRAINING_HEADS and not any(one.partition(".")[0] == head for one in known.all_names):
            leftovers.add(name)
    for name in found.unread:
        own = found.names[name]
        if layer_of(own) is None and _is_read(own, others) and not _is_read(own, bodies):
            leftovers.add(name)
    return frozenset(leftovers)


def _is_read(name: str, classes: Iterable[Architecture]) -> bool:
    return any(one.reads(own_names(one, [name])[name]) for one in classes)


def _refuse_other_head(found: Identity, known: Architecture, kind: ModelType, leftovers: frozenset[str]) -> None:
    """Raise InvalidCheckpoint where the head is another class's: two such models may have different tasks."""
    bodies = [one for one in kind.architectures.values() if one.name.endswith("Model") and not one.is_pre_training]
    for name in found.unread:
        own = found.names[name]
        if name in leftovers or layer_of(own) is not None or _is_read(own, bodies):
            continue
        others = [one.name for one in kind.architectures.values() if one.reads(own)]
        if others:
            problem = (
                f"architectures in config.json says {known.name}, which has no tensor {name}; {others[0]} has. "
                "Name the class that the checkpoint is, or remove the tensor"
            )
            raise InvalidCheckpoint(found.info.source, problem, tensor=name)


# --- whether a checkpoint has what its class needs ---------------------------------------------------------


def check_tensors(found: Identity) -> None:
    """Check that a checkpoint has its class's tensors, in the shapes of its configuration, as far as they are known.

    Raises:
        InvalidCheckpoint: a tensor is missing or has a wrong shape; the message names it.
    """
    known, info, kind = found.known, found.info, model_type_of(found.info.model_type)
    if known is None or kind is None:
        return
    for problem in refused_values(info.config, found.config, known.refused):
        raise InvalidCheckpoint(info.source, f"config.json has {problem}")
    check_present(found)
    _check_words(info, kind.defaults, found.config)
    if not _is_as_tabled(found):
        return
    for tensor, wanted in _misshapen(found, known):
        problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, by its configuration it would have {wanted}"
        raise InvalidCheckpoint(info.source, problem, tensor=tensor.name)


def _check_words(info: CheckpointInfo, defaults: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise InvalidCheckpoint for text in place of a number, and for functions that transformers does not have."""
    for key, default in defaults.items():
        value = config.get(key)
        if not isinstance(value, str):
            continue
        if key.endswith(FUNCTIONS) and default in activations() and value not in activations():
            problem = f"config.json has {key} {value[:100]!r}, which is no function that transformers knows"
            raise InvalidCheckpoint(info.source, problem)
        if isinstance(default, int | float):
            raise InvalidCheckpoint(info.source, f"config.json has {key} {value[:100]!r}, which is text and no number")


def check_present(found: Identity) -> None:
    """Check that a checkpoint has its class's tensors, as far as they are known. Raises InvalidCheckpoint."""
    known, info = found.known, found.info
    if known is None or not _is_as_tabled(found):
        return
    for name in _absent(found, known):
        problem = f"no tensor {name}, which {known.name} needs"
        key = next((key for copy, _, key in known.ties if copy == name and key is not None), None)
        if key is not None:
            problem += f": {says_untied(info.config, key)}"
        raise InvalidCheckpoint(info.source, problem, tensor=name)


def _is_as_tabled(found: Identity) -> bool:
    """Return whether the table covers the checkpoint, and its names are those of the class."""
    if found.known is None or found.uncertain is None:
        return False
    return all(layer_of(own) is None or found.known.reads(own) for own in found.names.values())


def _is_spelled_out(kind: ModelType, key: str, word: Any) -> bool:
    """Return whether the table has what follows from a key's word, so that the keys that follow tell the tensors."""
    rules = [rule["words"] for rule in kind.derived.values() if "words" in rule and rule["by"] == [key]]
    return bool(rules) and all(state_of(word) in words for words in rules)


def _unusual(
    config: Mapping[str, Any], defaults: Mapping[str, Any], untested: frozenset[str], path: str = ""
) -> Iterator[str]:
    """Yield keys with a kind of value that the table's models were not built with; they may change tensors."""
    for key, default in defaults.items():
        value = config.get(key, default)
        where = f"{path}{key}"
        if same(value, default) or is_harmless(key) or key in CHECKED:
            continue
        if isinstance(value, Mapping) and isinstance(default, Mapping) and "model_type" in default:
            if value.get("model_type") != default["model_type"]:
                yield where
            else:
                yield from _unusual(value, default, untested, f"{where}.")
            continue
        is_word = isinstance(value, str) and (default is None or isinstance(default, str))
        is_number = type(value) in (int, bool, float) and (type(default) in (int, bool, float) or default is None)
        is_emptied = value is None and type(default) is int  # `nulls` of the table tell what it stands for
        if where in untested or not (is_number or is_emptied or (is_word and key.endswith(HARMLESS_WORDS))):
            yield where


def _absent(found: Identity, known: Architecture) -> list[str]:
    """Return the tensors that the class needs and the checkpoint lacks."""
    own = {found.names[name] for name in found.info.tensors}
    active = dict(ties(known, found.config))
    groups: dict[str, set[str]] = {}
    for copy, original in active.items():
        groups.setdefault(original, {original}).add(copy)
    absent = []
    for name in [*known.tensors, *(copy for copy in known.targets if copy not in active and copy in known.optional)]:
        if name not in own and name not in known.unsaved and not own & groups.get(active.get(name, name), set()):
            absent.append(name)
    stacks: dict[str, set[int]] = {}
    for name in own:
        layer = layer_of(name)
        if layer is not None:
            stacks.setdefault(layer.stack, set()).add(layer.number)
    absent += [name for name in known.switched if "{}" not in name and found.is_switched(name) and name not in own]
    turned_on = [name for name in known.switched if "{}" in name and found.is_switched(name)]
    has_no_layers = any(value == 0 and "layers" in key for key, value in found.config.items())
    for pattern in [*known.layers, *turned_on]:
        stack, _, _ = pattern.partition(".{}.")
        # A list of layers that a setting turns on may be missing as a whole.
        whole = {0} if pattern in turned_on and not has_no_layers else set()
        absent += [one for number in sorted(stacks.get(stack, whole)) if (one := pattern.format(number)) not in own]
    uncertain = found.uncertain or frozenset()
    return [name for name in absent if collapsed(name) not in uncertain]


def _misshapen(found: Identity, known: Architecture) -> Iterator[tuple[TensorInfo, list[int]]]:
    """Yield tensors with a wrong shape, each with the right one."""
    config = with_nulls(known, {**found.config, "num_labels": len(labels_of(found.info.config))})
    values: dict[Length, int | None] = {}
    uncertain = found.uncertain or frozenset()
    for name, tensor in found.info.tensors.items():
        own = found.names[name]
        pattern = collapsed(own)
        lengths = known.tensors.get(own) or known.layers.get(pattern) or known.optional.get(pattern)
        if not lengths or pattern in uncertain or found.is_switched(pattern) is False:
            continue
        wanted = []
        for place, length in enumerate(lengths):
            if length not in values:
                values[length] = value_of(length, config)
            value = values[length]
            there = tensor.shape[place] if place < len(tensor.shape) else 0
            wanted.append(value if type(value) is int else there)
        if list(tensor.shape) != wanted:
            yield tensor, wanted


def _listed(names: Sequence[str]) -> str:
    more = f" (like {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"
