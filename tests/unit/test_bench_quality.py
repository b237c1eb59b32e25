"""bench/quality.py: which combinations are merged, and what its targets make of given predictions."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import outcomes
from bench.combinations import Combination, combinations_of
from bench.outcomes import Kept, Outcome, OutcomeStore
from bench.quality import ANCESTOR, AUTO, FEW, LABELS, OTHER_EXPERT, OURS, REFITTED_ANCESTOR, Expert, Outcomes, Report
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


def test_all_pairs_some_triples_all_fours_and_all_at_once_are_merged() -> None:
    found = list(combinations_of(TASKS))
    assert set(combinations(TASKS, 2)) < set(found)
    assert [len(tasks) for tasks in found] == sorted(len(tasks) for tasks in found)
    assert len(found) == len(set(found))
    assert set(combinations(TASKS, 4)) < set(found)
    triples = [tasks for tasks in found if len(tasks) == 3]
    assert len(triples) == 6
    assert {sum(task in tasks for tasks in triples) for task in TASKS} == {3, 4}
    assert found[-1] == TASKS
    assert list(combinations_of(("a", "b"))) == [("a", "b")]


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
        (label, tasks): Kept({task: Outcome(right(kept[label]), right(aligned[label])) for task in tasks}, 1.0)
        for label in LABELS
        for tasks in combinations_of(TASKS)
    }
    of_control = {task: Outcome(right(10), right(control)) for task in TASKS}
    return Report(experts, outcomes, dict.fromkeys((ANCESTOR, OTHER_EXPERT, REFITTED_ANCESTOR), of_control))


def good() -> dict[str, Any]:
    kept = dict.fromkeys(LABELS, 150) | {"mask_fisher": 170, "mask_regmean": 175, "aligned_regmean": 185, AUTO: 185}
    aligned = dict.fromkeys(LABELS, 190) | {"mask_regmean": 195, "aligned_regmean": 199, AUTO: 199}
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
        pytest.param({"aligned": {"ties": 149}}, {"aligned against kept heads"}, marks=pytest.mark.long),
        ({"aligned": {"ties": 100}}, {"tasks that alignment costs more than their interval"}),
        pytest.param(
            {"control": 195},
            {f"control: aligned heads on {name}" for name in (ANCESTOR, OTHER_EXPERT)},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"aligned": {"aligned_regmean": 195, AUTO: 195}}, {"best with aligned heads"}, marks=pytest.mark.long
        ),
        ({"kept": {"ties": 199}}, {f"methods on combinations that {ours} is significantly below" for ours in OURS}),
        pytest.param({"aligned": {"mask_regmean": 170}}, {"mask_regmean against regmean"}, marks=pytest.mark.long),
        pytest.param({"aligned": {FEW: 185}}, {"regmean"}, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_targets_are_missed_by_predictions_that_do_not(
    experts: dict[str, Expert], change: dict[str, Any], missed: set[str]
) -> None:
    predicted = good()
    for name, values in change.items():
        predicted[name] = {**predicted[name], **values} if isinstance(values, dict) else values
    assert missed <= unmet(report(experts, **predicted))


def test_auto_is_compared_on_the_rows_that_it_did_not_search_on(experts: dict[str, Expert]) -> None:
    """The first half of the rows is searched on, and `auto` is right on the other half alone."""
    searched = {task: replace(expert, searched=frozenset(range(ROWS // 2))) for task, expert in experts.items()}
    by_label = {AUTO: 1 - right(ROWS // 2), "ties": right(ROWS // 2), "average": right(ROWS)}
    tasks: Combination = ("a", "b")
    made: Outcomes = {
        (label, tasks): Kept(dict.fromkeys(tasks, Outcome(predicted, predicted)), 1.0)
        for label, predicted in by_label.items()
    }
    found = Report(searched, made, {})
    differences = [found.compared(AUTO, other, "kept", [tasks]) for other in ("ties", "average")]
    assert [(of.value, of.interval) for of in differences] == [(1.0, (1.0, 1.0)), (0.0, (0.0, 0.0))]
    assert found.compared("ties", "average", "kept", [tasks]).value == -0.5
    assert [found.retentions(label, tasks, "kept") for label in (AUTO, "ties")] == [[1.0, 1.0], [0.5, 0.5]]


def test_outcomes_are_found_by_what_they_follow_from(tmp_path: Path) -> None:
    made = Kept({"a": Outcome(right(3), right(4)), "b": Outcome(right(5), right(6))}, 1.5, "ties")
    OutcomeStore(tmp_path).keep({"rows": 1, "method": "x"}, made)
    kept = OutcomeStore(tmp_path).find({"method": "x", "rows": 1})
    assert kept is not None
    assert (kept.seconds, kept.chosen) == (1.5, "ties")
    assert {task: (of.kept.sum(), of.aligned.sum()) for task, of in kept.by_task.items()} == {"a": (3, 4), "b": (5, 6)}
    assert OutcomeStore(tmp_path).find({"method": "x", "rows": 2}) is None


def test_outcomes_follow_from_the_code_of_a_method_and_of_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "worker" / "engine" / "merging"
    folder.mkdir(parents=True)
    monkeypatch.setattr(outcomes, "ROOT", tmp_path)

    def digest(code: str, imported: str) -> str:
        (folder / "x.py").write_text(f"from worker.engine.merging.y import z\n{code}\n", encoding="utf-8")
        (folder / "y.py").write_text(f"{imported}\n", encoding="utf-8")
        return outcomes.code_digest(["worker.engine.merging.x"])

    first = digest("a = z", "z = 1")
    assert digest("a = z  # explained", '"""Said of it."""\nz = 1') == first
    assert first not in (digest("a = -z", "z = 1"), digest("a = z", "z = 2"))
