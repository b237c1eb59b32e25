"""Progress of an attempt, with a clock that the test moves."""

from pathlib import Path

import pytest

from app.contracts.jobs import PhaseName
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.progress import SHARES, ProgressMeter
from worker.specs import phases_of

PHASES = [PhaseName.LOADING, PhaseName.SCORING, PhaseName.MERGING, PhaseName.PUBLISHING]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_fraction_runs_from_0_to_1_over_the_phases_in_use() -> None:
    meter = ProgressMeter(PHASES, Clock())
    assert meter.current.fraction == 0
    total = sum(SHARES[phase] for phase in PHASES)
    assert meter.update(PhaseName.LOADING, 1, 2, "models").fraction == pytest.approx(
        SHARES[PhaseName.LOADING] / 2 / total, abs=1e-4
    )
    assert meter.update(PhaseName.PUBLISHING, 1, 1, "files").fraction == 1


def test_the_fraction_never_falls() -> None:
    meter = ProgressMeter(PHASES, Clock())
    before = meter.update(PhaseName.SCORING, 50, 100, "examples").fraction
    assert meter.update(PhaseName.SCORING, 10, 100, "examples").fraction == before


def test_the_estimate_is_what_is_left_at_the_pace_so_far() -> None:
    clock = Clock()
    meter = ProgressMeter([PhaseName.MERGING], clock)
    clock.now = 30.0
    progress = meter.update(PhaseName.MERGING, 25, 100, "tensors")
    assert progress.eta_seconds == pytest.approx(90)


def test_there_is_no_estimate_from_next_to_nothing() -> None:
    meter = ProgressMeter([PhaseName.MERGING], Clock())
    assert meter.update(PhaseName.MERGING, 1, 1000, "tensors").eta_seconds is None


def test_a_phase_with_nothing_to_do_counts_as_not_begun() -> None:
    assert ProgressMeter([PhaseName.MERGING], Clock()).update(PhaseName.MERGING, 0, 0, "tensors").fraction == 0


def phases_by(candidate: str) -> list[PhaseName]:
    """Of a search that tries one method."""
    rows = {"source": "local:rows.jsonl", "path": Path("rows.jsonl")}
    model = {"name": "a", "source": "local:a", "dataset": rows, "evaluation": {**rows, "metric": "accuracy"}}
    spec = MergeSpec.model_validate(
        {
            "name": "search",
            "models": [model],
            "method": {"name": "auto", "candidates": [candidate]},
            "recipe": {},
            "folder": Path("out"),
            "output": {"align_heads": True},
            "evaluate": True,
        }
    )
    return phases_of(spec)


def test_a_search_comes_after_scoring_and_before_the_merge_that_it_chose() -> None:
    rest = [PhaseName.SEARCHING, PhaseName.MERGING, PhaseName.ALIGNING, PhaseName.EVALUATING, PhaseName.PUBLISHING]
    assert phases_by("average") == [PhaseName.LOADING, *rest]
    assert phases_by("regmean") == [PhaseName.LOADING, PhaseName.SCORING, *rest]
    meter = ProgressMeter(phases_by("regmean"), Clock())
    assert meter.update(PhaseName.SEARCHING, 40, 40, "merges").fraction > 0.5
