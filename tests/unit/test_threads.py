"""Work on several threads: all of it or the first error, and PyTorch's own number of threads as it was."""

from collections.abc import Callable, Iterator
from itertools import count
from threading import Barrier, Thread, current_thread, main_thread
from threading import enumerate as enumerate_threads

import pytest
import torch

from worker.engine.runtime.threads import in_threads, pool

ITEMS = 50


def nothing() -> None:
    """Nobody listens."""


@pytest.fixture(autouse=True)
def three_torch_threads() -> Iterator[None]:
    """A number that no test asks for, to see whether it is there afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [None, 1, 2, 5, ITEMS + 1])
def test_every_item_is_done_once_and_told_in_the_calling_thread(threads: int | None) -> None:
    done: list[int] = []
    told: list[bool] = []
    in_threads(done.append, range(ITEMS), threads, lambda: told.append(current_thread() is main_thread()))
    assert sorted(done) == list(range(ITEMS))
    assert told == [True] * ITEMS


@pytest.mark.parametrize("threads", [None, 1])
def test_one_thread_works_in_order(threads: int | None) -> None:
    done: list[int] = []
    in_threads(done.append, range(ITEMS), threads, nothing)
    assert done == list(range(ITEMS))


def test_items_are_begun_in_order_and_on_as_many_threads_as_asked() -> None:
    """Two items meet: neither ends before the other has begun, and no later one begins before both ended."""
    begun: list[int] = []
    meeting = Barrier(2)

    def work(item: int) -> None:
        begun.append(item)
        meeting.wait(10)

    in_threads(work, range(ITEMS), 2, nothing)
    assert [sorted(begun[i : i + 2]) for i in range(0, ITEMS, 2)] == [[i, i + 1] for i in range(0, ITEMS, 2)]


def test_pytorch_has_one_thread_within_several_and_its_own_number_without() -> None:
    def seen_on(threads: int | None) -> set[int]:
        seen: set[int] = set()
        in_threads(lambda _: seen.add(torch.get_num_threads()), range(4), threads, nothing)
        return seen

    assert seen_on(1) == {1}
    assert seen_on(4) == {1}
    assert seen_on(None) == {3}


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_the_error_of_an_item_is_raised_and_stops_the_rest(threads: int | None) -> None:
    """There is no end of items: without a stop there would be none of the test. What is at work ends before."""
    begun: list[int] = []
    ended: list[int] = []
    together = Barrier(threads or 1)

    def work(item: int) -> None:
        begun.append(item)
        if item < (threads or 1):
            together.wait(10)
        if item == 0:
            raise KeyError("the first")
        ended.append(item)

    with pytest.raises(KeyError, match="the first"):
        in_threads(work, count(), threads, nothing)
    assert sorted([0, *ended]) == sorted(begun)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_listener_that_raises_stops_the_rest(threads: int | None) -> None:
    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        in_threads(lambda _: None, count(), threads, stop)


def test_a_thread_that_cannot_be_started_is_an_error_and_no_other_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    start, starts, before = Thread.start, count(1), set(enumerate_threads())

    def refuse_the_second(thread: Thread) -> None:
        if next(starts) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(Thread, "start", refuse_the_second)
    pool.cache_clear()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        in_threads(lambda _: None, count(), 3, nothing)
    for thread in set(enumerate_threads()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_no_thread_is_started_once_a_pool_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython waits for ever for one that has no memory for its first frame."""
    pool(4)
    monkeypatch.setattr(Thread, "start", lambda _: pytest.fail("a thread was started"))
    done: list[int] = []
    for _ in range(3):
        in_threads(done.append, range(ITEMS), 4, nothing)
    assert len(done) == 3 * ITEMS


def failing_items() -> Iterator[int]:
    yield 1
    raise ValueError("no more items")


@pytest.mark.parametrize("items", [failing_items, lambda: iter(())])
@pytest.mark.parametrize("threads", [None, 2])
def test_items_may_fail_to_come_or_be_none_at_all(threads: int | None, items: Callable[[], Iterator[int]]) -> None:
    done: list[int] = []
    if items is failing_items:
        with pytest.raises(ValueError, match="no more items"):
            in_threads(done.append, items(), threads, nothing)
        assert done == [1]
    else:
        in_threads(done.append, items(), threads, nothing)
        assert done == []
