"""Makes the method, the models and the slices of a request for a recipe of mergekit."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.services.mergekit.known import REQUIRED, Base
from app.services.mergekit.parameters import (
    check_numbering,
    number_of,
    over_parts,
    plain_chain,
    value_of,
    value_of_model,
    vectors,
)
from app.services.mergekit.recipe import LONGEST_NAME, MergekitError, Recipe, SlicePart, SliceSource, place_of
from worker.engine.catalog.methods import METHODS

BASE = "base"  # name of a request's base in `output.config_from`


def merged(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return the method's parameters, the models, and the other fields of the request."""
    name, method = recipe.name, recipe.method
    rest: dict[str, Any] = {}
    from_base = method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN)
    parts: list[SlicePart] = []
    slices: list[dict[str, Any]] = []
    for part in recipe.parts:
        sources = list(part.sources)
        of_base = None if part.base is None else part.source_of(part.base)
        if part.base is not None and of_base is None and not recipe.is_sliced and not from_base:
            sources.append(SliceSource("base_model", part.base, part.shared))
        needs = method.base in (Base.ORIGIN, Base.FIRST) or (from_base and part.base is not None)
        if recipe.is_sliced and needs and of_base is None:
            raise MergekitError(f"{part.place}.sources", f"{name} needs base_model among them, with its layers")
        if not from_base and any(source.is_adapter for source in sources):
            rest["base"] = part.base
        parts.append(SlicePart(part.place, ordered(recipe, part, sources), part.shared, part.base))
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
        weight = value_of_model(recipe, parts, reference, "weight", REQUIRED) if method.weighs_models else 1.0
        models.append({"name": short[reference], "checkpoint": reference, "weight": weight})
    if name == "nuslerp":
        return {"vectors": vectors(recipe)}, models, rest
    ours = {}
    for key, parameter in method.parameters.items():
        value = value_of(key, parameter, recipe, parts)
        called = parameter.ours or key
        if key in METHODS[name].parameters.per_model:
            own = [value_of_model(recipe, parts, reference, key, parameter.default) for reference in references]
            if own and all(one == own[0] for one in own):
                value = own[0]
            for model, one in zip(models, own, strict=True):
                if one != value:
                    model.setdefault("parameters", {})[key] = one
        if called in METHODS[name].parameters.model_fields:
            ours[called] = value
        elif value != parameter.default:
            as_always = f"{key}: {str(parameter.default).lower()}"
            place = place_of(key, [pair for part in parts for pair in part.shared])
            raise MergekitError(place, f"has no counterpart here; {name} does as with {as_always}")
    return ours, models, rest


def stacked(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return the same for `passthrough`: slices of one model each, stacked, or one whole model."""
    for part in recipe.parts:
        if len(part.sources) != 1 or (not recipe.is_sliced and recipe.base not in (None, part.sources[0].reference)):
            place = f"{part.place}.sources" if recipe.is_sliced else "models"
            raise MergekitError(place, "passthrough takes one model in each slice, and one where there are no slices")
    sources = [part.sources[0] for part in recipe.parts]
    references = list(dict.fromkeys(source.reference for source in sources))
    short = dict(zip(references, names_of(references), strict=True))
    models = [{"name": short[reference], "checkpoint": reference, "weight": 1.0} for reference in references]
    chains = [plain_chain(source.parameters, "scale") for source in sources]
    settings = [
        number_of(chain, "scale", 1.0, f"{source.place}.parameters")
        for chain, source in zip(chains, sources, strict=True)
    ]
    for setting, source, start in zip(settings, sources, recipe.starts, strict=True):
        check_numbering(setting, source, start, "scale")
    scale = over_parts(recipe, settings)
    slices = [_slice(source, short) for source in sources]
    return {"slices": slices, **({} if scale == 1 else {"scale": scale})}, models, {}


def ordered(recipe: Recipe, part: SlicePart, sources: Sequence[SliceSource]) -> list[SliceSource]:
    """Return the models of a part, the base first: configuration and tokenizer of the result are its own."""
    if recipe.method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN):
        return [source for source in sources if source.reference != part.base]
    return sorted(sources, key=lambda source: source.reference != part.base)


def _slice(source: SliceSource, short: Mapping[str, str]) -> dict[str, Any]:
    return {"model": short[source.reference], **({} if source.layers is None else {"layers": list(source.layers)})}


def _taken(recipe: Recipe, references: Sequence[str]) -> list[str]:
    """Return names that no model may have: if the base is not among the models, `base` is the base."""
    return [] if recipe.base is None or recipe.base in references else [BASE]


def names_of(references: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Return short and unique names: the last part of each path, numbered if two are the same or a name is taken."""
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
