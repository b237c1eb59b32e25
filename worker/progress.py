"""Computes, from the engine's phases, the fraction of the whole job that is done, and an estimate of the time left."""

import time
from collections.abc import Callable, Mapping, Sequence

from app.contracts.jobs import ModelProgress, PhaseName, Progress

# Shares of the seconds that the phases took on two MiniLM experts with 1,024 rows each on two cores.
# The time of downloading, which only jobs with inputs on the hub do, depends on the connection. That of searching,
# which merges, aligns and evaluates many times, depends on the number of trials.
SHARES = {
    PhaseName.DOWNLOADING: 50,
    PhaseName.LOADING: 5,
    PhaseName.SCORING: 60,
    PhaseName.SEARCHING: 500,
    PhaseName.MERGING: 5,
    PhaseName.ALIGNING: 12,
    PhaseName.EVALUATING: 28,
    PhaseName.COMPARING: 3,
    PhaseName.PUBLISHING: 2,
}
LEAST_FRACTION = 0.02  # an estimate from less than this is a guess


class ProgressMeter:
    """Progress of one attempt; `fraction` never falls.

    Args:
        phases: the phases that this job goes through, in order.
        clock: monotonic clock, in seconds.
        before: progress of an attempt that this one goes on with.
        taken: seconds that it took.
    """

    def __init__(
        self,
        phases: Sequence[PhaseName],
        clock: Callable[[], float] = time.monotonic,
        before: Progress | None = None,
        taken: float = 0.0,
    ) -> None:
        total = sum(SHARES[phase] for phase in phases)
        self._spans: dict[PhaseName, tuple[float, float]] = {}
        position = 0.0
        for phase in phases:
            self._spans[phase] = (position, SHARES[phase] / total)
            position += SHARES[phase] / total
        self._clock = clock
        self._started = clock() - taken
        self.current = before or Progress(phase=phases[0])

    def span(self, phase: PhaseName) -> tuple[float, float]:
        """Return the fraction of the job at which a phase begins, and its share of the job."""
        return self._spans[phase]

    def update(
        self, phase: PhaseName, done: int, total: int, unit: str, models: Mapping[str, tuple[int, int]] | None = None
    ) -> Progress:
        """Note how far a phase is. `models` has done and total of each model in a phase that goes model by model."""
        start, span = self._spans[phase]
        fraction = max(self.current.fraction, start + span * (done / total if total else 0.0))
        eta = None
        if fraction >= LEAST_FRACTION:
            eta = round((self._clock() - self._started) / fraction * (1 - fraction), 1)
        self.current = Progress(
            phase=phase,
            done=done,
            total=total,
            unit=unit,
            fraction=round(fraction, 4),
            eta_seconds=eta,
            models={name: ModelProgress(done=of, total=all_of) for name, (of, all_of) in (models or {}).items()},
        )
        return self.current
