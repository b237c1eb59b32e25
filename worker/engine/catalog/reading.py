"""Which file is being read, for whoever has to say so when reading it does not come to an end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Observer = Callable[[str, str], None]
"""Is called with the reference of a checkpoint or a data set, and the name of its file that is read next."""

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


def reads(source: str, file: str) -> None:
    """Tell the observer, if there is one, before a file is read."""
    observer = _observer.get()
    if observer is not None:
        observer(source, file)


@contextmanager
def observed(by: Observer) -> Iterator[None]:
    token = _observer.set(by)
    try:
        yield
    finally:
        _observer.reset(token)
