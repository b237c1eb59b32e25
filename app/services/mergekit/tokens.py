"""Translates the parts of a recipe of mergekit about the result's tokens and chat template."""

from collections.abc import Mapping
from typing import Any

from app.services.mergekit.recipe import MergekitError, Recipe, flag_of, mapping_of, optional_reference, pass_over

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat format ChatML."""


def vocabulary(recipe: Mapping[str, Any], read: Recipe, names: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Return the fields of `output` that say whose tokens the result has.

    Args:
        names: names of the models, by their references.
    """
    field, source = "tokenizer_source", recipe.get("tokenizer_source")
    tokenizer = recipe.get("tokenizer")
    if tokenizer is not None:
        if source is not None:
            raise MergekitError("tokenizer", "give either this or tokenizer_source")
        if not isinstance(tokenizer, dict):
            raise MergekitError("tokenizer", "give a mapping with source")
        pass_over(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", notes)
        field, source = "tokenizer.source", tokenizer.get("source", "union")
    found: dict[str, Any] = {}
    if recipe.get("chat_template"):
        found["chat_template"] = _chat_template(recipe["chat_template"])
    if source is None:
        return {"vocabulary": "error", **found}
    if source not in ("base", "union"):
        reference = optional_reference({"model": source}, "model", field)
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
    tokens = mapping_of(tokenizer, "tokens", "tokenizer.tokens")
    if tokens:
        found["tokens"] = {
            str(token): _token(said, f"tokenizer.tokens.{token}"[:200], read, names) for token, said in tokens.items()
        }
    return {"vocabulary": str(source), **found}


def _chat_template(given: object) -> str:
    """Return the chat template: Jinja, `auto`, or `chatml`, the only named template of mergekit that is known here."""
    if given == "chatml":
        return CHATML
    if not isinstance(given, str) or (given != "auto" and "{" not in given):
        problem = f"'{str(given)[:40]}' is the name of a file of mergekit's, or none"
        raise MergekitError("chat_template", f"{problem}; give the template itself, chatml, or auto")
    return given


def _token(said: Any, place: str, read: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """Translate an entry of `tokenizer.tokens`, which says whose row a token gets."""
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise MergekitError(place, "give a mapping with source, and with force if all models are to have its row")
    source, force = said.get("source"), flag_of(said.get("force") or False, f"{place}.force")
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
    reference = optional_reference({"model": source}, "model", f"{place}.source")
    if reference in names:
        return {"source": "model", "model": names[str(reference)], **more, "force": force}
    if reference is not None and reference == read.base:
        return {"source": "base", **more, "force": force}
    raise MergekitError(f"{place}.source", f"'{reference}' is no model of this recipe")
