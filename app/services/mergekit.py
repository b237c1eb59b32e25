"""Recipes of mergekit as requests for a merge: its `merge_method`, models, slices and parameters in our own terms.

What a parameter is when a recipe leaves it out is mergekit's default (0.1.5), never ours, so that the request says all
of what mergekit would do. What cannot be said here is refused by the name that it has there.
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from itertools import accumulate
from typing import Any, Literal

from app.contracts.references import SCHEMES, is_reference
from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.primitives.values import EVERY_NAME

REQUIRED = object()
ADAPTER = re.compile(rf"\+({'|'.join(SCHEMES)}):")
"""What parts a model from its adapter where both are references. The path of a folder may have a plain `+`."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)
LONGEST_NAME = 60
MOST_NOTES = 50
BASE = "base"  # what `output.config_from` calls the base of a request
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat format ChatML."""

Chain = Sequence[tuple[str, Mapping[str, Any]]]
"""Places where parameters are looked for, (field, mapping); the first that has one counts."""


class MergekitError(ValueError):
    """`field` is a path in mergekit's recipe."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Base(Enum):
    """The role that `base_model` has for a method."""

    ORIGIN = "task vectors are differences from it"
    OPTIONAL_ORIGIN = "as ORIGIN, where it is given"
    FIRST = "the first of the models"
    MODEL = "a model like any other"


@dataclass(frozen=True)
class Parameter:
    """Of a method of mergekit.

    `ours` is the method's parameter here, where it is called otherwise. A method here that has none does what the
    default says.
    """

    default: Any = REQUIRED
    kind: Literal["number", "flag", "count", "plain"] = "number"
    """A number may differ by tensor; a plain value may not."""
    ours: str | None = None


@dataclass(frozen=True)
class Method:
    base: Base
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    weighs_models: bool = False
    without_effect: frozenset[str] = frozenset()
    """Parameters that mergekit takes and that change nothing."""


def flag(default: bool, ours: str | None = None) -> Parameter:
    return Parameter(default, "flag", ours)


def _task_vectors(normalize: bool, rescale: bool, **more: Parameter) -> Method:
    given = {"normalize": flag(normalize), "rescale": flag(rescale), "lambda": Parameter(1.0, ours="scale")}
    parameters = {**given, "density": Parameter(1.0), **more}
    return Method(Base.ORIGIN, parameters, weighs_models=True, without_effect=frozenset({"int8_mask"}))


