"""Artifacts of jobs. Which store keeps them is a setting, and looked at here and nowhere else.

A store is the module of that name in this folder. It has `opened(context)`, which returns an `ArtifactStore`. Only the
store that the service uses is imported. What follows a colon in the setting is for the store to read.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from app.contracts.object_storage import NO_BUCKETS, ObjectStorage
from app.storage.artifacts.store import ArtifactStore, StoreContext

NO_STORES = ("store", "work")
"""Modules of this package that have no store."""


def open_artifacts(
    setting: str,
    data_dir: Path,
    objects: ObjectStorage = NO_BUCKETS,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> ArtifactStore:
    """Open a store. Raises ValueError where there is none of this name, or it cannot have this place.

    Args:
        setting: the store's name, with `:` and a place after it where it needs one.
        waiting: see `SourceContext`.
    """
    store, _, place = setting.partition(":")
    known = sorted(module.name for module in iter_modules(__path__) if module.name not in NO_STORES)
    if store not in known:
        raise ValueError(f"MASKMERGE_ARTIFACT_STORE is '{store}', and the stores are {', '.join(known)}")
    opened: ArtifactStore = import_module(f"{__name__}.{store}").opened(StoreContext(data_dir, place, objects, waiting))
    return opened
