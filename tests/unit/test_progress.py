"""Progress of an attempt, with a clock that the test moves."""

import pytest

from app.contracts.jobs import Phase
from worker.progress import SHARES, ProgressMeter

PHASES = [Phase.LOADING, Phase.SCORING, Phase.MERGING, Phase.PUBLISHING]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_fraction_runs_from_0_to_1_over_the_phases_in_use() -> None:
    meter = ProgressMeter(PHASES, Clock())
    assert meter.current.fraction == 0
    total = sum(SHARES[phase] for phase in PHASES)
    assert meter.update(Phase.LOADING, 1, 2, "models").fraction == pytest.approx(
        SHARES[Phase.LOADING] / 2 / total, abs=1e-4
    )
    assert meter.update(Phase.PUBLISHING, 1, 1, "files").fraction == 1


def test_the_fraction_never_falls() -> None:
    meter = ProgressMeter(PHASES, Clock())
    before = meter.update(Phase.SCORING, 50, 100, "examples").fraction
    assert meter.update(Phase.SCORING, 10, 100, "examples").fraction == before


def test_the_estimate_is_what_is_left_at_the_pace_so_far() -> None:
    clock = Clock()
    meter = ProgressMeter([Phase.MERGING], clock)
    clock.now = 30.0
    progress = meter.update(Phase.MERGING, 25, 100, "tensors")
    assert progress.eta_seconds == pytest.approx(90)


def test_there_is_no_estimate_from_next_to_nothing() -> None:
    meter = ProgressMeter([Phase.MERGING], Clock())
    assert meter.update(Phase.MERGING, 1, 1000, "tensors").eta_seconds is None


def test_a_phase_with_nothing_to_do_counts_as_not_begun() -> None:
    assert ProgressMeter([Phase.MERGING], Clock()).update(Phase.MERGING, 0, 0, "tensors").fraction == 0
