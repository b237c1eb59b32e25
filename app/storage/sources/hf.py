"""`hf:ORG/NAME@REVISION`: repositories on the Hugging Face hub, or on the mirror in HF_ENDPOINT."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.spec import HubSource

if TYPE_CHECKING:
    from app.storage.sources.hub_client import Hub

IS_REMOTE = True
HUB = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)


def opened(context: SourceContext) -> Source:
    return HubRepositories(context.waiting)


@dataclass(frozen=True)
class Repository:
    """A repository at a branch, a tag or a commit."""

    name: str
    revision: str

    def __str__(self) -> str:
        return f"hf:{self.name}@{self.revision}"

    @classmethod
    def parse(cls, reference: Reference) -> "Repository":
        """Read the rest of a reference. Raises ReferenceError when it is malformed."""
        match = HUB.fullmatch(reference.rest)
        if match is None or ".." in reference.rest:
            raise ReferenceError(
                f"'{reference}' is no repository on the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION"
            )
        return cls(match["repository"], match["revision"] or "main")


class HubRepositories:
    """Asks the hub. Only the worker looks at data sets, and the engine downloads what it reads.

    Args:
        waiting: see `SourceContext`.
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._waiting = waiting

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        found = self._hub.pinned(Repository.parse(reference), "dataset" if kind == "rows" else "model")
        return Reference.parse(str(found))

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        with TemporaryDirectory(prefix="maskmerge-outline-") as name:
            folder = Path(name)
            self._hub.outline(Repository.parse(reference), folder)
            yield RootedPath(folder, folder)

    @contextmanager
    def inspect_rows(self, reference: Reference) -> Iterator[RootedPath | None]:
        yield None

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        repository = Repository.parse(reference)
        return FetchedInput(hub=HubSource(repository=repository.name, commit=repository.revision))

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        return None

    @cached_property
    def _hub(self) -> "Hub":
        from app.storage.sources.hub_client import Hub  # the hub's library, which workers have no use for here

        return Hub(self._waiting)
