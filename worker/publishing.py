"""The worker's end of publishing: starts the publisher, keeps the lease meanwhile, and tells what came of it."""

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from app.contracts.jobs import PhaseName, Progress, Record
from app.contracts.requests import MergeRequest
from app.observability.context import facts
from worker.engine.catalog.contracts.publication import Publication, PublicationError
from worker.engine.catalog.contracts.report import MergeResult

SECRETS = ("MASKMERGE_REDIS_URL", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
"""Variables that the publisher does not get: it has tokens of its own."""
READ_BYTES = 1 << 16
ALMOST = 0.999  # the share of the job that is done by then


class Order(BaseModel):
    """What the publisher is told, by its stdin."""

    folder: Path
    """Folder of the complete artifact."""
    job: str
    name: str
    tenant: str
    accepted: bool | None
    targets: list[str]
    facts: dict[str, str | int]
    """Facts that the lines of the log have."""


Keep = Callable[[Progress], None]
"""Called every tick. It raises when nobody wants the result any more."""


def with_publications(
    result: MergeResult, record: Record, folder: Path, seconds: float, tick_s: float, keep: Keep
) -> MergeResult:
    """Publish a complete artifact at the further places that its request names.

    Returns the result with what became of each. A place that fails does not fail the job, whose artifact is complete.

    Args:
        seconds: time for all places.
        tick_s: longest time between two calls of `keep`.
    """
    targets = MergeRequest.model_validate(record.request).output.publish
    if not targets:
        return result
    if result.accepted is False:
        found = [Publication(target=target, outcome="withheld") for target in targets]
    else:
        order = Order(
            folder=folder,
            job=record.id,
            name=record.name,
            tenant=record.tenant,
            accepted=result.accepted,
            targets=targets,
            facts=dict(facts()),
        )
        found = _published(order, seconds, tick_s, keep)
    failures = [f"not published at {f.target}: {f.error.message}" for f in found if f.error is not None]
    others = [_note(publication) for publication in found if publication.error is None]
    return result.model_copy(update={"published": found, "notes": [*failures, *result.notes, *others]})


def _published(order: Order, seconds: float, tick_s: float, keep: Keep) -> list[Publication]:
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.publisher", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, **quiet},
    )
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - they are pipes
    deadline = time.monotonic() + seconds
    data = b""
    try:
        with process.stdin as stream:
            stream.write(order.model_dump_json().encode())
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                done, total = data.count(b"\n"), len(order.targets)
                at_end = Progress(phase=PhaseName.PUBLISHING, done=done, total=total, unit="targets", fraction=ALMOST)
                keep(at_end)
                if selector.select(tick_s):
                    more = os.read(process.stdout.fileno(), READ_BYTES)
                    if not more:
                        return _all(order, data, "internal", "the process that publishes ended; the log has more")
                    data += more
        message = f"it took longer than {seconds:g} s (MASKMERGE_PUBLISH_SECONDS)"
        return _all(order, data, "timeout", message)
    except BrokenPipeError:
        return _all(order, data, "internal", "the process that publishes did not start; the log has more")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _all(order: Order, data: bytes, code: Literal["internal", "timeout"], message: str) -> list[Publication]:
    """Return what became of every place; what was not told of one failed."""
    told = [Publication.model_validate_json(line) for line in data.split(b"\n")[:-1]]
    error = PublicationError(code=code, message=message, retryable=True)
    return [*told, *(Publication(target=t, outcome="failed", error=error) for t in order.targets[len(told) :])]


def _note(found: Publication) -> str:
    """Return the note of a place that did not fail."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    if found.outcome == "withheld":
        return f"not published at {found.target}, because the merge is not accepted"
    if found.outcome == "unchanged":
        return f"an earlier attempt had published it at {found.target}: {versions}"
    return f"published at {found.target}: {versions}"
