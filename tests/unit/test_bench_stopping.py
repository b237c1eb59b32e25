"""bench/stopping.py: what its targets make of given stops."""

import pytest

from bench.stopping import Comparison, Stop, calibration_targets, targets

SAME = Comparison(0.8, 0.8, (-0.01, 0.01), (0.78, 0.82))
PAIR = ("a", "b")


def stop(rows: int, of: int, *found: Comparison) -> Stop:
    """The comparisons of two tasks with heads kept; with heads aligned there is no difference."""
    comparisons = {(task, "kept"): comparison for task, comparison in zip("ab", found, strict=True)}
    comparisons |= {(task, "aligned"): SAME for task in "ab"}
    return Stop(rows, of, rows // 2, 0.09, comparisons)


def test_targets_are_met_by_few_rows_and_equal_accuracies() -> None:
    rows = targets(0.1, {PAIR: stop(1000, 8000, SAME, SAME), ("a", "c"): stop(2000, 8000, SAME, SAME)})
    assert all(row["met"] for row in rows)
    assert all(set(row) == {"what", "ours", "reference", "ratio", "target", "met"} for row in rows)
    assert (rows[0]["ours"], rows[0]["reference"]) == (3000, 16000)
    assert rows[1]["ours"] == 0.25


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (stop(3000, 8000, SAME, SAME), {"rows scored, over all combinations", "largest share of a combination's rows"}),
        (
            stop(1000, 8000, SAME, Comparison(0.79, 0.795, (-0.01, -0.001), (0.77, 0.82))),
            {"heads kept, paired differences beyond chance"},
        ),
        (
            stop(1000, 8000, SAME, Comparison(0.7, 0.75, (-0.1, 0.01), (0.73, 0.77))),
            {
                "heads kept, mean accuracy",
                "heads kept, largest difference",
                "heads kept, outside the accuracy's own interval",
            },
        ),
    ],
)
def test_targets_are_missed_by_what_does_not_reach_them(found: Stop, missed: set[str]) -> None:
    rows = targets(0.1, {PAIR: found})
    assert {row["what"].removeprefix("tolerance 0.1: ") for row in rows if not row["met"]} == missed


def test_errors_that_are_far_too_small_are_no_calibration() -> None:
    rows = calibration_targets({PAIR: {256: 3.0, 512: 1.0, 1024: 1.0}, ("a", "c"): {256: 4.0, 512: 0.8}})
    assert [(row["what"].split()[0], row["met"]) for row in rows] == [("256", False), ("512", True)]
    assert rows[0]["ours"] == pytest.approx(12.5**0.5)
