"""Runs work on several threads, each of which computes alone, so that results do not depend on their number."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from queue import SimpleQueue
from threading import Barrier, Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of `threads` running threads, which is kept.

    Starting a thread waits for ever when there is no memory left for its first frame (CPython issue 140746), so the
    engine starts none in the middle of a job. Raises RuntimeError where the system has no more threads.
    """
    executor = ThreadPoolExecutor(threads)
    all_run = Barrier(threads + 1)
    try:
        for _ in range(threads):
            executor.submit(all_run.wait)  # the executor starts a thread for each, because none is idle
        all_run.wait()
    except RuntimeError:
        all_run.abort()  # otherwise started threads would wait for the others, and the process for them
        raise
    return executor


def in_threads(
    work: Callable[[Item], None], items: Iterable[Item], threads: int | None, on_done: Callable[[], None]
) -> None:
    """Call `work` on every item; items are begun in order.

    PyTorch uses no further threads within a thread, because the places where it splits a sum depend on their number.

    Args:
        threads: number of threads; None: one item after the other in this thread, in which PyTorch uses all cores.
        on_done: called in this thread after each item; may raise to stop.

    Raises:
        The exception of the first `work` that fails, or of `on_done`. No thread is at work any more then.
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
    each = [pool(threads).submit(run) for _ in range(threads)]
    try:
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
        wait(each)
        torch.set_num_threads(before)  # some of the process's libraries have one number for all threads
