"""Tells whether a process hangs: it is stopped, deadlocked, or waits for something that never comes."""

import time
from collections.abc import Callable

import psutil

LONGEST_LOOK_S = (
    5.0  # time between two looks counts for no more: the machine, or the looking worker, may have stood still
)
LEAST_WORK = 0.005  # share of a processor; beats take a twentieth of it
LEAST_WORK_S = 0.05  # five ticks of the kernel's clock: a single one proves nothing


class Vitals:
    """Signs of life of the engine process, from its worker's end.

    A beat, which a thread of the engine sends every second, proves only that the process is scheduled and its
    interpreter free. Progress proves more, but the reading of a large file, one large factorisation or a slow hub make
    none for minutes. So silence is a fault when the process takes no processor time either, and want of progress is
    one when the process only waits, or holds its interpreter all the time.

    Args:
        heartbeat_seconds: time for which it may be silent while it does not work.
        stall_seconds: time for which a job may be without progress while the process does not work, or is silent.
        clock: monotonic clock, in seconds.
        processor_seconds: returns the processor time that the process has used.
    """

    def __init__(
        self,
        heartbeat_seconds: float,
        stall_seconds: float,
        processor_seconds: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeat_seconds = heartbeat_seconds
        self._stall_seconds = stall_seconds
        self._processor_seconds = processor_seconds
        self._clock = clock
        self._looked = clock()
        self._silent = self._resting = self._stalled = 0.0
        self._measured = processor_seconds()
        self._has_job = False

    def begins(self) -> None:
        """Note that a job begins."""
        self._has_job, self._stalled, self._resting = True, 0.0, 0.0

    def ends(self) -> None:
        self._has_job = False

    def heard(self, *, progresses: bool) -> None:
        """Note that something came from the process."""
        self._silent = 0.0
        if progresses:
            self._stalled = 0.0

    def look(self) -> str | None:
        """Return why the process counts as hung, or None. Call this often."""
        now = self._clock()
        passed = min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now
        self._silent += passed
        self._stalled += passed
        self._resting += passed
        taken = self._processor_seconds()
        if taken - self._measured >= max(LEAST_WORK_S, LEAST_WORK * self._resting):
            self._resting, self._measured = 0.0, taken
        if min(self._silent, self._resting) > self._heartbeat_seconds:
            return f"it was not heard of for {self._silent:.0f} s and did nothing meanwhile"
        if self._has_job and min(self._stalled, max(self._silent, self._resting)) > self._stall_seconds:
            return f"it made no progress for {self._stalled:.0f} s, and waits or holds its interpreter"
        return None

    def seems_well(self, seconds: float) -> bool:
        """Return whether the process sent something or used processor time within the last `seconds`."""
        return min(self._silent, self._resting) < seconds


def processor_seconds(pid: int) -> float:
    """Return the processor seconds that all threads of a process have used; 0 when it is gone."""
    try:
        taken = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(taken.user + taken.system)
