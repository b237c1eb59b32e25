"""Translates parameters of a recipe of mergekit, with its filters and lists by layers, into values of requests."""

import glob
import re
from collections.abc import Sequence
from typing import Any

from app.services.mergekit.known import REQUIRED, Parameter, flag
from app.services.mergekit.recipe import Chain, MergekitError, Recipe, SlicePart, SliceSource, flag_of, place_of
from worker.engine.catalog.primitives.values import EVERY_NAME


def value_of(name: str, parameter: Parameter, recipe: Recipe, parts: Sequence[SlicePart]) -> Any:
    if parameter.kind == "number":
        return over_parts(recipe, [number_of(part.shared, name, parameter.default, "parameters") for part in parts])
    values = [_one_value(name, parameter, part.shared) for part in parts]
    for value, part in zip(values, parts, strict=True):
        if value != values[0]:
            raise MergekitError(place_of(name, part.shared), "must be the same in all slices")
    return values[0]


def value_of_model(recipe: Recipe, parts: Sequence[SlicePart], reference: str, name: str, default: Any) -> Any:
    """Return the value of a model's own parameter over all parts."""
    settings: list[Any] = []
    for part, start in zip(parts, recipe.starts, strict=True):
        source = part.source_of(reference)
        if source is None:
            settings.append(None)
            continue
        settings.append(number_of(source.parameters, name, default, f"{source.place}.parameters"))
        check_numbering(settings[-1], source, start, name)
    return over_parts(recipe, settings)


def number_of(chain: Chain, name: str, default: Any, place: str) -> Any:
    """Return a `PerTensor` value. Where no filter of one mapping matches, mergekit looks into the next."""
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


def _one_value(name: str, parameter: Parameter, chain: Chain) -> Any:
    """Return a flag or a count, which is the same for all tensors."""
    place, value = next(((p, given[name]) for p, given in chain if name in given), ("", parameter.default))
    if parameter.kind == "flag":
        return flag_of(value, f"{place}.{name}")
    if parameter.kind == "count" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if parameter.kind == "plain" and not isinstance(value, list | dict):
        return _numbers(value, f"{place}.{name}")
    wanted = {"count": "a whole number", "plain": "one number"}[parameter.kind]
    raise MergekitError(f"{place}.{name}", f"give {wanted}, for all tensors")


def vectors(recipe: Recipe) -> str:
    """Return the part of a tensor that `nuslerp` takes as one vector."""
    if value_of("nuslerp_flatten", flag(True), recipe, recipe.parts):
        return "tensor"
    return "columns" if value_of("nuslerp_row_wise", flag(False), recipe, recipe.parts) else "rows"


def _filter(entry: Any, place: str) -> dict[str, Any]:
    """Translate a filter: mergekit's is a part of the name, ours a glob for all of it."""
    if not isinstance(entry, dict):
        raise MergekitError(place, "give an entry with value, and with filter if it is not for all tensors")
    part = entry.get("filter")
    if part is not None and (not isinstance(part, str) or not part):
        raise MergekitError(f"{place}.filter", "give a part of the names of tensors")
    pattern = EVERY_NAME if part in (None, "*") else f"*{glob.escape(str(part))}*"
    return {"filter": pattern, "value": _numbers(entry.get("value"), f"{place}.value")}


def _numbers(given: Any, field: str) -> Any:
    """Read a number or a list of numbers, in which YAML may have left 1e-3 as a text."""
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


def plain_chain(chain: Chain, name: str) -> Chain:
    """Drop values of null, which mean the default."""
    return [(where, {k: v for k, v in given.items() if k != name or v is not None}) for where, given in chain]


def check_numbering(setting: Any, source: SliceSource, start: int, name: str) -> None:
    """Check that filters of a model's own parameters do not depend on the numbers of layers.

    mergekit matches them with the names that the model's tensors have before they are put together.
    """
    if source.layers is None or source.layers[0] == start or not isinstance(setting, list):
        return
    for entry in setting:
        if isinstance(entry, dict) and re.search(r"(^|\.)\d+(\.|\*?$)", entry["filter"].strip("*")):
            problem = f"filter '{entry['filter'].strip('*')}' has a layer's number, and the slice numbers layers anew"
            raise MergekitError(place_of(name, source.parameters), f"{problem}; give parts of names without numbers")


def over_parts(recipe: Recipe, settings: Sequence[Any]) -> Any:
    """Return a `PerTensor` value with mergekit's numbers from a parameter's setting in each part.

    None: the parameter has no influence in a part. A list of numbers is for layers alone there, and tensors outside the
    layers have the first number.
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
    """Add a `where` for each of these places; None means all, which takes two entries for a list of numbers."""
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
