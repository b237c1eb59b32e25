"""Reads a recipe of mergekit: its models, its slices, and the places where its parameters are."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate
from typing import Any

from app.contracts.references import SCHEMES, is_reference
from app.services.mergekit.known import TRANSLATED, Base, Method
from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.primitives.strict import did_you_mean

ADAPTER = re.compile(rf"\+({'|'.join(SCHEMES)}):")
"""Matches the text between a model and its adapter if both are references. A folder's path may have a plain `+`."""


HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)


LONGEST_NAME = 60


MOST_NOTES = 50


KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip


FLAGS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""Words that YAML 1.1, as which mergekit reads recipes, takes for true and false."""


Chain = Sequence[tuple[str, Mapping[str, Any]]]
"""Places where parameters are looked for, each (field, mapping); the first that has a parameter counts."""


class MergekitError(ValueError):
    """The recipe cannot be translated. `field` is a path in mergekit's recipe."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True)
class SliceSource:
    """One model of a merge, as the recipe names it."""

    place: str
    reference: str
    parameters: Chain
    is_adapter: bool = False
    """Whether it is an adapter of the base."""
    layers: tuple[int, int] | None = None
    """Range of layers; None means all."""


@dataclass(frozen=True)
class SlicePart:
    """A slice of the result, or the whole result."""

    place: str
    sources: Sequence[SliceSource]
    shared: Chain
    base: str | None

    def source_of(self, reference: str) -> SliceSource | None:
        return next((source for source in self.sources if source.reference == reference), None)

    @property
    def length(self) -> int | None:
        layers = self.sources[0].layers
        return None if layers is None else layers[1] - layers[0]


@dataclass(frozen=True)
class Recipe:
    """A recipe without the keys that mergekit ignores."""

    name: str
    method: Method
    parts: Sequence[SlicePart]
    base: str | None
    notes: Sequence[str]
    """Notes of the keys that mergekit ignores."""

    @property
    def is_sliced(self) -> bool:
        return self.parts[0].length is not None

    @property
    def starts(self) -> list[int]:
        """Number of the result's first layer in each part."""
        return [0, *accumulate(part.length or 0 for part in self.parts)][:-1]


def read_recipe(recipe: Mapping[str, Any]) -> Recipe:
    notes: list[str] = []
    name = recipe["merge_method"]
    if not isinstance(name, str) or name not in TRANSLATED or name not in METHODS:
        known = [known for known in TRANSLATED if known in METHODS]
        raise MergekitError(
            "merge_method", f"'{str(name)[:40]}' has no counterpart here{did_you_mean(str(name), known)}"
        )
    pass_over(recipe, KEYS, "", notes)
    method = TRANSLATED[name]
    base = optional_reference(recipe, "base_model", "base_model")
    if base is None and method.base in (Base.ORIGIN, Base.FIRST) and not recipe.get("slices"):
        raise MergekitError("base_model", f"{name} needs it")
    parts = _parts(recipe, base, notes)
    known = [*method.parameters, *method.without_effect, *(["weight"] if method.weighs_models else [])]
    seen = set[str]()
    for part in parts:
        for where, parameters in [*part.shared, *(pair for s in part.sources for pair in s.parameters)]:
            if where not in seen:
                pass_over(parameters, known, where, notes)
            seen.add(where)
    return Recipe(name, method, parts, base, notes)


def _parts(recipe: Mapping[str, Any], base: str | None, notes: list[str]) -> list[SlicePart]:
    shared: list[tuple[str, Mapping[str, Any]]] = [("parameters", mapping_of(recipe, "parameters", "parameters"))]
    given = [key for key in ("models", "slices", "modules") if recipe.get(key)]
    if len(given) != 1:
        raise MergekitError("models", "give either models or slices")
    inner, prefix = recipe, ""
    if given == ["modules"]:
        inner, prefix = _only_module(recipe, notes)
        shared.insert(0, (f"{prefix}parameters", mapping_of(inner, "parameters", f"{prefix}parameters")))
    if inner.get("models"):
        entries = list(_entries(inner, "models", prefix.removesuffix(".")))
        return [_part("", entries, shared, base, notes, is_sliced=False)]
    parts = []
    for place, one in _entries(inner, "slices", prefix.removesuffix(".")):
        pass_over(one, ("sources", "base_model", "parameters"), place, notes)
        own_base = optional_reference(one, "base_model", f"{place}.base_model") or base
        chain = [(f"{place}.parameters", mapping_of(one, "parameters", f"{place}.parameters")), *shared]
        parts.append(_part(place, list(_entries(one, "sources", place)), chain, own_base, notes, is_sliced=True))
    return parts


def _only_module(recipe: Mapping[str, Any], notes: list[str]) -> tuple[Mapping[str, Any], str]:
    modules = mapping_of(recipe, "modules", "modules")
    if len(modules) != 1:
        problem = "several have no counterpart here: tensors of all modules are merged alike; give models or slices"
        raise MergekitError("modules", problem)
    [(name, module)] = modules.items()
    prefix = f"modules.{name}."
    if not isinstance(module, dict) or bool(module.get("models")) == bool(module.get("slices")):
        raise MergekitError(prefix[:-1], "give either models or slices")
    pass_over(module, ("models", "slices", "parameters"), prefix[:-1], notes)
    return module, prefix


