"""bench/quality.py: which combinations are merged, and what its targets make of given predictions."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from bench import quality
from bench.quality import ANCESTOR, FEW, METHODS, OTHER_EXPERT, REFITTED_ANCESTOR, Expert, Outcome, Report
from tests.tiny import tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.primitives.errors import Place
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import load
from worker.engine.tasks.metrics import Array

TASKS = ("a", "b", "c", "d", "e")
ROWS = 200


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("worker.engine.evaluation.metrics", "bench.quality"):
        monkeypatch.setattr(f"{module}.BOOTSTRAP_RESAMPLES", 40)


def test_all_pairs_some_triples_and_fours_and_all_at_once_are_merged() -> None:
    found = list(quality.combinations_of(TASKS))
    assert set(combinations(TASKS, 2)) < set(found)
    assert [len(tasks) for tasks in found] == sorted(len(tasks) for tasks in found)
    assert len(found) == len(set(found))
    for size in (3, 4):
        of_size = [tasks for tasks in found if len(tasks) == size]
        assert 1 < len(of_size) <= 6
        assert {task for tasks in of_size for task in tasks} == set(TASKS)
    assert found[-1] == TASKS
    assert list(quality.combinations_of(("a", "b"))) == [("a", "b")]


def right(count: int) -> Array:
    """Predictions of rows of label 1 of which so many are right."""
    return (np.arange(ROWS) < count).astype(np.float64)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expert]:
    info = inspect_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("expert")), "expert")
    model = load(info, torch.device("cpu"))
    held_out = [Example(i, Place("line", i + 1), {"input_ids": [1]}, 1) for i in range(ROWS)]
    head = torch.zeros(2, 16, dtype=torch.float64)
    return {
        task: Expert(task, info, model, head, head[:, 0], [], held_out, torch.zeros(0, 2), right(ROWS))
        for task in TASKS
    }


def report(experts: dict[str, Expert], kept: dict[str, int], aligned: dict[str, int], control: int) -> Report:
    outcomes = {
        (label, tasks): {task: Outcome(right(kept[label]), right(aligned[label])) for task in tasks}
        for label in (*METHODS, FEW)
        for tasks in quality.combinations_of(TASKS)
    }
    of_control = {task: Outcome(right(10), right(control)) for task in TASKS}
    return Report(experts, outcomes, dict.fromkeys((ANCESTOR, OTHER_EXPERT, REFITTED_ANCESTOR), of_control))


def good() -> dict[str, Any]:
    kept = dict.fromkeys((*METHODS, FEW), 150) | {"mask_fisher": 170, "mask_regmean": 175, "aligned_regmean": 185}
    aligned = dict.fromkeys((*METHODS, FEW), 190) | {"mask_regmean": 195, "aligned_regmean": 199}
    return {"kept": kept, "aligned": aligned, "control": 120}


def unmet(found: Report) -> set[str]:
    return {row["what"].split(",")[0].split(" (")[0] for row in found.rows() if not row["met"]}


def test_targets_are_met_by_predictions_that_reach_them(experts: dict[str, Expert]) -> None:
    found = report(experts, **good())
    assert unmet(found) == set()
    rows = {row["what"]: row for row in found.rows()}
    gain = rows["mask_fisher, heads kept, pairs, against the average"]
    assert (gain["ours"], gain["reference"], gain["ratio"]) == pytest.approx((0.85, 0.75, 0.85 / 0.75))
    assert all(set(row) == {"what", "ours", "reference", "ratio", "target", "met"} for row in rows.values())


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"kept": {"mask_fisher": 150}}, {"mask_fisher"}),
        ({"aligned": {"ties": 149}}, {"aligned against kept heads"}),
        ({"aligned": {"ties": 100}}, {"tasks that alignment costs more than their interval"}),
        ({"control": 195}, {f"control: aligned heads on {name}" for name in (ANCESTOR, OTHER_EXPERT)}),
        ({"aligned": {"aligned_regmean": 195}}, {"best with aligned heads"}),
        ({"aligned": {"mask_regmean": 170}}, {"mask_regmean against regmean"}),
        ({"aligned": {FEW: 185}}, {"regmean"}),
    ],
)  # fmt: skip
def test_targets_are_missed_by_predictions_that_do_not(
    experts: dict[str, Expert], change: dict[str, Any], missed: set[str]
) -> None:
    outcomes = good()
    for name, values in change.items():
        outcomes[name] = {**outcomes[name], **values} if isinstance(values, dict) else values
    assert missed <= unmet(report(experts, **outcomes))
