"""Adds an artifact's provenance to it, and signs it: the engine, which reads what comes from outside, has no key."""

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from app.contracts.jobs import Record
from app.contracts.provenance import PROVENANCE, SIGNED_PROVENANCE, as_manifest, statement
from app.contracts.targets import Target
from app.storage.targets.card import CARD, card_at
from worker.engine.catalog.contracts.report import MANIFEST

if TYPE_CHECKING:
    from app.storage.signing_keys import SigningKey


def attest(folder: Path, record: Record, key: "SigningKey | None") -> None:
    """Write the provenance of a complete artifact beside its files, and list it in the manifest.

    Args:
        key: signs the statement; without one it is only written.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    made = statement(
        manifest,
        json.loads((folder / "recipe.json").read_bytes()),
        job=record.id,
        attempt=record.attempt,
        version=version("maskmerge"),
        started=record.core()["started_at"],
        finished=datetime.now(UTC),
        cards=_cards(folder, record),
    )
    content = json.dumps(made, indent=2, ensure_ascii=False).encode() + b"\n"
    written = {PROVENANCE: content}
    if key is not None:
        written[SIGNED_PROVENANCE] = key.signed(content)
    for name, what in written.items():
        (folder / name).write_bytes(what)
        digest = hashlib.sha256(what).hexdigest()
        manifest["files"].append({"name": name, "bytes": len(what), "sha256": digest})
    manifest["files"].sort(key=lambda file: file["name"])
    (folder / MANIFEST).write_bytes(as_manifest(manifest))


def _cards(folder: Path, record: Record) -> dict[str, str]:
    """Return the sha256 of the card that each repository of the hub gets, by the repository's place."""
    text = (folder / CARD).read_text(encoding="utf-8")
    places = [place for place in record.request["output"].get("publish") or [] if place.startswith("hf:")]
    return {place: hashlib.sha256(card_at(text, Target.parse(place).name).encode()).hexdigest() for place in places}