def _part(
    place: str,
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    shared: Chain,
    base: str | None,
    notes: list[str],
    *,
    is_sliced: bool,
) -> SlicePart:
    sources: list[SliceSource] = []
    for where, entry in entries:
        pass_over(entry, ("model", "parameters", *(["layer_range"] if is_sliced else [])), where, notes)
        own = (f"{where}.parameters", mapping_of(entry, "parameters", f"{where}.parameters"))
        reference, layers = _reference(entry, where, base), _layer_range(entry, where) if is_sliced else None
        is_adapter = _adapter_of(base, entry["model"]) is not None
        sources.append(SliceSource(where, reference, [own, *shared], is_adapter, layers))
    references = [source.reference for source in sources]
    for source in sources:
        if references.count(source.reference) > 1:
            raise MergekitError(f"{source.place}.model", f"'{source.reference}' is there twice")
        if source.layers and sources[0].layers and _length(source.layers) != _length(sources[0].layers):
            raise MergekitError(f"{source.place}.layer_range", "all sources of a slice need the same number of layers")
    return SlicePart(place, sources, shared, base)


def _length(layers: tuple[int, int]) -> int:
    return layers[1] - layers[0]


def _reference(entry: Mapping[str, Any], place: str, base: str | None = None) -> str:
    """Return the reference of the model, or of the adapter in `BASE+ADAPTER`."""
    adapter = _adapter_of(base, entry.get("model"))
    known = entry if adapter is None else {"model": adapter}
    reference = optional_reference(known, "model", f"{place}.model")
    if reference is None:
        raise MergekitError(f"{place}.model", "is missing")
    return reference


def _adapter_of(base: str | None, name: object) -> str | None:
    if base is None or not isinstance(name, str):
        return None
    start = next((f"{b}+" for b in (base, base.removeprefix("hf:")) if name.startswith(f"{b}+")), None)
    return None if start is None else name.removeprefix(start)


def optional_reference(entry: Mapping[str, Any], key: str, place: str) -> str | None:
    name = entry.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise MergekitError(place, "give a name, as ORG/NAME or local:PATH")
    is_own = is_reference(name)
    if ADAPTER.search(name) or (not is_own and "+" in name):
        of, _, adapter = name[:200].partition("+")
        problem = f"'{adapter}' is an adapter of '{of}', which must be the recipe's base_model"
        raise MergekitError(place, f"{problem}; in our own form, name the adapter as the model and '{of}' as base")
    if is_own:
        return name
    if name.startswith(("/", ".", "~")) or "\\" in name:
        problem = f"'{name[:100]}' is a path of your machine, which a service does not know"
        advice = (
            "write local:PATH of a folder under its local root; `maskmerge submit --local-root DIR` does so for you"
        )
        raise MergekitError(place, f"{problem}; {advice}")
    if not HUB_NAME.fullmatch(name):
        raise MergekitError(place, f"'{name[:100]}' is no name on the hub; of a folder write local:PATH")
    return f"hf:{name}"


def _layer_range(source: Mapping[str, Any], place: str) -> tuple[int, int]:
    given = source.get("layer_range")
    if (
        isinstance(given, list)
        and len(given) == 2
        and all(type(end) is int for end in given)
        and 0 <= given[0] < given[1]
    ):
        return given[0], given[1]
    raise MergekitError(f"{place}.layer_range", "give the first layer and the one after the last, as [0, 12]")


def _entries(recipe: Mapping[str, Any], key: str, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, mapping) of each entry of a list."""
    where = f"{place}.{key}" if place else key
    entries = recipe.get(key)
    if not isinstance(entries, list) or not entries:
        raise MergekitError(where, "give a list of at least one entry")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise MergekitError(f"{where}.{index}", "give a mapping")
        yield f"{where}.{index}", entry


def mapping_of(recipe: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    found = recipe.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MergekitError(place, "give a mapping")
    return found


def flag_of(value: object, place: str) -> bool:
    """Return true or false, as which mergekit also reads some words."""
    known = FLAGS.get(value.lower(), value) if isinstance(value, str) else value
    if known in (True, False):
        return bool(known)
    raise MergekitError(place, "give true or false")


def pass_over(given: Mapping[str, Any], known: Sequence[str], place: str, notes: list[str]) -> None:
    """Add notes of keys that mergekit does not read."""
    for key in given:
        if key not in known and len(notes) < MOST_NOTES:
            where = f"{place}.{key}" if place else str(key)
            near = get_close_matches(str(key)[:LONGEST_NAME], known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            notes.append(f"{where[:200]}: mergekit passes over it, and so does this merge{hint}")


def place_of(name: str, chain: Chain) -> str:
    return next((f"{place}.{name}" for place, given in chain if name in given), f"parameters.{name}")
