"""Translates recipes of mergekit into requests for a merge, with models, slices and parameters in our own terms.

Whatever has no counterpart here is refused by its name in mergekit.
"""

from collections.abc import Mapping
from typing import Any

from app.services.mergekit.known import Base
from app.services.mergekit.models import BASE, merged, ordered, stacked
from app.services.mergekit.recipe import MergekitError, SliceSource, place_of, read_recipe
from app.services.mergekit.tokens import vocabulary


def translated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body to post to `/merge` for a recipe of mergekit.

    Raises:
        MergekitError: the first thing in it that has no counterpart, or that mergekit itself would refuse.
    """
    read = read_recipe(recipe)
    if read.name == "passthrough":
        method, models, rest = stacked(read)
    else:
        method, models, rest = merged(read)
    names = {model["checkpoint"]: model["name"] for model in models}
    notes = list(read.notes)
    output = {"dtype": _dtype(recipe), **vocabulary(recipe, read, names, notes), "align_heads": False}
    if read.base is not None and read.method.base is Base.MODEL and output["vocabulary"] != "error":
        if read.name != "passthrough":
            rest.setdefault("base", read.base)  # its rows are those of tokens that a model lacks
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
    """Return the recipe's field behind each field of `request`, which is the translation of `recipe`."""
    read = read_recipe(recipe)
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
        for number, source in enumerate(ordered(read, part, merged)):
            fields[f"slices.{index}.sources.{number}"] = f"{source.place}.layer_range"
    everywhere = [
        *(pair for part in read.parts for pair in part.shared),
        *(pair for part in read.parts for source in part.sources for pair in source.parameters),
    ]
    for key, parameter in read.method.parameters.items():
        fields[f"method.{parameter.ours or key}"] = place_of(key, everywhere)
    found = {source.reference: source for part in reversed(read.parts) for source in reversed(part.sources)}
    for index, model in enumerate(request["models"]):
        source = found.get(model["checkpoint"], SliceSource("base_model", model["checkpoint"], read.parts[0].shared))
        fields[f"models.{index}"] = source.place
        fields[f"models.{index}.checkpoint"] = source.place if source.place == "base_model" else f"{source.place}.model"
        fields[f"models.{index}.weight"] = place_of("weight", source.parameters)
        for key in model.get("parameters", {}):
            fields[f"models.{index}.parameters.{key}"] = place_of(key, source.parameters)
    return fields


def _dtype(recipe: Mapping[str, Any]) -> str:
    """Return the data type of the output. mergekit also computes in `dtype`; here that is done in float32 or better."""
    for key in ("out_dtype", "dtype"):
        dtype = recipe.get(key)
        if dtype is not None:
            known = ("float64", "float32", "bfloat16", "float16")
            plain = str(dtype).removeprefix("torch.")
            if plain not in known:
                raise MergekitError(key, f"'{plain[:40]}' is not available; available are {', '.join(known)}")
            return plain
    return "auto"
