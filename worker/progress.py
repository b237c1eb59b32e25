"""From the engine's phases to one fraction of the whole job, and an estimate of what is left."""

import time
from collections.abc import Callable, Sequence

from app.contracts.jobs import Phase, Progress

# Seconds the phases took on two MiniLM experts with 1,024 rows each on two cores, as shares.
# Downloading, which only merges from the hub do, depends on the line; searching, which merges, aligns and evaluates
# many times over, on the number of trials.
SHARES = {
    Phase.DOWNLOADING: 50,
    Phase.LOADING: 5,
    Phase.SCORING: 60,
    Phase.SEARCHING: 500,
    Phase.MERGING: 5,
    Phase.ALIGNING: 12,
    Phase.EVALUATING: 28,
    Phase.PUBLISHING: 2,
}
LEAST_FRACTION = 0.02  # an estimate from less than this is a guess


class ProgressMeter:
    """Progress of one attempt; `fraction` never falls.

    Args:
        phases: those that this job goes through, in order.
        clock: seconds, monotonic.
    """

    def __init__(self, phases: Sequence[Phase], clock: Callable[[], float] = time.monotonic) -> None:
        total = sum(SHARES[phase] for phase in phases)
        self._spans: dict[Phase, tuple[float, float]] = {}
        position = 0.0
        for phase in phases:
            self._spans[phase] = (position, SHARES[phase] / total)
            position += SHARES[phase] / total
        self._clock = clock
        self._started = clock()
        self.current = Progress(phase=phases[0])

    def update(self, phase: Phase, done: int, total: int, unit: str) -> Progress:
        start, span = self._spans[phase]
        fraction = max(self.current.fraction, start + span * (done / total if total else 0.0))
        eta = None
        if fraction >= LEAST_FRACTION:
            eta = round((self._clock() - self._started) / fraction * (1 - fraction), 1)
        self.current = Progress(
            phase=phase, done=done, total=total, unit=unit, fraction=round(fraction, 4), eta_seconds=eta
        )
        return self.current
