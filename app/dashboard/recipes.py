"""A job's recipe for people: without what is a default anyway, and as programs and commands that send it."""

import json
from pprint import pformat
from typing import Any

import yaml
from pydantic import ValidationError

from app.contracts.jobs import JobKind, Record
from app.contracts.requests import MergeRequest, ScoreRequest, as_recipe

KEY = '${MASKMERGE_API_KEY:+-H "Authorization: Bearer $MASKMERGE_API_KEY"}'
URL = '"${MASKMERGE_URL:-http://127.0.0.1:8000}%s"'
ROUTES = {JobKind.MERGE: "/merge", JobKind.SCORES: "/scores"}
CALLS = {JobKind.MERGE: "submit", JobKind.SCORES: "submit_scores"}


def without_defaults(record: Record) -> dict[str, Any]:
    """Return a job's recipe without its webhook, which a recipe does not hand on, and without default values.

    What another release wrote, and cannot be read as a request now, is returned whole.
    """
    whole = as_recipe(record.request)
    kind = MergeRequest if record.kind is JobKind.MERGE else ScoreRequest
    try:
        request = kind.model_validate(whole)
        short = request.model_dump(mode="json", exclude_defaults=True)
        short["method"] = {"name": whole["method"]["name"], **short.get("method", {})}
        short = {name: short[name] for name in whole if name in short}
        is_same = kind.model_validate(short).model_dump(mode="json") == request.model_dump(mode="json")
    except (ValidationError, KeyError, TypeError):
        return whole
    return short if is_same else whole


def as_yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def ways_to_send(recipe: dict[str, Any], kind: JobKind) -> list[tuple[str, str]]:
    """Return commands and programs that send a recipe, each with its name."""
    text = json.dumps(recipe, indent=2, ensure_ascii=False)
    curl = (
        f"curl --fail-with-body {URL % ROUTES[kind]} {KEY} -H 'Content-Type: application/json' --data @- <<'END'\n"
        f"{text}\nEND"
    )
    python = (
        "from maskmerge import Client\n\n"
        f"recipe = {pformat(recipe, width=100, sort_dicts=False)}\n"
        "with Client() as service:  # at MASKMERGE_URL, with the key in MASKMERGE_API_KEY\n"
        f"    job = service.wait(service.{CALLS[kind]}(recipe).id)\n"
        "    print(job.status)"
    )
    return [("YAML", as_yaml(recipe)), ("curl", curl), ("Python", python)]