TRANSLATED: dict[str, Method] = {
    "linear": Method(Base.MODEL, {"normalize": flag(True)}, weighs_models=True),
    "slerp": Method(Base.FIRST, {"t": Parameter()}),
    "nuslerp": Method(
        Base.OPTIONAL_ORIGIN,
        {"nuslerp_flatten": flag(True), "nuslerp_row_wise": flag(False)},
        weighs_models=True,
    ),
    "task_arithmetic": Method(
        Base.ORIGIN,
        {"normalize": flag(False), "lambda": Parameter(1.0, ours="scale")},
        weighs_models=True,
        without_effect=frozenset({"int8_mask", "rescale", "density"}),
    ),
    "ties": _task_vectors(normalize=True, rescale=False),
    "dare_linear": _task_vectors(normalize=False, rescale=True),
    "dare_ties": _task_vectors(normalize=False, rescale=True),
    "della": _task_vectors(normalize=True, rescale=True, epsilon=Parameter(0.15)),
    "della_linear": _task_vectors(normalize=False, rescale=True, epsilon=Parameter(0.15)),
    "breadcrumbs": _task_vectors(normalize=False, rescale=False, gamma=Parameter(0.01)),
    "breadcrumbs_ties": _task_vectors(normalize=False, rescale=False, gamma=Parameter(0.01)),
    "model_stock": Method(Base.ORIGIN, {"filter_wise": flag(False)}),
    "karcher": Method(Base.MODEL, {"max_iter": Parameter(10, "count"), "tol": Parameter(1e-5)}),
    "sce": Method(Base.ORIGIN, {"select_topk": Parameter(1.0)}, without_effect=frozenset({"int8_mask"})),
    "multislerp": Method(
        Base.OPTIONAL_ORIGIN,
        {"normalize_weights": flag(True), "eps": Parameter(1e-8, "plain")},
        weighs_models=True,
    ),
    "nearswap": Method(Base.ORIGIN, {"t": Parameter()}),
    "arcee_fusion": Method(Base.ORIGIN),
    "ram": Method(Base.ORIGIN, {"epsilon": Parameter(1e-5)}),
    "ramplus_tl": Method(Base.ORIGIN, {"epsilon": Parameter(1e-5), "r": Parameter(0.1), "alpha": Parameter(0.2)}),
    "passthrough": Method(Base.MODEL, {"scale": Parameter(1.0)}),
}
"""Translations by `merge_method`; the methods here have the same names."""

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One model of a merge, as the recipe names it."""

    place: str
    reference: str
    parameters: Chain
    is_adapter: bool = False
    """Whether it is an adapter of the base."""
    layers: tuple[int, int] | None = None
    """The range of layers; None means all."""


@dataclass(frozen=True)
class Part:
    """A slice of the result, or the whole result."""

    place: str
    sources: Sequence[Source]
    shared: Chain
    base: str | None

    def source_of(self, reference: str) -> Source | None:
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
    parts: Sequence[Part]
    base: str | None
    notes: Sequence[str]
    """Notes of the keys that mergekit ignores."""

    @property
    def is_sliced(self) -> bool:
        return self.parts[0].length is not None

    @property
    def starts(self) -> list[int]:
        """The first layer of the result in each part."""
        return [0, *accumulate(part.length or 0 for part in self.parts)][:-1]


def translated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What to post to `/merge` for a recipe of mergekit.

    Raises:
        MergekitError: the first thing in it that has no counterpart, or that mergekit itself would refuse.
    """
    read = _read(recipe)
    if read.name == "passthrough":
        method, models, rest = _stacked(read)
    else:
        method, models, rest = _merged(read)
    names = {model["checkpoint"]: model["name"] for model in models}
    notes = list(read.notes)
    output = {"dtype": _dtype(recipe), **_vocabulary(recipe, read, names, notes), "align_heads": False}
    if read.base is not None and read.method.base is Base.MODEL and output["vocabulary"] != "error":
        if read.name != "passthrough":
            rest.setdefault("base", read.base)  # whose row a token has that a model lacks
        elif read.base in names:
            output.setdefault("vocabulary_of", names[read.base])
    if read.base in names:
        output["config_from"] = names[read.base]
    elif read.base is not None and rest.get("base") == read.base:
        output["config_from"] = BASE
    elif read.base is not None:
        problem = (
            "no tensor is merged of it, so it is not read, and gives no configuration and no tokenizer as in mergekit"
        )
        notes.append(f"base_model: {problem}; those of {models[0]['name']} are published")
    return {
        "method": {"name": read.name, **method},
        "models": models,
        **rest,
        "output": output,
        "strict_filters": False,
        **({"notes": notes} if notes else {}),
    }


