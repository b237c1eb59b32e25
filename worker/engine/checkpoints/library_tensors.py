"""Finds the tensors of a class of transformers by building models, for the table that `library_table` writes.

Models are built from many configurations that differ from the smallest in one key, and again from that configuration
with as many switches changed as possible. The table has whatever holds for all of these samples.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from worker.engine.catalog.checkpoints.library import FACTOR, Length, collapsed, state_of, value_at
from worker.engine.catalog.checkpoints.tensor_names import layer_of
from worker.engine.checkpoints.library_variations import (
    DEFAULT_LABELS,
    KIND_KEYS,
    Changes,
    Config,
    Path,
    Trial,
    is_list_of,
    plain,
    variations_of_models,
)

Shapes = Mapping[str, tuple[int, ...]]
FACTORS = (2, 3, 4)
"""Factors by which lengths may be multiples of sizes."""
MAX_OFFSET = 4
TIES = "tie_word_embeddings"


@dataclass(frozen=True)
class Sample:
    """One model that was built."""

    config: Config
    """Its configuration, with `num_labels`."""
    patterns: Mapping[str, bool | None]
    """Whether it has the tensor; for tensors of layers, with `{}` as number, None where only some layers have it.

    What the first layer alone has is also there by its own name.
    """
    sizes: Mapping[str, tuple[int, ...] | None]
    """Shapes by the same names; None where layers differ."""
    path: Path | None
    """The key in which it differs from the first sample with the same switches; None for the first."""
    is_turned: bool
    """Whether the trial's switches are changed."""


