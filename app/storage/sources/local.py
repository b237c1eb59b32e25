"""`local:PATH`: folders and files under the operator's local roots, which are searched in order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import checkpoint_state

IS_REMOTE = False


def opened(context: SourceContext) -> Source:
    return LocalSource(context.local_roots)


class LocalSource:
    """Finds folders and files under the local roots."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        return reference

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        yield self._place(reference)

    @contextmanager
    def inspect_rows(self, reference: Reference) -> Iterator[RootedPath | None]:
        yield self._place(reference)

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        return FetchedInput(self._place(reference), state=state)

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        return None if info is None else checkpoint_state(info)

    def _place(self, reference: Reference) -> RootedPath:
        """Find a place under the roots. Raises ReferenceError, which does not tell where the roots are."""
        if not reference.rest or "\0" in reference.rest:
            raise ReferenceError(f"'{reference}' names no path")
        relative = PurePosixPath(reference.rest)
        if relative.is_absolute() or ".." in relative.parts:
            raise ReferenceError(f"'{reference}' must be a relative path without '..'")
        if not self._roots:
            raise ReferenceError("this service has no local roots; start it with --local-root DIR")
        try:
            for root in self._roots:
                path = root / relative
                if path.exists() or path.is_symlink():
                    resolved = path.resolve(strict=True)
                    if not resolved.is_relative_to(root):
                        raise ReferenceError(f"'{reference}' is a symbolic link out of its local root")
                    return RootedPath(resolved, root)
        except FileNotFoundError as error:
            raise ReferenceError(f"'{reference}' is a symbolic link to nothing") from error
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise ReferenceError(f"'{str(reference)[:100]}' cannot be looked up") from error
        raise ReferenceError(f"'{reference}' does not exist under any local root")
