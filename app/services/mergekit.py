"""Recipes of mergekit as requests for a merge: its `merge_method`, models, slices and parameters in our own terms.

What a parameter is when a recipe leaves it out is mergekit's default (0.1.5), never ours, so that the request says all
of what mergekit would do. What cannot be said here is refused by the name that it has there.
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from worker.engine.catalog.methods import METHODS
from worker.engine.catalog.strict import did_you_mean
from worker.engine.catalog.values import EVERY_NAME

REQUIRED = object()
OWN_SCHEMES = ("local:", "hf:", "job:", "s3:")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
LONGEST_NAME = 60

Chain = Sequence[tuple[str, Mapping[str, Any]]]
"""Where parameters are looked for, the first that has one counting: (field, mapping)."""


class MergekitError(ValueError):
    """`field` is a path in mergekit's recipe."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Base(Enum):
    """What `base_model` is to a method."""

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
    """A number may be another for every tensor, a plain one may not."""
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
    "passthrough": Method(Base.MODEL),
}
"""By `merge_method`; the methods here have the same names."""

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
    """Of the base."""


def translated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What to post to `/merge` for a recipe of mergekit.

    Raises:
        MergekitError: the first thing in it that has no counterpart, or that mergekit itself would refuse.
    """
    _check_keys(recipe, KEYS, "")
    name = recipe["merge_method"]
    if not isinstance(name, str) or name not in TRANSLATED or name not in METHODS:
        known = [known for known in TRANSLATED if known in METHODS]
        raise MergekitError(
            "merge_method", f"'{str(name)[:40]}' has no counterpart here{did_you_mean(str(name), known)}"
        )
    for key in ("modules", "chat_template"):
        if recipe.get(key) is not None:
            raise MergekitError(key, "has no counterpart here; leave it out")
    if name == "passthrough":
        method, models, rest = _stacked(recipe)
    else:
        method, models, rest = _merged(TRANSLATED[name], recipe)
    return {
        "method": {"name": name, **method},
        "models": models,
        **rest,
        "output": {"dtype": _dtype(recipe), "vocabulary": _vocabulary(recipe), "align_heads": False},
    }


def fields_there(recipe: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, str]:
    """By field of `request`, the translation of `recipe`, the field of the recipe that it comes from."""
    fields = {
        "base": "base_model",
        "method": "parameters",
        "method.name": "merge_method",
        "output.dtype": "dtype" if recipe.get("out_dtype") is None else "out_dtype",
        "output.vocabulary": "tokenizer_source" if recipe.get("tokenizer") is None else "tokenizer.source",
    }
    if recipe["merge_method"] == "passthrough":
        stacked = [next(_entries(entry, "sources", place)) for place, entry in _entries(recipe, "slices")]
        fields |= {f"method.slices.{index}": f"{place}.layer_range" for index, (place, _) in enumerate(stacked)}
        shared: Chain = []
        sources = [Source(place, _reference(source, place), shared) for place, source in stacked]
    else:
        sources, shared, _, _ = _sources(recipe)
        everywhere = [*shared, *(pair for source in sources for pair in source.parameters)]
        for key, parameter in TRANSLATED[recipe["merge_method"]].parameters.items():
            fields[f"method.{parameter.ours or key}"] = _place_of(key, everywhere)
        if "layers" in request:
            fields["layers"] = f"{sources[0].place}.layer_range"
    found = {source.reference: source for source in reversed(sources)}
    for index, model in enumerate(request["models"]):
        source = found.get(model["checkpoint"], Source("base_model", model["checkpoint"], shared))
        fields[f"models.{index}"] = source.place
        fields[f"models.{index}.checkpoint"] = f"{source.place}.model" if source in sources else source.place
        fields[f"models.{index}.weight"] = _place_of("weight", source.parameters)
        for key in model.get("parameters", {}):
            fields[f"models.{index}.parameters.{key}"] = _place_of(key, source.parameters)
    return fields


def _merged(method: Method, recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The method's parameters, the models, and what else the request says."""
    name = recipe["merge_method"]
    sources, shared, base, layers = _sources(recipe)
    rest: dict[str, Any] = {} if layers is None else {"layers": layers}
    if base is None and method.base in (Base.ORIGIN, Base.FIRST):
        raise MergekitError("base_model", f"{name} needs it")
    if method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN):
        sources = [source for source in sources if source.reference != base]
        rest |= {} if base is None else {"base": base}
    elif base is not None:
        if all(source.reference != base for source in sources) and "models" in recipe:
            sources.append(Source("base_model", base, shared))
        sources.sort(key=lambda source: source.reference != base)  # config and tokenizer are those of the first
        rest |= {"base": base} if any(source.is_adapter for source in sources) else {}
    known = {*method.parameters, *method.without_effect, *(["weight"] if method.weighs_models else [])}
    for where, parameters in [*shared, *(pair for source in sources for pair in source.parameters)]:
        _check_keys(parameters, tuple(known), where)
    models: list[dict[str, Any]] = []
    for source, short in zip(sources, names_of([source.reference for source in sources]), strict=True):
        weight = _number(source.parameters, "weight", REQUIRED, source.place) if method.weighs_models else 1.0
        models.append({"name": short, "checkpoint": source.reference, "weight": weight})
    if name == "nuslerp":
        return {"vectors": _vectors(shared)}, models, rest
    ours = {}
    for key, parameter in method.parameters.items():
        value = _value(key, parameter, shared)
        called = parameter.ours or key
        if key in METHODS[name].parameters.per_model:
            own = [_number(source.parameters, key, parameter.default, source.place) for source in sources]
            if own and all(one == own[0] for one in own):
                value = own[0]
            for model, one in zip(models, own, strict=True):
                if one != value:
                    model.setdefault("parameters", {})[key] = one
        if called in METHODS[name].parameters.model_fields:
            ours[called] = value
        elif value != parameter.default:
            as_always = f"{key}: {str(parameter.default).lower()}"
            raise MergekitError(_place_of(key, shared), f"has no counterpart here; {name} does as with {as_always}")
    return ours, models, rest


