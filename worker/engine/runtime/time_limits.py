"""Calls functions of libraries that cannot be interrupted, and waits for them for a limited time."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")
_late: list[Thread] = []


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what `call` returns, or raise what it raises.

    Nothing can stop a thread that takes longer. It goes on, so that the process should end soon, see `are_late`.

    Raises:
        TimeoutError: it takes more than `seconds`.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # libraries in Rust panic by exceptions of their own
            future.set_exception(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _late.append(thread)
        raise TimeoutError
    return future.result()


def are_late() -> bool:
    """Return whether a call is still going on for which nobody waits any more."""
    return any(thread.is_alive() for thread in _late)
