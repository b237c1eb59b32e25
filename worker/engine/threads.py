"""Work on several threads, each of which computes alone, so that results do not depend on how many there are."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_threads(
    work: Callable[[Item], None], items: Iterable[Item], threads: int | None, on_done: Callable[[], None]
) -> None:
    """`work` on every item; they are begun in order.

    Within a thread PyTorch uses no other: where it splits a sum would depend on their number.

    Args:
        threads: how many; None: one item after the other in this thread, in which PyTorch uses as many as it likes.
        on_done: called in this thread after each item; may raise to stop.

    Raises:
        What the first `work` to fail raises, or `on_done`; RuntimeError where no thread can be started. Nothing is at
        work any more then.
    """
    if threads is None:
        for item in items:
            work(item)
            on_done()
        return
    waiting, lock = iter(items), Lock()
    ended = object()
    events: SimpleQueue[BaseException | bool] = SimpleQueue()  # True: an item is done, False: a thread has ended
    stopped = False

    def run() -> None:
        nonlocal stopped
        torch.set_num_threads(1)
        try:
            while not stopped:
                with lock:
                    item = next(waiting, ended)
                if item is ended:
                    break
                work(item)  # type: ignore[arg-type]
                events.put(True)
        except BaseException as error:
            stopped = True  # at once: the calling thread may be long in hearing of it
            events.put(error)
        events.put(False)

    before = torch.get_num_threads()
    running = threads
    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                for _ in range(threads):
                    pool.submit(run)
                while running:
                    event = events.get()
                    if isinstance(event, BaseException):
                        raise event
                    if event:
                        on_done()
                    else:
                        running -= 1
            finally:
                stopped = True
    finally:
        torch.set_num_threads(before)  # of this process's libraries; some have one number for all threads
