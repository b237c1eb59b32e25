"""`upload:SHA256`: files and folders that the tenant has uploaded."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext
from app.storage.tenants import uploads_of
from app.storage.uploads import TenantUploads, Upload
from worker.engine.catalog.checkpoints.info import CheckpointInfo

IS_REMOTE = False
SHA256 = re.compile(r"[0-9a-f]{64}")


def opened(context: SourceContext) -> Source:
    return UploadSource(uploads_of(context.data_dir, context.tenant))


class UploadSource:
    """Finds uploads of one tenant. Each use renews the time for which they are kept.

    Args:
        folder: see `TenantUploads`.
    """

    def __init__(self, folder: Path) -> None:
        self._uploads = TenantUploads(folder)

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        upload = self._upload(reference)
        if kind == "checkpoint" and upload.about.kind == "file":
            raise ReferenceError(
                f"'{reference}' is one file, {upload.about.name}; a checkpoint is a folder: upload its files, then the "
                "manifest that names them, and refer to that"
            )
        if kind == "rows" and upload.about.kind == "folder":
            raise ReferenceError(f"'{reference}' is a folder; a data set is one file, so refer to that file's upload")
        return reference

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        yield self._place(reference)

    @contextmanager
    def inspect_rows(self, reference: Reference) -> Iterator[RootedPath | None]:
        yield self._place(reference)

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        return FetchedInput(self._place(reference))

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        return None  # its name is the digest of its bytes

    def _place(self, reference: Reference) -> RootedPath:
        return self._uploads.place(self._upload(reference))

    def _upload(self, reference: Reference) -> Upload:
        """Return a complete upload. Raises ReferenceError."""
        if SHA256.fullmatch(reference.rest) is None:
            raise ReferenceError(f"'{str(reference)[:200]}' is no upload; write upload:SHA256, in 64 digits and a to f")
        upload = self._uploads.use(reference.rest)
        if upload is None:
            raise ReferenceError(
                f"'{reference}': there is no such upload, or it has expired; send it with PUT /uploads/{reference.rest}"
            )
        if not upload.complete:
            raise ReferenceError(
                f"'{reference}': {upload.received} of {upload.about.bytes} bytes have arrived; send the rest with "
                f"PUT /uploads/{reference.rest}"
            )
        return upload
