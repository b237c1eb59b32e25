"""The interface of every source of inputs, whichever scheme its references have."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.jobs import Gone, Outcome
from app.contracts.object_storage import NO_BUCKETS, ObjectStorage
from app.contracts.references import Reference
from app.storage.artifacts.store import ArtifactStore
from app.storage.inputs import OnBytes, RootedPath
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.spec import HubSource

InputKind = Literal["checkpoint", "rows", "statistics"]

REQUEST_TIMEOUT_S = 10.0
DEADLINE_S = 30.0  # limits all that one request asks of a remote source, because its caller waits


class SourceUnavailable(Exception):
    """A remote source does not answer, or not in time."""


class StorageUnavailable(SourceUnavailable):
    """Object storage does not answer, or not in time."""


@dataclass(frozen=True)
class FetchedInput:
    """An input that the engine can read: a place on this machine, or one on the hub, from which it downloads itself."""

    place: RootedPath | None = None
    hub: HubSource | None = None
    state: str | None = None
    """State that `checkpoint_state` must find at the place; None where nothing ever changes."""
    license: str | None = None
    """Licence of a model that an earlier job made, which has no card of its own."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests with which an earlier job wrote the model's files, by their names."""


class Source(Protocol):
    """A source of inputs.

    Each method raises ReferenceError for a reference that is malformed, names nothing or is not allowed, and
    SourceUnavailable when a remote source does not answer.
    """

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        """Return the reference as the job keeps it. It names the same input for as long as the source can promise: a
        branch becomes its present commit."""

    def inspect(self, reference: Reference) -> AbstractContextManager[RootedPath]:
        """Provide a checkpoint or statistics, or their outline: small files whole, and weight files as their headers
        alone, in sparse files of their true size."""

    def inspect_rows(self, reference: Reference) -> AbstractContextManager[RootedPath | None]:
        """Provide a file with at least the first rows of a data set; None where only the worker looks at it."""

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        """Bring an input to this machine, unless the engine does so.

        Args:
            state: the state of the input when the job was accepted.
        """

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        """Return the state of an input that was inspected, which tells whether it changed.

        It is None where nothing changes, and where changes of such inputs are not noticed.

        Args:
            info: the checkpoint; None for rows and statistics.
        """


@dataclass(frozen=True)
class SourceContext:
    """The things that sources need when they are opened."""

    local_roots: Sequence[Path]
    data_dir: Path
    artifacts: ArtifactStore
    outcome: Callable[[str], Outcome | Gone | None]
    """Returns the outcome of the job with an id, or why it is gone; None where there is no such job."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes a context that is entered while a remote source is waited for."""
    tenant: str = DEFAULT_TENANT
    """Tenant whose uploads and buckets count."""
    objects: ObjectStorage = NO_BUCKETS
    held: ExitStack = field(default_factory=ExitStack)
    """Closed when what was fetched is not read any more."""
