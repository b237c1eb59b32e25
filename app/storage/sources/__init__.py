"""Sources of inputs. The schemes of references are told apart here and nowhere else.

The source for a scheme is the module of that name in this folder. It has `opened(context)`, which returns a `Source`,
and `IS_REMOTE`, which says whether its answers come from other machines. It is imported when a reference needs it.
"""

from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext
from worker.engine.catalog.checkpoints.info import CheckpointInfo


class Sources:
    """Every source of this service. Each method raises as those of `Source`."""

    def __init__(self, context: SourceContext) -> None:
        self._context = context
        self._opened: dict[str, Source] = {}

    def resolve(self, text: str, kind: InputKind) -> Reference:
        reference = Reference.parse(text)
        return self._of(reference).resolve(reference, kind)

    def inspect(self, reference: Reference) -> AbstractContextManager[RootedPath]:
        return self._of(reference).inspect(reference)

    def inspect_rows(self, reference: Reference) -> AbstractContextManager[RootedPath | None]:
        return self._of(reference).inspect_rows(reference)

    def fetch(self, text: str, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        reference = Reference.parse(text)
        return self._of(reference).fetch(reference, kind, state, on_bytes)

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        return self._of(reference).state(reference, info)

    def _of(self, reference: Reference) -> Source:
        if reference.scheme not in self._opened:
            self._opened[reference.scheme] = _module(reference.scheme).opened(self._context)
        return self._opened[reference.scheme]


def is_remote(text: str) -> bool:
    """Return whether another machine must be asked for what a reference names; False for malformed ones."""
    try:
        return bool(_module(Reference.parse(text).scheme).IS_REMOTE)
    except ReferenceError:
        return False


def preload() -> None:
    """Import every source with the libraries that it uses."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def _module(scheme: str) -> ModuleType:
    name = f"{__name__}.{scheme}"
    if find_spec(name) is None:
        others = "use local:, upload:, s3: or hf:, or job: for a model"
        raise ReferenceError(f"'{scheme}:' references are not available yet; {others}", available=False)
    return import_module(name)
