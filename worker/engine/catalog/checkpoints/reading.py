"""Tells which file is being read, so that a message can name it if reading it does not end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Observer = Callable[[str, str], None]
"""Called with a checkpoint's or data set's reference and the name of the file that is read next."""

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
