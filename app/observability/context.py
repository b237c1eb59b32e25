"""Facts about what is being done: for which request, job, attempt and tenant. Every line of the log has them."""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

Facts = Mapping[str, str | int]

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_facts: ContextVar[Facts] = ContextVar("facts", default=MappingProxyType({}))
_of_process: dict[str, str | int] = {}


def facts() -> Facts:
    """Return the facts about what this thread or task does, by name."""
    return {**_of_process, **_facts.get()}


def add_facts(**more: str | int) -> None:
    """Add to the facts until the surrounding `concerning` ends."""
    _facts.set({**_facts.get(), **more})


@contextmanager
def concerning(**more: str | int) -> Iterator[None]:
    """Add to the facts while in context."""
    token = _facts.set({**_facts.get(), **more})
    try:
        yield
    finally:
        _facts.reset(token)


def process_concerns(more: Facts) -> None:
    """Replace the facts of all threads, in a process that does one thing at a time."""
    _of_process.clear()
    _of_process.update(more)


def request_id() -> str | None:
    """Return the id of the request that is being answered, or that made the job in hand."""
    known = facts().get("request_id")
    return None if known is None else str(known)


def traceparent() -> str | None:
    """Return the text that names the span of what is being done; None where there is no trace."""
    known = facts()
    return f"00-{known['trace_id']}-{known['span_id']}-{known['trace_flags']}" if "trace_id" in known else None


def new_request_id() -> str:
    return secrets.token_hex(16)
