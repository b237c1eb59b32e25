"""The provenance of an artifact: SLSA's predicate in an in-toto statement, and its signature in a DSSE envelope.

https://slsa.dev/spec/v1.0/provenance, https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and
https://github.com/secure-systems-lab/dsse.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from worker.engine.catalog.contracts.report import MANIFEST

PROVENANCE = "provenance.json"
"""The statement, as anybody can read it."""
SIGNED_PROVENANCE = "provenance.intoto.jsonl"
"""The envelope of the same bytes; it is there where the service has a key."""
CARD = "README.md"
NO_SUBJECTS = (MANIFEST, PROVENANCE, SIGNED_PROVENANCE)
"""Files that are no subjects: the provenance is about the others, and the manifest lists the provenance too."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:maskmerge:merge:v1"
BUILDER = "urn:maskmerge:worker"
CHECKPOINT_DIGEST = "maskmergeCheckpoint"
"""Name of the digest of a checkpoint: sha256 over the names and sha256 of its weight files and configuration."""
MANIFEST_DIGEST = "maskmergeManifest"
"""Name of the digest of the manifest: sha256 of the manifest without its entries for the provenance."""


def statement(
    manifest: Mapping[str, Any],
    recipe: Mapping[str, Any],
    *,
    job: str,
    attempt: int,
    version: str,
    started: datetime | None,
    finished: datetime,
    cards: Mapping[str, str],
) -> dict[str, Any]:
    """Return the statement of a merge's artifact.

    Args:
        manifest: content of the artifact's manifest.
        recipe: content of its recipe.
        version: version of this service.
        cards: sha256 of the card as each repository of the hub gets it, by the repository's place.
    """
    files = [file for file in manifest["files"] if file["name"] not in NO_SUBJECTS]
    byproducts = [
        {"name": MANIFEST, "digest": {MANIFEST_DIGEST: manifest_digest(manifest)}},
        *({"name": CARD, "uri": place, "digest": {"sha256": digest}} for place, digest in cards.items()),
    ]
    metadata = {"invocationId": f"urn:maskmerge:job:{job}:{attempt}", "finishedOn": _time(finished)}
    if started is not None:
        metadata["startedOn"] = _time(started)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file["name"], "digest": {"sha256": file["sha256"]}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe},
                "internalParameters": {key: manifest[key] for key in ("method", "device", "threads")},
                "resolvedDependencies": [*_checkpoints(manifest), *_rows(recipe)],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"maskmerge": version, **manifest["versions"]}},
                "metadata": metadata,
                "byproducts": byproducts,
            },
        },
    }


def as_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest as it is written."""
    return json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest without its entries for the provenance."""
    files = [file for file in manifest["files"] if file["name"] not in NO_SUBJECTS]
    return hashlib.sha256(as_manifest({**manifest, "files": files})).hexdigest()


def _time(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _checkpoints(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    base = manifest.get("base")
    inputs = {**manifest["inputs"], **({"base": base} if base else {})}
    return [
        _dependency(
            name,
            about["checkpoint"],
            {CHECKPOINT_DIGEST: str(about["digest"]).removeprefix("sha256:")} if about["digest"] else {},
            {"license": about["license"]} if about.get("license") else {},
        )
        for name, about in inputs.items()
    ]


def _rows(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    read = [model.get(part) for model in recipe["models"] for part in ("dataset", "evaluation")]
    sources = dict.fromkeys(str(rows["source"]) for rows in read if rows)
    return [_dependency("rows", source, {}, {}) for source in sources]


def _dependency(name: str, uri: str, digest: Mapping[str, str], about: Mapping[str, str]) -> dict[str, Any]:
    """Return a resource descriptor. What comes from the hub is known by its commit too."""
    commit = uri.rpartition("@")[2] if uri.startswith("hf:") and "@" in uri else None
    digests = {**({"gitCommit": commit} if commit else {}), **digest}
    return {
        "name": name,
        "uri": uri,
        **({"digest": digests} if digests else {}),
        **({"annotations": dict(about)} if about else {}),
    }


def problems(found: object) -> Sequence[str]:
    """Say why a value is no statement of this kind; empty if it is one."""
    if not isinstance(found, dict) or found.get("_type") != STATEMENT_TYPE:
        return [f"it is no statement of the type {STATEMENT_TYPE}"]
    if found.get("predicateType") != PREDICATE_TYPE:
        return [f"its predicate is {found.get('predicateType')}, not {PREDICATE_TYPE}"]
    subjects = found.get("subject")
    if not isinstance(subjects, list) or not subjects or not all(map(_is_subject, subjects)):
        return ["its subjects are no files with their sha256"]
    try:
        is_list = all(_is_descriptor(found) for found in found["predicate"]["runDetails"].get("byproducts", []))
    except (KeyError, TypeError, AttributeError):
        is_list = False
    return [] if is_list else ["its predicate has no runDetails whose byproducts are files with their digests"]


def _is_descriptor(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("name"), str) and isinstance(found.get("digest"), dict)


def subjects_of(statement: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the sha256 that each file may have, by name: a card has another one in each repository of the hub."""
    found: dict[str, set[str]] = {}
    for subject in statement["subject"]:
        found.setdefault(subject["name"], set()).add(subject["digest"]["sha256"])
    for card in statement["predicate"]["runDetails"].get("byproducts", []):
        if card["name"] == CARD and CARD in found:
            found[CARD].add(str(card["digest"].get("sha256")))
    return found


def manifest_digest_of(statement: Mapping[str, Any]) -> str | None:
    """Return the digest of the manifest; None in a statement of a release that had none."""
    for found in statement["predicate"]["runDetails"].get("byproducts", []):
        if found["name"] == MANIFEST:
            return str(found["digest"].get(MANIFEST_DIGEST))
    return None


def _is_subject(subject: object) -> bool:
    if not isinstance(subject, dict) or not isinstance(subject.get("digest"), dict):
        return False
    return isinstance(subject.get("name"), str) and isinstance(subject["digest"].get("sha256"), str)