def fields_there(recipe: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's field behind each field of `request`, which is the translation of `recipe`."""
    read = _read(recipe)
    fields = {
        "base": "base_model",
        "method": "parameters",
        "method.name": "merge_method",
        "output.config_from": "base_model",
        "output.dtype": "dtype" if recipe.get("out_dtype") is None else "out_dtype",
        "output.vocabulary": "tokenizer_source" if recipe.get("tokenizer") is None else "tokenizer.source",
        "output.chat_template": "chat_template",
        "output.pad_to_multiple_of": "tokenizer.pad_to_multiple_of",
        "output.tokens": "tokenizer.tokens",
        "slices": read.parts[0].place,
    }
    for index, part in enumerate(read.parts):
        fields[f"slices.{index}"] = part.place
        fields[f"method.slices.{index}"] = f"{part.sources[0].place}.layer_range"
        merged = [source for source in part.sources if source.reference in {m["checkpoint"] for m in request["models"]}]
        for number, source in enumerate(_ordered(read, part, merged)):
            fields[f"slices.{index}.sources.{number}"] = f"{source.place}.layer_range"
    everywhere = [
        *(pair for part in read.parts for pair in part.shared),
        *(pair for part in read.parts for source in part.sources for pair in source.parameters),
    ]
    for key, parameter in read.method.parameters.items():
        fields[f"method.{parameter.ours or key}"] = _place_of(key, everywhere)
    found = {source.reference: source for part in reversed(read.parts) for source in reversed(part.sources)}
    for index, model in enumerate(request["models"]):
        source = found.get(model["checkpoint"], Source("base_model", model["checkpoint"], read.parts[0].shared))
        fields[f"models.{index}"] = source.place
        fields[f"models.{index}.checkpoint"] = source.place if source.place == "base_model" else f"{source.place}.model"
        fields[f"models.{index}.weight"] = _place_of("weight", source.parameters)
        for key in model.get("parameters", {}):
            fields[f"models.{index}.parameters.{key}"] = _place_of(key, source.parameters)
    return fields


def _read(recipe: Mapping[str, Any]) -> Recipe:
    notes: list[str] = []
    name = recipe["merge_method"]
    if not isinstance(name, str) or name not in TRANSLATED or name not in METHODS:
        known = [known for known in TRANSLATED if known in METHODS]
        raise MergekitError(
            "merge_method", f"'{str(name)[:40]}' has no counterpart here{did_you_mean(str(name), known)}"
        )
    _pass_over(recipe, KEYS, "", notes)
    method = TRANSLATED[name]
    base = _optional_reference(recipe, "base_model", "base_model")
    if base is None and method.base in (Base.ORIGIN, Base.FIRST) and not recipe.get("slices"):
        raise MergekitError("base_model", f"{name} needs it")
    parts = _parts(recipe, base, notes)
    known = [*method.parameters, *method.without_effect, *(["weight"] if method.weighs_models else [])]
    seen = set[str]()
    for part in parts:
        for where, parameters in [*part.shared, *(pair for s in part.sources for pair in s.parameters)]:
            if where not in seen:
                _pass_over(parameters, known, where, notes)
            seen.add(where)
    return Recipe(name, method, parts, base, notes)


def _parts(recipe: Mapping[str, Any], base: str | None, notes: list[str]) -> list[Part]:
    shared: list[tuple[str, Mapping[str, Any]]] = [("parameters", _mapping(recipe, "parameters", "parameters"))]
    given = [key for key in ("models", "slices", "modules") if recipe.get(key)]
    if len(given) != 1:
        raise MergekitError("models", "give either models or slices")
    inner, prefix = recipe, ""
    if given == ["modules"]:
        inner, prefix = _only_module(recipe, notes)
        shared.insert(0, (f"{prefix}parameters", _mapping(inner, "parameters", f"{prefix}parameters")))
    if inner.get("models"):
        entries = list(_entries(inner, "models", prefix.removesuffix(".")))
        return [_part("", entries, shared, base, notes, is_sliced=False)]
    parts = []
    for place, one in _entries(inner, "slices", prefix.removesuffix(".")):
        _pass_over(one, ("sources", "base_model", "parameters"), place, notes)
        own_base = _optional_reference(one, "base_model", f"{place}.base_model") or base
        chain = [(f"{place}.parameters", _mapping(one, "parameters", f"{place}.parameters")), *shared]
        parts.append(_part(place, list(_entries(one, "sources", place)), chain, own_base, notes, is_sliced=True))
    return parts


def _only_module(recipe: Mapping[str, Any], notes: list[str]) -> tuple[Mapping[str, Any], str]:
    modules = _mapping(recipe, "modules", "modules")
    if len(modules) != 1:
        problem = "several have no counterpart here: tensors of all modules are merged alike; give models or slices"
        raise MergekitError("modules", problem)
    [(name, module)] = modules.items()
    prefix = f"modules.{name}."
    if not isinstance(module, dict) or bool(module.get("models")) == bool(module.get("slices")):
        raise MergekitError(prefix[:-1], "give either models or slices")
    _pass_over(module, ("models", "slices", "parameters"), prefix[:-1], notes)
    return module, prefix


def _part(
    place: str,
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    shared: Chain,
    base: str | None,
    notes: list[str],
    *,
    is_sliced: bool,
) -> Part:
    sources: list[Source] = []
    for where, entry in entries:
        _pass_over(entry, ("model", "parameters", *(["layer_range"] if is_sliced else [])), where, notes)
        own = (f"{where}.parameters", _mapping(entry, "parameters", f"{where}.parameters"))
        reference, layers = _reference(entry, where, base), _layer_range(entry, where) if is_sliced else None
        is_adapter = _adapter_of(base, entry["model"]) is not None
        sources.append(Source(where, reference, [own, *shared], is_adapter, layers))
    references = [source.reference for source in sources]
    for source in sources:
        if references.count(source.reference) > 1:
            raise MergekitError(f"{source.place}.model", f"'{source.reference}' is there twice")
        if source.layers and sources[0].layers and _length(source.layers) != _length(sources[0].layers):
            raise MergekitError(f"{source.place}.layer_range", "all sources of a slice need the same number of layers")
    return Part(place, sources, shared, base)


def _length(layers: tuple[int, int]) -> int:
    return layers[1] - layers[0]


def _ordered(recipe: Recipe, part: Part, sources: Sequence[Source]) -> list[Source]:
    """The models of a part, the base first: configuration and tokenizer of the result are its own."""
    if recipe.method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN):
        return [source for source in sources if source.reference != part.base]
    return sorted(sources, key=lambda source: source.reference != part.base)


