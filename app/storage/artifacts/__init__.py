"""Artifacts of jobs. Which store keeps them is a setting, and looked at here and nowhere else.

A store is the module of that name in this folder. It has `opened(data_dir)`, which returns an `ArtifactStore`. Only the
store that the service uses is imported.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from app.storage.artifacts.store import ArtifactStore

NO_STORES = ("store",)
"""Modules of this package that have no store."""


def open_artifacts(store: str, data_dir: Path) -> ArtifactStore:
    """Open the store of this name. Raises ValueError where there is none."""
    known = sorted(module.name for module in iter_modules(__path__) if module.name not in NO_STORES)
    if store not in known:
        raise ValueError(f"MASKMERGE_ARTIFACT_STORE is '{store}', and the stores are {', '.join(known)}")
    opened: ArtifactStore = import_module(f"{__name__}.{store}").opened(data_dir)
    return opened