def _stacked(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The same of `passthrough`: slices of one model each, one above the other."""
    if recipe.get("parameters"):
        raise MergekitError("parameters", "passthrough takes none here; leave them out")
    runs = []
    for place, entry in _entries(recipe, "slices"):
        _check_keys(entry, ("sources",), place)
        found = list(_entries(entry, "sources", place))
        if len(found) != 1:
            raise MergekitError(f"{place}.sources", "passthrough takes one model in each slice")
        [(inner, source)] = found
        _check_keys(source, ("model", "layer_range"), inner)
        runs.append((_reference(source, inner), _layer_range(source, inner)))
    references = list(dict.fromkeys(reference for reference, _ in runs))
    short = dict(zip(references, names_of(references), strict=True))
    models = [{"name": short[reference], "checkpoint": reference, "weight": 1.0} for reference in references]
    slices = [{"model": short[reference], "layers": list(layers)} for reference, layers in runs]
    return {"slices": slices}, models, {}


def _sources(recipe: Mapping[str, Any]) -> tuple[list[Source], Chain, str | None, int | None]:
    """The models, the parameters of all, the base, and how many layers the recipe says that the models have."""
    base = _optional_reference(recipe, "base_model", "base_model")
    shared: list[tuple[str, Mapping[str, Any]]] = [("parameters", _mapping(recipe, "parameters", "parameters"))]
    if (recipe.get("models") is None) == (recipe.get("slices") is None):
        raise MergekitError("models", "give either models or slices")
    if recipe.get("models") is not None:
        entries, allowed, ranges = list(_entries(recipe, "models")), ["model", "parameters"], set()
    else:
        slices = list(_entries(recipe, "slices"))
        if len(slices) != 1:
            raise MergekitError("slices", "several have no counterpart here but in passthrough; give all layers in one")
        [(place, one)] = slices
        _check_keys(one, ("sources", "base_model", "parameters"), place)
        base = _optional_reference(one, "base_model", f"{place}.base_model") or base
        shared.insert(0, (f"{place}.parameters", _mapping(one, "parameters", f"{place}.parameters")))
        entries, allowed = list(_entries(one, "sources", place)), ["model", "layer_range", "parameters"]
        ranges = {_layer_range(source, where) for where, source in entries}
        if len(ranges) != 1 or min(ranges)[0] != 0:
            raise MergekitError(place, "the layers of all sources must be all that the models have, as [0, 12]")
    sources = []
    for where, entry in entries:
        _check_keys(entry, allowed, where)
        own = (f"{where}.parameters", _mapping(entry, "parameters", f"{where}.parameters"))
        reference = _reference(entry, where, base)
        sources.append(Source(where, reference, [own, *shared], _adapter_of(base, entry["model"]) is not None))
    references = [source.reference for source in sources]
    for source in sources:
        if references.count(source.reference) > 1:
            raise MergekitError(f"{source.place}.model", f"'{source.reference}' is there twice")
    return sources, shared, base, ranges.pop()[1] if ranges else None


def _value(name: str, parameter: Parameter, shared: Chain) -> Any:
    if parameter.kind == "number":
        return _number(shared, name, parameter.default, "parameters")
    return _one_value(name, parameter, shared)


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
    _check_keys(entry, ("filter", "value"), place)
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
    if value < 0 and ".weight" in field:
        raise MergekitError(field, "negative weights have no counterpart here")
    return value


def _vectors(shared: Chain) -> str:
    """What `nuslerp` takes as one vector."""
    if _one_value("nuslerp_flatten", flag(True), shared):
        return "tensor"
    return "columns" if _one_value("nuslerp_row_wise", flag(False), shared) else "rows"


def names_of(references: Sequence[str]) -> list[str]:
    """Short and unique: the last part of each path, numbered where two are the same."""
    names: list[str] = []
    for reference in references:
        last = reference.partition(":")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", last)[:LONGEST_NAME].strip(".") or "model"
        number, name = 1, plain
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _reference(entry: Mapping[str, Any], place: str, base: str | None = None) -> str:
    """Of the model, or of the adapter in `BASE+ADAPTER`."""
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
    if name.startswith(OWN_SCHEMES):
        return name
    if "+" in name:
        of, _, adapter = name[:200].partition("+")
        problem = f"'{adapter}' is an adapter of '{of}', and a recipe can name those of base_model, but in passthrough"
        raise MergekitError(place, f"{problem}; in a request, name the adapter as the model and '{of}' as base")
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise MergekitError(place, f"'{name[:100]}' is a path; put it under a local root and write local:PATH")
    if not HUB_NAME.fullmatch(name):
        raise MergekitError(place, f"'{name[:100]}' is no ORG/NAME of the hub; of a folder write local:PATH")
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


def _vocabulary(recipe: Mapping[str, Any]) -> str:
    field, source = "tokenizer_source", recipe.get("tokenizer_source")
    tokenizer = recipe.get("tokenizer")
    if tokenizer is not None:
        if source is not None:
            raise MergekitError("tokenizer", "give either this or tokenizer_source")
        if not isinstance(tokenizer, dict):
            raise MergekitError("tokenizer", "give a mapping with source")
        _check_keys(tokenizer, ("source",), "tokenizer")
        field, source = "tokenizer.source", tokenizer.get("source", "union")
    if source is None:
        return "error"
    if source not in ("base", "union"):
        raise MergekitError(field, f"'{str(source)[:100]}' has no counterpart here; give base or union")
    return str(source)


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


def _check_keys(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in given:
        if key not in known:
            where = f"{place}.{key}" if place else str(key)
            raise MergekitError(where[:200], f"has no counterpart here{did_you_mean(str(key), list(known))}")


def _place_of(name: str, chain: Chain) -> str:
    return next((f"{place}.{name}" for place, given in chain if name in given), f"parameters.{name}")