class Samples:
    """The models of one class that could be built, and what they have in common."""

    def __init__(self, trial: Trial, first: Any) -> None:
        self.trial = trial
        self.model = first
        """The model that nothing is changed of."""
        self.ties = set(ties_of(first))
        """Pairs (copy, original) of tied tensors."""
        self.governed: dict[tuple[str, str], str] = {}
        """The key that says whether a pair is tied."""
        self.unclear: dict[str, list[str]] = {}
        """Tensors that a list changes, by its key."""
        self._samples = [sample_of(first, {}, None, is_turned=False)]
        tried, worked = set[str](), set[str]()
        ties = set(self.ties)
        varied = list(variations_of_models(trial))
        for path, other in varied:
            where = ".".join(path)
            tried.add(where)
            changes: Changes = {path: other}
            model = trial.build(changes)
            if model is None and isinstance(other, bool):
                changes, model = self._beside_another(path, other)
            if model is None:
                continue
            worked.add(where)
            self._add(model, changes, path, is_turned=False)
            if path[-1] == TIES:
                for pair in {*ties_of(model)} ^ ties:
                    self.governed[pair] = where
                    self.ties.add(pair)
            if isinstance(self._value(path), list):
                self._note_changes(where)
        left = [path for path in trial.paths if ".".join(path) in tried - worked]
        worked |= {".".join(path) for path in left if self._shortened(path) or self._beside_a_number(path, left)}
        self.untested = tried - worked
        """Keys of which no other value could be tried."""
        self._add_turned([path for path, _ in varied if ".".join(path) in worked])

    def _add(self, model: Any, changes: Changes, path: Path | None, *, is_turned: bool) -> None:
        self._samples.append(sample_of(model, changes, path, is_turned=is_turned))

    def _value(self, path: Path) -> Any:
        return DEFAULT_LABELS if path == ("num_labels",) else self.trial.at(path)

    def _beside_another(self, path: Path, value: Any) -> tuple[Changes, Any]:
        """Try a value that is refused alone beside the other value of one switch."""
        for other, one in self.trial.turned.items():
            changes = {other: one, path: value}
            model = self.trial.build(changes) if other != path else None
            if model is not None:
                return changes, model
        return {}, None

    def _note_changes(self, where: str) -> None:
        first, last = self._samples[0], self._samples[-1]
        names = first.patterns.keys() | last.patterns.keys()
        changed = {
            name
            for name in names
            if first.patterns.get(name) != last.patterns.get(name) or first.sizes.get(name) != last.sizes.get(name)
        }
        self.unclear[where] = sorted({*self.unclear.get(where, ()), *changed})

    def _shortened(self, path: Path) -> bool:
        """Try one less of what a key counts, with lists of as many entries one shorter."""
        count = self.trial.at(path)
        if len(path) != 1 or type(count) is not int or count < 2:
            return False
        lists: dict[Path, Any] = {
            (key,): value[:-1] for key, value in self.trial.config.items() if is_list_of(value, count)
        }
        if "attention_types" in self.trial.config:  # of GPT-Neo, has kinds of layers and how often they return
            lists = {("attention_types",): [[["global"], count - 1]]}
        changes: Changes = {path: count - 1, **lists}
        model = self.trial.build(changes) if lists else None
        if model is None:
            return False
        self._add(model, changes, path, is_turned=False)
        beside = [(key,) for key, value in self.trial.config.items() if is_list_of(value, count)]
        for one in dict.fromkeys([*changes, *beside]):
            self._note_changes(".".join(one))
        self._samples.pop()
        return True

    def _beside_a_number(self, path: Path, others: Sequence[Path]) -> bool:
        """Try twice a number beside twice or half of another, because two products may have to be equal."""
        own = self.trial.at(path)
        for other in others if type(own) is int and own > 0 else ():
            number = self.trial.at(other)
            if other == path or type(number) is not int or number < 2:
                continue
            for changes in ({path: 2 * own, other: 2 * number}, {path: 2 * own, other: number // 2}):
                model = self.trial.build(changes)
                if model is not None:
                    self._add(model, changes, path, is_turned=False)
                    return True
        return False

    def _add_turned(self, paths: Sequence[Path]) -> None:
        """Add the model with its switches changed, and such models with other numbers."""
        turned = self.trial.turned
        model = self.trial.build(turned) if turned else None
        if model is None:
            return
        self._add(model, turned, None, is_turned=True)
        for path in dict.fromkeys(paths):
            value = turned[path] if path in turned else self._value(path)
            if type(value) is not int or value < 1:
                continue
            for factor in (3, 2):
                changes = {**turned, path: factor * value}
                model = self.trial.build(changes)
                if model is not None:
                    self._add(model, changes, path, is_turned=True)
                    break

    def tensors(self, missable: Sequence[str]) -> Config:
        """Return what the table says of the class's tensors.

        Args:
            missable: regular expressions of names that checkpoints may lack.
        """
        required: dict[str, list[Length]] = {}
        layers: dict[str, list[Length]] = {}
        optional: dict[str, list[Length]] = {}
        switched: dict[str, list[list[Any]]] = {}
        free = re.compile("|".join(f"(?:{one})" for one in missable) or "(?!)")
        copies = {copy for copy, _ in self.ties}
        lengths = Lengths(self._samples)
        mixes = any(any(part in where.rpartition(".")[2] for part in KIND_KEYS) for where in self.untested)
        for name in sorted({name for sample in self._samples for name in sample.patterns}):
            is_layered = "{}" in name
            having = [sample for sample in self._samples if has_place(sample, name)]
            shape = lengths.of_tensor(name)
            if name in copies or free.search(name) or (is_layered and mixes):
                optional[name] = shape
            elif all(sample.patterns.get(name, False) is True for sample in having):
                (layers if is_layered else required)[name] = shape
            else:
                optional[name] = shape
                switches = switch_of(name, having)
                if switches:
                    switched[name] = switches
        return {
            "unclear": dict(sorted(self.unclear.items())),
            "optional": optional,
            "switched": switched,
            "nulls": dict(sorted(lengths.nulls.items())),
            "tensors": required,
            "layers": layers,
        }


def sample_of(model: Any, changes: Changes, path: Path | None, *, is_turned: bool) -> Sample:
    config = {**plain(model.config), "num_labels": DEFAULT_LABELS}
    for where, value in changes.items():
        if len(where) == 1:
            config[where[0]] = value
        else:
            config[where[0]] = {**config[where[0]], where[1]: value}
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    patterns, sizes = in_all_layers(shapes)
    return Sample(config, patterns, sizes, path, is_turned)


def in_all_layers(shapes: Shapes) -> tuple[dict[str, bool | None], dict[str, tuple[int, ...] | None]]:
    """Return `patterns` and `sizes` of a sample."""
    numbers: dict[str, set[int]] = {}
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    patterns: dict[str, bool | None] = {}
    sizes: dict[str, tuple[int, ...] | None] = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer is None:
            patterns[name], sizes[name] = True, shape
        else:
            numbers.setdefault(layer.stack, set()).add(layer.number)
            found.setdefault(collapsed(name), {})[layer.number] = shape
    for name, own in found.items():
        patterns[name] = own.keys() == numbers[name.partition(".{}.")[0]] or None
        sizes[name] = next(iter(own.values())) if len({*own.values()}) == 1 else None
        if patterns[name] is None and own.keys() == {0}:
            patterns[name.replace("{}", "0", 1)], sizes[name.replace("{}", "0", 1)] = True, own[0]
    return patterns, sizes


def has_place(sample: Sample, name: str) -> bool:
    """Return whether the sample tells of the tensor: for one of a layer, if it has such layers at all."""
    stack, between, _ = name.partition(".{}.")
    return not between or any(other.startswith(f"{stack}.{{}}.") for other in sample.patterns)


def switch_of(name: str, samples: Sequence[Sample]) -> list[list[Any]]:
    """Return keys, each with its states for both, that decide in all samples whether a tensor is there.

    It is there if all of the keys are in a state for it. There are none if that is not so in all samples.
    """
    first = samples[0].patterns.get(name, False)
    paths = [sample.path for sample in samples if not sample.is_turned and sample.patterns.get(name, False) != first]
    keys = [".".join(path) for path in dict.fromkeys(path for path in paths if path is not None)]
    found = [switch for key in keys if (switch := switched_by(name, key, samples)) is not None]
    if found or not first:
        return found[:1]
    states = {key: [state_of(value_at(sample.config, key)) for sample in samples] for key in keys}
    there = [sample.patterns.get(name, False) for sample in samples]
    if None in there:
        return []
    on = {key: {state for state, is_there in zip(states[key], there, strict=True) if is_there} for key in keys}
    expected = [all(states[key][place] in on[key] for key in keys) for place in range(len(samples))]
    return [[key, sorted(on[key]), sorted({*states[key]} - on[key])] for key in keys] if expected == there else []


def switched_by(name: str, key: str, samples: Sequence[Sample]) -> list[Any] | None:
    """Return a key with its states in which a tensor is there, and in which it is not, if it alone decides."""
    by_state: dict[str, set[bool | None]] = {}
    for sample in samples:
        by_state.setdefault(state_of(value_at(sample.config, key)), set()).add(sample.patterns.get(name, False))
    on = sorted(state for state, found in by_state.items() if found == {True})
    off = sorted(state for state, found in by_state.items() if found == {False})
    return [key, on, off] if on and off and len(on) + len(off) == len(by_state) else None


def ties_of(model: Any) -> list[tuple[str, str]]:
    """Return pairs (copy, original) of tied tensors outside the layers."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return [(target, source) for target, source in pairs if not any(part.isdigit() for part in target.split("."))]


# --- lengths of axes --------------------------------------------------------------------------------------


class Lengths:
    """Expressions of the lengths of axes, each of which holds in all samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._firsts = {sample.is_turned: sample for sample in reversed(samples) if sample.path is None}
        self._flat = {id(sample): numbers_of(sample.config) for sample in samples}
        self.nulls: dict[str, str] = {}
        """Expressions of the lengths that keys stand for where they are null."""
        self._known: dict[tuple[tuple[int, int], ...], Length] = {}

    def of_tensor(self, name: str) -> list[Length]:
        """Return the length of each axis: a number, an expression, or None. No axes are told if too little is known."""
        having = [(sample, shape) for sample in self._samples if (shape := sample.sizes.get(name)) is not None]
        firsts = [sample for sample, _ in having if sample.path is None]
        differs = name in self._samples[0].sizes and self._samples[0].sizes[name] is None  # from layer to layer
        if not firsts or differs or len({len(shape) for _, shape in having}) != 1:
            return []
        return [self._of_axis([(sample, shape[axis]) for sample, shape in having]) for axis in range(len(having[0][1]))]

    def _of_axis(self, having: Sequence[tuple[Sample, int]]) -> Length:
        lengths = [length for _, length in having]
        if len(set(lengths)) == 1:
            return lengths[0]
        key = tuple((id(sample), length) for sample, length in having)
        if key not in self._known:
            self._known[key] = self._expression(having)
        return self._known[key]

    def _expression(self, having: Sequence[tuple[Sample, int]]) -> Length:
        keys, nullable = self._that_matter(having)
        rows = [(self._flat[id(sample)], length) for sample, length in having]
        found = self._form(keys, nullable, rows)
        if found is None:  # keys from which those follow may make up for them
            keys = self._from_which_follow(keys, having)
            found = self._form(keys, nullable, rows)
        return found

    def _form(
        self, keys: Sequence[str], nullable: Sequence[str], rows: Sequence[tuple[Mapping[str, Any], int]]
    ) -> Length:
        offset = rows[0][1] - max((rows[0][0][key] for key in keys if rows[0][0][key] < rows[0][1]), default=0)
        for form in forms(keys, offset):
            if fits(form, rows):
                return form
        for key in nullable:
            rules = [self.nulls[key]] if key in self.nulls else fallbacks(keys)
            for rule in rules:
                length_of = evaluator(rule)
                filled = [({**row, key: length_of(row)} if row.get(key) is None else row, n) for row, n in rows]
                for form in forms([key, *keys], 0):
                    if key in form and fits(form, filled):
                        self.nulls[key] = rule
                        return form
        return None

    def _that_matter(self, having: Sequence[tuple[Sample, int]]) -> tuple[list[str], list[str]]:
        """Return the keys that differ wherever the length differs; last, those of them that are null in some sample."""
        lengths = {id(sample): length for sample, length in having}
        found: dict[str, None] = {}
        for sample, length in having:
            first = self._firsts.get(sample.is_turned)
            if sample.path is None or first is None or lengths.get(id(first), length) == length:
                continue
            own, plain_ = self._flat[id(sample)], self._flat[id(first)]
            found |= dict.fromkeys(key for key, value in own.items() if plain_.get(key) != value)
        rows = [self._flat[id(sample)] for sample, _ in having]
        sure = [key for key in found if all(type(row.get(key)) is int for row in rows)]
        return sorted(sure), sorted(key for key in found if key not in sure)

    def _from_which_follow(self, keys: Sequence[str], having: Sequence[tuple[Sample, int]]) -> list[str]:
        """Return these keys, and the others whose change changes one of them."""
        found = {*keys}
        for sample, _ in having:
            first = self._firsts.get(sample.is_turned)
            if sample.path is None or first is None:
                continue
            own, plain_ = self._flat[id(sample)], self._flat[id(first)]
            if any(own.get(key) != plain_.get(key) for key in keys):
                found.add(".".join(sample.path))
        return sorted(key for key in found if all(type(self._flat[id(one)].get(key)) is int for one, _ in having))


def numbers_of(config: Config) -> dict[str, Any]:
    """Return the whole numbers of a configuration by their keys, inner ones after a dot."""
    found = {}
    for key, value in config.items():
        if type(value) is int:
            found[key] = value
        elif isinstance(value, dict) and "model_type" in value:
            found |= {f"{key}.{inner}": one for inner, one in value.items() if type(one) is int}
    return found


def forms(keys: Sequence[str], offset: int) -> Iterator[str]:
    """Yield expressions of some keys, the plainest first.

    Args:
        offset: a number that may be added to a key.
    """
    yield from keys
    yield from (f"{factor}*{key}" for factor in FACTORS for key in keys)
    pairs = [(one, other) for one, other in product(keys, keys) if one < other]
    yield from (f"{one}*{other}" for one, other in pairs)
    yield from (f"{one}/{other}" for one, other in product(keys, keys) if one != other)
    yield from (f"{one}/{other}*{other}" for one, other in product(keys, keys) if one != other)
    yield from (f"{one}+{other}" for one, other in pairs)
    if 0 < offset <= MAX_OFFSET:
        yield from (f"{key}+{offset}" for key in keys)
    yield from (f"{factor}*{one}*{other}" for factor in FACTORS for one, other in pairs)
    yield from (f"{factor}*{one}/{other}" for factor in FACTORS for one, other in product(keys, keys) if one != other)
    for one, (a, b) in product(keys, pairs):
        if one not in (a, b):
            yield f"{a}*{b}/{one}"
            yield f"{a}/{one}*{b}"
            yield f"{b}/{one}*{a}"
            yield f"{one}/{a}*{a}+{one}/{a}*{b}*2"
            yield f"{one}/{b}*{b}+{one}/{b}*{a}*2"
            yield f"{a}*{one}+{b}*{one}"
            yield f"{a}*{one}+2*{b}*{one}"
            yield f"{b}*{one}+2*{a}*{one}"


def fallbacks(keys: Sequence[str]) -> list[str]:
    """Return expressions of lengths that a null may stand for."""
    shares = [f"{one}/{other}" for one, other in product(keys, keys) if one != other]
    return [*keys, *(f"{factor}*{key}" for factor in FACTORS for key in keys), *shares]


def fits(form: str, rows: Sequence[tuple[Mapping[str, Any], int]]) -> bool:
    """Return whether an expression equals all lengths; a sample in which it divides by zero tells nothing."""
    evaluated = evaluator(form)
    some = False
    for row, length in rows:
        value = evaluated(row)
        if value is None:
            continue
        if value != length:
            return False
        some = True
    return some


def evaluator(form: str) -> Callable[[Mapping[str, Any]], int | None]:
    """Return `library.value_of` for one expression, which is evaluated for many configurations."""
    terms = [FACTOR.findall(term) for term in form.split("+")]

    def value(row: Mapping[str, Any]) -> int | None:
        total = 0
        for factors in terms:
            found = 1
            for sign, part in factors:
                one = int(part) if part.isdecimal() else row.get(part)
                if one is None or (sign == "/" and not one):
                    return None
                found = found // one if sign == "/" else found * one
            total += found
        return total

    return value