def _merged(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The method's parameters, the models, and the other fields of the request."""
    name, method = recipe.name, recipe.method
    rest: dict[str, Any] = {}
    from_base = method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN)
    parts: list[Part] = []
    slices: list[dict[str, Any]] = []
    for part in recipe.parts:
        sources = list(part.sources)
        of_base = None if part.base is None else part.source_of(part.base)
        if part.base is not None and of_base is None and not recipe.is_sliced and not from_base:
            sources.append(Source("base_model", part.base, part.shared))
        needs = method.base in (Base.ORIGIN, Base.FIRST) or (from_base and part.base is not None)
        if recipe.is_sliced and needs and of_base is None:
            raise MergekitError(f"{part.place}.sources", f"{name} needs base_model among them, with its layers")
        if not from_base and any(source.is_adapter for source in sources):
            rest["base"] = part.base
        parts.append(Part(part.place, _ordered(recipe, part, sources), part.shared, part.base))
        if from_base and part.base is not None and rest.setdefault("base", part.base) != part.base:
            raise MergekitError(f"{part.place}.base_model", f"{name} goes from one base in all slices")
        if of_base is not None and of_base.layers is not None and from_base:
            slices.append({"base_layers": list(of_base.layers)})
        else:
            slices.append({})
    references = list(dict.fromkeys(source.reference for part in parts for source in part.sources))
    short = dict(zip(references, names_of(references, _taken(recipe, references)), strict=True))
    if recipe.is_sliced:
        for one, part in zip(slices, parts, strict=True):
            if not part.sources:
                raise MergekitError(f"{part.place}.sources", "there is no model to merge beside base_model")
            one["sources"] = [_slice(source, short) for source in part.sources]
        rest["slices"] = slices
    models: list[dict[str, Any]] = []
    for reference in references:
        weight = _of_model(recipe, parts, reference, "weight", REQUIRED) if method.weighs_models else 1.0
        models.append({"name": short[reference], "checkpoint": reference, "weight": weight})
    if name == "nuslerp":
        return {"vectors": _vectors(recipe)}, models, rest
    ours = {}
    for key, parameter in method.parameters.items():
        value = _value(key, parameter, recipe, parts)
        called = parameter.ours or key
        if key in METHODS[name].parameters.per_model:
            own = [_of_model(recipe, parts, reference, key, parameter.default) for reference in references]
            if own and all(one == own[0] for one in own):
                value = own[0]
            for model, one in zip(models, own, strict=True):
                if one != value:
                    model.setdefault("parameters", {})[key] = one
        if called in METHODS[name].parameters.model_fields:
            ours[called] = value
        elif value != parameter.default:
            as_always = f"{key}: {str(parameter.default).lower()}"
            place = _place_of(key, [pair for part in parts for pair in part.shared])
            raise MergekitError(place, f"has no counterpart here; {name} does as with {as_always}")
    return ours, models, rest


