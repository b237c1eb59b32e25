"""What a source of inputs does, whichever scheme its references have."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from app.contracts.jobs import Gone, Outcome
from app.contracts.references import Reference
from app.storage.artifacts.store import ArtifactStore
from app.storage.inputs import OnBytes, RootedPath
from worker.engine.catalog.checkpoints.headers import CheckpointInfo
from worker.engine.catalog.contracts.spec import HubSource

InputKind = Literal["checkpoint", "rows"]

REQUEST_TIMEOUT_S = 10.0
DEADLINE_S = 30.0  # for all that one request names of a remote source; whoever posts it waits


class SourceUnavailable(Exception):
    """A remote source does not answer, or not in time."""


@dataclass(frozen=True)
class FetchedInput:
    """Where the engine finds an input: in a place on this machine, or on the hub, which it downloads from itself."""

    place: RootedPath | None = None
    hub: HubSource | None = None
    state: str | None = None
    """What `checkpoint_state` must say of the place; None where it need not be asked, since nothing changes there."""


class Source(Protocol):
    """Each raises ReferenceError for what is malformed, not there or not allowed, and SourceUnavailable."""

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        """The reference as the job keeps it, which names the same for as long as the source can promise: of a branch,
        its present commit."""

    def inspect(self, reference: Reference) -> AbstractContextManager[RootedPath]:
        """A checkpoint, or an outline of it: what describes it whole, and weight files as their headers alone, in
        sparse files of their true size."""

    def inspect_rows(self, reference: Reference) -> AbstractContextManager[RootedPath | None]:
        """A file with at least the first rows of a data set; None where only the worker looks at it."""

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        """Bring an input to this machine, unless the engine does so.

        Args:
            state: what `state` said when the job was accepted.
        """

    def state(self, info: CheckpointInfo) -> str | None:
        """Tells whether an inspected checkpoint has changed since; None where nothing ever changes."""


@dataclass(frozen=True)
class SourceContext:
    """What sources are opened with."""

    local_roots: Sequence[Path]
    data_dir: Path
    artifacts: ArtifactStore
    outcome: Callable[[str], Outcome | Gone | None]
    """What has become of the job with an id; or why it is gone, or None where there is no such job."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while a remote source is waited for."""
