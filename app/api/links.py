"""Says in the OpenAPI document which operation follows another, and from where its parameters come."""

from collections.abc import Sequence
from typing import Any

IDS = {
    "Job": ("job_id", "$response.body#/id"),
    "JobPage": ("job_id", "$response.body#/data/0/id"),
    "ScoresPage": ("digest", "$response.body#/data/0/digest"),
    "CreatedKey": ("key_id", "$response.body#/id"),
}
"""The parameter that an answer has a value for, and where, by the answer's schema. A list of keys has none: its first
key may be the reader's own, and what follows is to revoke it."""
PARTS = {
    "Listing": {"job_id": "$request.path.job_id", "name": "$response.body#/files/0/name"},
    "DeliveryLog": {"job_id": "$request.path.job_id", "n": "$response.body#/data/0/n"},
}
"""The parameters of what follows a list of a job's parts, by the list's schema."""


def add_links(operations: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """Add links to every successful answer that names what other operations take in their path.

    Args:
        operations: each with its method and path.
    """
    for _, _, operation in operations:
        for status, answer in operation["responses"].items():
            schema = _schema(answer) if status.startswith("2") else None
            if schema in IDS:
                parameter, value = IDS[schema]
                followers = [other for _, path, other in operations if _parameters(path) == [parameter]]
                answer["links"] = {other["operationId"]: _link(other, {parameter: value}) for other in followers}
            elif schema in PARTS:
                parts = PARTS[schema]
                follower = next(other for _, path, other in operations if _parameters(path) == list(parts))
                answer["links"] = {follower["operationId"]: _link(follower, parts)}


def _schema(answer: dict[str, Any]) -> str | None:
    """Return the name of the schema of an answer's JSON."""
    reference = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
    return str(reference).rpartition("/")[2] or None


def _parameters(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _link(operation: dict[str, Any], parameters: dict[str, str]) -> dict[str, Any]:
    return {
        "operationId": operation["operationId"],
        "parameters": parameters,
        "description": operation["description"].partition("\n")[0],
    }