def _stacked(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The same for `passthrough`: slices of one model each, stacked, or one whole model."""
    for part in recipe.parts:
        if len(part.sources) != 1 or (not recipe.is_sliced and recipe.base not in (None, part.sources[0].reference)):
            place = f"{part.place}.sources" if recipe.is_sliced else "models"
            raise MergekitError(place, "passthrough takes one model in each slice, and one where there are no slices")
    sources = [part.sources[0] for part in recipe.parts]
    references = list(dict.fromkeys(source.reference for source in sources))
    short = dict(zip(references, names_of(references), strict=True))
    models = [{"name": short[reference], "checkpoint": reference, "weight": 1.0} for reference in references]
    chains = [_plain_chain(source.parameters, "scale") for source in sources]
    settings = [
        _number(chain, "scale", 1.0, f"{source.place}.parameters")
        for chain, source in zip(chains, sources, strict=True)
    ]
    for setting, source, start in zip(settings, sources, recipe.starts, strict=True):
        _check_numbering(setting, source, start, "scale")
    scale = _over_parts(recipe, settings)
    slices = [_slice(source, short) for source in sources]
    return {"slices": slices, **({} if scale == 1 else {"scale": scale})}, models, {}


def _plain_chain(chain: Chain, name: str) -> Chain:
    """Drops values of null, which mean the default."""
    return [(where, {k: v for k, v in given.items() if k != name or v is not None}) for where, given in chain]


def _slice(source: Source, short: Mapping[str, str]) -> dict[str, Any]:
    return {"model": short[source.reference], **({} if source.layers is None else {"layers": list(source.layers)})}


def _of_model(recipe: Recipe, parts: Sequence[Part], reference: str, name: str, default: Any) -> Any:
    """The value of a model's own parameter over all parts."""
    settings: list[Any] = []
    for part, start in zip(parts, recipe.starts, strict=True):
        source = part.source_of(reference)
        if source is None:
            settings.append(None)
            continue
        settings.append(_number(source.parameters, name, default, f"{source.place}.parameters"))
        _check_numbering(settings[-1], source, start, name)
    return _over_parts(recipe, settings)


def _check_numbering(setting: Any, source: Source, start: int, name: str) -> None:
    """mergekit looks for filters of a model's own parameters in the names that its tensors have before they are put
    together."""
    if source.layers is None or source.layers[0] == start or not isinstance(setting, list):
        return
    for entry in setting:
        if isinstance(entry, dict) and re.search(r"(^|\.)\d+(\.|\*?$)", entry["filter"].strip("*")):
            problem = f"filter '{entry['filter'].strip('*')}' has a layer's number, and the slice numbers layers anew"
            raise MergekitError(_place_of(name, source.parameters), f"{problem}; give parts of names without numbers")


def _over_parts(recipe: Recipe, settings: Sequence[Any]) -> Any:
    """A `PerTensor` value with mergekit's numbers, of what the parameter is in each part; None: it has no say there.

    A list of numbers is of layers alone there, and what lies outside of them has the first.
    """
    known = [setting for setting in settings if setting is not None]
    if len(known) == 1 and len(settings) == 1:
        return _placed(known[0], [None])
    if all(setting == known[0] for setting in known) and not _has_lists(known[0]):
        return known[0]
    filters: list[dict[str, Any]] = []
    for index, setting in enumerate(settings):
        if setting is None:
            continue
        start = recipe.starts[index]
        run: list[Any] = [[start, start + (recipe.parts[index].length or 0)]]
        outer = [*(["before"] if index == 0 else []), *(["after"] if index == len(settings) - 1 else [])]
        filters += _placed(setting, [*run, *outer], always=True)
    return filters


def _has_lists(setting: Any) -> bool:
    if not isinstance(setting, list):
        return False
    return any(not isinstance(entry, dict) or isinstance(entry["value"], list) for entry in setting)


def _placed(setting: Any, places: Sequence[Any], *, always: bool = False) -> Any:
    """Adds a `where` for each of these places; None means all, which takes two entries for a list of numbers."""
    if not always and not _has_lists(setting):
        return setting
    is_plain = not isinstance(setting, list) or not any(isinstance(entry, dict) for entry in setting)
    entries = [{"filter": EVERY_NAME, "value": setting}] if is_plain else setting
    found = []
    for where in places:
        for entry in entries:
            value = entry["value"]
            first = value[0] if isinstance(value, list) else value
            if where is None and isinstance(value, list):
                found += [{**entry, "where": "layers"}, {**entry, "value": first}]
            elif where is None:
                found.append(entry)
            else:
                found.append({**entry, "where": where, "value": value if isinstance(where, list) else first})
    return found


def _value(name: str, parameter: Parameter, recipe: Recipe, parts: Sequence[Part]) -> Any:
    if parameter.kind == "number":
        return _over_parts(recipe, [_number(part.shared, name, parameter.default, "parameters") for part in parts])
    values = [_one_value(name, parameter, part.shared) for part in parts]
    for value, part in zip(values, parts, strict=True):
        if value != values[0]:
            raise MergekitError(_place_of(name, part.shared), "must be the same in all slices")
    return values[0]


def _one_value(name: str, parameter: Parameter, chain: Chain) -> Any:
    """A flag or a count: of all tensors."""
    place, value = next(((p, given[name]) for p, given in chain if name in given), ("", parameter.default))
    if parameter.kind == "flag" and value in (True, False):
        return bool(value)
    if parameter.kind == "count" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if parameter.kind == "plain" and not isinstance(value, list | dict):
        return _numbers(value, f"{place}.{name}")
    wanted = {"flag": "true or false", "count": "a whole number", "plain": "one number"}[parameter.kind]
    raise MergekitError(f"{place}.{name}", f"give {wanted}, for all tensors")


def _number(chain: Chain, name: str, default: Any, place: str) -> Any:
    """A `PerTensor` value. Where no filter of one mapping matches, mergekit looks into the next."""
    filters: list[dict[str, Any]] = []
    value = default
    for where, given in chain:
        found = given.get(name)
        if found is None or found == []:
            continue
        field = f"{where}.{name}"
        entries = [found] if isinstance(found, dict) else found
        if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
            value = _numbers(entries, field)
            break
        for index, entry in enumerate(entries):
            filters.append(_filter(entry, f"{field}.{index}"))
        if any(entry["filter"] == EVERY_NAME for entry in filters):
            break
    else:
        if value is REQUIRED:
            raise MergekitError(
                f"{place}.{name}", "is needed for every tensor; give a number, or an entry without filter"
            )
    if not filters:
        return value
    last = next((i for i, entry in enumerate(filters) if entry["filter"] == EVERY_NAME), None)
    return [*filters, {"filter": EVERY_NAME, "value": value}] if last is None else filters[: last + 1]


def _filter(entry: Any, place: str) -> dict[str, Any]:
    """mergekit's filter is a part of the name, ours a glob of all of it."""
    if not isinstance(entry, dict):
        raise MergekitError(place, "give an entry with value, and with filter if it is not for all tensors")
    part = entry.get("filter")
    if part is not None and (not isinstance(part, str) or not part):
        raise MergekitError(f"{place}.filter", "give a part of the names of tensors")
    pattern = EVERY_NAME if part in (None, "*") else f"*{glob.escape(str(part))}*"
    return {"filter": pattern, "value": _numbers(entry.get("value"), f"{place}.value")}


def _numbers(given: Any, field: str) -> Any:
    """A number, or a list of them, in which YAML may have left 1e-3 a text."""
    if isinstance(given, list):
        if not given:
            raise MergekitError(field, "give at least one number")
        return [_numbers(value, f"{field}.{index}") for index, value in enumerate(given)]
    try:
        value = float(given) if isinstance(given, int | float | str) and not isinstance(given, bool) else None
    except (ValueError, OverflowError):
        value = None
    if value is None:
        raise MergekitError(field, "give a number, a list of numbers, or a list of entries with filter and value")
    return value


def _taken(recipe: Recipe, references: Sequence[str]) -> list[str]:
    """Names that no model may have: if the base is none of them, `base` is the base."""
    return [] if recipe.base is None or recipe.base in references else [BASE]


def _vectors(recipe: Recipe) -> str:
    """The part of a tensor that `nuslerp` takes as one vector."""
    if _value("nuslerp_flatten", flag(True), recipe, recipe.parts):
        return "tensor"
    return "columns" if _value("nuslerp_row_wise", flag(False), recipe, recipe.parts) else "rows"


def names_of(references: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Short and unique: the last part of each path, numbered where two are the same, or the name is taken."""
    names: list[str] = []
    for reference in references:
        last = reference.partition(":")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", last)[:LONGEST_NAME].strip(".") or "model"
        number, name = 1, plain
        while name in (*names, *taken):
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _reference(entry: Mapping[str, Any], place: str, base: str | None = None) -> str:
    """The reference of the model, or of the adapter in `BASE+ADAPTER`."""
    adapter = _adapter_of(base, entry.get("model"))
    known = entry if adapter is None else {"model": adapter}
    reference = _optional_reference(known, "model", f"{place}.model")
    if reference is None:
        raise MergekitError(f"{place}.model", "is missing")
    return reference


def _adapter_of(base: str | None, name: object) -> str | None:
    if base is None or not isinstance(name, str):
        return None
    start = next((f"{b}+" for b in (base, base.removeprefix("hf:")) if name.startswith(f"{b}+")), None)
    return None if start is None else name.removeprefix(start)


def _optional_reference(entry: Mapping[str, Any], key: str, place: str) -> str | None:
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
        advice = "write local:PATH of a folder under its local root; `maskmerge merge --local-root DIR` does so for you"
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


def _dtype(recipe: Mapping[str, Any]) -> str:
    """mergekit also computes in `dtype`; here that is float32 or better."""
    for key in ("out_dtype", "dtype"):
        dtype = recipe.get(key)
        if dtype is not None:
            known = ("float64", "float32", "bfloat16", "float16")
            plain = str(dtype).removeprefix("torch.")
            if plain not in known:
                raise MergekitError(key, f"'{plain[:40]}' is not available; available are {', '.join(known)}")
            return plain
    return "auto"


def _vocabulary(recipe: Mapping[str, Any], read: Recipe, names: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """The fields of `output` that say whose tokens the result has.

    Args:
        names: of the models, by their references.
    """
    field, source = "tokenizer_source", recipe.get("tokenizer_source")
    tokenizer = recipe.get("tokenizer")
    if tokenizer is not None:
        if source is not None:
            raise MergekitError("tokenizer", "give either this or tokenizer_source")
        if not isinstance(tokenizer, dict):
            raise MergekitError("tokenizer", "give a mapping with source")
        _pass_over(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", notes)
        field, source = "tokenizer.source", tokenizer.get("source", "union")
    found: dict[str, Any] = {}
    if recipe.get("chat_template"):
        found["chat_template"] = _chat_template(recipe["chat_template"])
    if source is None:
        return {"vocabulary": "error", **found}
    if source not in ("base", "union"):
        reference = _optional_reference({"model": source}, "model", field)
        if reference in names and reference != read.base:
            found["vocabulary_of"] = names[str(reference)]
        elif reference != read.base:
            known = ", ".join([*([read.base] if read.base else []), *names])
            problem = f"'{reference}' is no model of this recipe, whose tokenizer could be kept; models are {known}"
            raise MergekitError(field, problem)
        source = "base"
    tokenizer = tokenizer or {}
    if tokenizer.get("pad_to_multiple_of"):
        found["pad_to_multiple_of"] = tokenizer["pad_to_multiple_of"]
    tokens = _mapping(tokenizer, "tokens", "tokenizer.tokens")
    if tokens:
        found["tokens"] = {
            str(token): _token(said, f"tokenizer.tokens.{token}"[:200], read, names) for token, said in tokens.items()
        }
    return {"vocabulary": str(source), **found}


def _chat_template(given: object) -> str:
    """The chat template: Jinja, `auto`, or `chatml`, the only named template of mergekit that is known here."""
    if given == "chatml":
        return CHATML
    if not isinstance(given, str) or (given != "auto" and "{" not in given):
        problem = f"'{str(given)[:40]}' is the name of a file of mergekit's, or none"
        raise MergekitError("chat_template", f"{problem}; give the template itself, chatml, or auto")
    return given


def _token(said: Any, place: str, read: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """Translates an entry of `tokenizer.tokens`: whose row a token gets."""
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise MergekitError(place, "give a mapping with source, and with force if all models are to have its row")
    source, force = said.get("source"), bool(said.get("force", False))
    if source is None:
        if force:
            raise MergekitError(place, "force needs a source")
        return {}
    more: dict[str, Any] = {}
    if isinstance(source, dict):
        if source.get("kind") == "zero":
            return {"source": "zero", "force": force}
        if source.get("kind") != "model_token":
            raise MergekitError(f"{place}.source", "give a model, or a mapping of kind zero or model_token")
        more = {"token": source.get("token"), "id": source.get("token_id")}
        source = source.get("model")
    reference = _optional_reference({"model": source}, "model", f"{place}.source")
    if reference in names:
        return {"source": "model", "model": names[str(reference)], **more, "force": force}
    if reference is not None and reference == read.base:
        return {"source": "base", **more, "force": force}
    raise MergekitError(f"{place}.source", f"'{reference}' is no model of this recipe")


def _entries(recipe: Mapping[str, Any], key: str, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, mapping) of each entry of a list."""
    where = f"{place}.{key}" if place else key
    entries = recipe.get(key)
    if not isinstance(entries, list) or not entries:
        raise MergekitError(where, "give a list of at least one entry")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise MergekitError(f"{where}.{index}", "give a mapping")
        yield f"{where}.{index}", entry


def _mapping(recipe: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    found = recipe.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MergekitError(place, "give a mapping")
    return found


def _pass_over(given: Mapping[str, Any], known: Sequence[str], place: str, notes: list[str]) -> None:
    """Adds notes of keys that mergekit does not read."""
    for key in given:
        if key not in known and len(notes) < MOST_NOTES:
            where = f"{place}.{key}" if place else str(key)
            near = get_close_matches(str(key)[:LONGEST_NAME], known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            notes.append(f"{where[:200]}: mergekit passes over it, and so does this merge{hint}")


def _place_of(name: str, chain: Chain) -> str:
    return next((f"{place}.{name}" for place, given in chain if name in given), f"parameters.{name}")
