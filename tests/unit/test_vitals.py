"""Which signs of life count, with a clock and a processor that the test moves."""

import os
import time

import pytest

from worker.vitals import LONGEST_LOOK_S, Vitals, processor_seconds


class Watched:
    """A process that is looked at every second, and does what the test says meanwhile."""

    def __init__(self, heartbeat_seconds: float = 30, stall_seconds: float = 600) -> None:
        self.now = self.taken = 0.0
        self.vitals = Vitals(heartbeat_seconds, stall_seconds, lambda: self.taken, lambda: self.now)

    def passes(self, seconds: int, *, beats: bool = False, works: float = 0.0, progresses_every: int = 0) -> str | None:
        for second in range(1, seconds + 1):
            self.now += 1
            self.taken += works
            if beats:
                self.vitals.heard(progresses=False)
            if progresses_every and second % progresses_every == 0:
                self.vitals.heard(progresses=True)
            why = self.vitals.look()
            if why is not None:
                return why
        return None


def test_silence_without_work_is_a_hang_with_a_job_or_without() -> None:
    for begins in (False, True):
        watched = Watched()
        if begins:
            watched.vitals.begins()
        assert watched.passes(30) is None
        assert watched.passes(1) == "it was not heard of for 31 s and did nothing meanwhile"


def test_an_idle_process_that_beats_is_well_for_ever() -> None:
    assert Watched().passes(100_000, beats=True, works=0.0002) is None


def test_a_job_that_only_waits_is_a_hang_after_the_long_limit_though_beats_come() -> None:
    watched = Watched()
    watched.vitals.begins()
    assert watched.passes(600, beats=True, works=0.0002) is None
    why = watched.passes(2, beats=True, works=0.0002)
    assert why == "it made no progress for 601 s, and waits or holds its interpreter"


def test_work_in_silence_is_a_hang_after_the_long_limit_alone() -> None:
    watched = Watched()
    watched.vitals.begins()
    assert watched.passes(600, works=1.0) is None
    assert watched.passes(2, works=1.0) is not None


@pytest.mark.parametrize("share", [0.01, 1.0, 8.0])
def test_work_that_beats_may_take_as_long_as_it_likes(share: float) -> None:
    watched = Watched()
    watched.vitals.begins()
    assert watched.passes(50_000, beats=True, works=share) is None


def test_a_download_that_goes_on_is_no_hang_however_slow() -> None:
    watched = Watched()
    watched.vitals.begins()
    assert watched.passes(50_000, beats=True, works=0.0002, progresses_every=590) is None


def test_the_next_job_has_the_whole_limit() -> None:
    watched = Watched()
    watched.vitals.begins()
    assert watched.passes(500, beats=True) is None
    watched.vitals.ends()
    assert watched.passes(5000, beats=True) is None
    watched.vitals.begins()
    assert watched.passes(600, beats=True) is None


def test_time_in_which_nobody_looked_is_not_held_against_it() -> None:
    watched = Watched()
    watched.now += 10_000  # the machine slept, and its worker with it
    assert watched.vitals.look() is None
    assert watched.passes(int(30 - LONGEST_LOOK_S)) is None
    assert watched.passes(1) is not None


def test_it_seems_well_while_it_was_heard_of_or_works() -> None:
    watched = Watched()
    watched.passes(9)
    assert watched.vitals.seems_well(10)
    watched.passes(2)
    assert not watched.vitals.seems_well(10)
    watched.passes(1, beats=True)
    assert watched.vitals.seems_well(10)


def test_processor_time_is_that_of_the_process_and_none_when_it_is_gone() -> None:
    before = processor_seconds(os.getpid())
    begin = time.process_time()
    while time.process_time() - begin < 0.2:
        pass
    assert 0.15 <= processor_seconds(os.getpid()) - before <= 5
    assert processor_seconds(2**22 + 1) == 0.0
