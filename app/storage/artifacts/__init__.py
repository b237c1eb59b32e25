"""Artifacts of jobs. Each kind of store is one file here, which has an `ArtifactStore`."""

from pathlib import Path

from app.storage.artifacts.folder import FolderStore
from app.storage.artifacts.store import ArtifactStore


def open_artifacts(data_dir: Path) -> ArtifactStore:
    """Open the store that the service is set up with."""
    return FolderStore(data_dir)
