"""`auto` in the engine: what it chooses, what it says of it, and how it goes on after a crash."""

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import Tensors, dataset_spec, edit_tensors, merge_spec, model_spec, read_model, silent, write_lines
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult, Search
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec, MergeSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.evaluation.outputs import KeptOutputs
from worker.engine.jobs.engine import Engine
from worker.engine.merging.job_models import JobModel
from worker.engine.models.loading import load
from worker.engine.scoring.store import StatisticsStore
from worker.engine.search.search import SHARES
from worker.engine.search.splitting import halves
from worker.engine.search.trial_merges import SharedBackbone

CPU = torch.device("cpu")
ROWS = 160
CANDIDATES = ["average", "mask_fisher", "ties", "regmean", "mask_regmean", "aligned_regmean"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """Rows whose labels are what the experts say of them, but for every eighth: as if they were fine-tuned on them."""
    root = tmp_path_factory.mktemp("search")
    for name in ("a", "b", "c", "grade"):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_inputs / "checkpoints" / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_inputs / "checkpoints" / name)
        rows = [json.loads(line) for line in (tiny_inputs / "rows" / f"{name}.jsonl").read_text().splitlines()][:ROWS]
        for place, row in enumerate(rows):
            with torch.inference_mode():
                logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
            said = float(logits) if name == "grade" else int(logits.argmax())
            row["label"] = said if name == "grade" or place % 8 else (said + 1) % model.config.num_labels
        write_lines(root / f"{name}.jsonl", [json.dumps(row) for row in rows])
    return root


def job(folder: Path, tiny_inputs: Path, inputs: Path, names: str = "abc", **method: Any) -> MergeSpec:
    models = [
        model_spec(
            tiny_inputs / "checkpoints" / name,
            tiny_inputs / "rows" / f"{name}.jsonl",
            evaluation=EvaluationSpec(source=name, path=inputs / f"{name}.jsonl", label="label", metric="accuracy"),
        )
        for name in names
    ]
    asked = {"name": "auto", "candidates": CANDIDATES, "trials": 12, "examples": 40, "precision": "float32", **method}
    spec = merge_spec(folder / "artifact", models, asked, evaluate=True, align_heads=True)
    base = CheckpointSpec(source="local:base", path=tiny_inputs / "checkpoints" / "base")
    return spec.model_copy(update={"base": base, "journal": folder / "journal.jsonl"})


def searched(result: MergeResult) -> Search:
    assert result.search is not None
    return result.search


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path, inputs: Path) -> tuple[MergeSpec, MergeResult]:
    spec = job(tmp_path_factory.mktemp("whole"), tiny_inputs, inputs)
    return spec, Engine(CPU).merge(spec, silent)


def told(search: Search) -> dict[str, Any]:
    """Without what another run takes more or less of."""
    return search.model_dump(exclude={"trials": {"__all__": {"seconds"}}, "failed": {"__all__": {"seconds"}}})


def test_the_best_trial_is_published_as_if_it_had_been_asked_for(
    whole: tuple[MergeSpec, MergeResult], tmp_path: Path
) -> None:
    spec, result = whole
    search = searched(result)
    full = [trial for trial in search.trials if not trial.pruned]
    assert len(search.trials) == 12
    assert search.best.objective == max(trial.objective for trial in full)
    assert_published_as_if_it_had_been_asked_for(spec, result, tmp_path / "plain")


def test_heads_are_aligned_as_by_a_merge_where_passes_round_weights(
    tiny_inputs: Path, inputs: Path, tmp_path: Path
) -> None:
    spec = job(tmp_path, tiny_inputs, inputs, "ab", candidates=["mask_fisher"], trials=1, precision="bfloat16")
    assert_published_as_if_it_had_been_asked_for(spec, Engine(CPU).merge(spec, silent), tmp_path / "plain")


def assert_published_as_if_it_had_been_asked_for(spec: MergeSpec, result: MergeResult, folder: Path) -> None:
    """Asserts that the chosen candidate, merged by itself into the folder, has the bits that the search published."""
    [chosen] = [candidate for candidate in result.candidates or () if candidate.chosen]
    assert chosen.trial == searched(result).chosen
    assert chosen.method is not None
    models = [model.model_copy(update={"weight": chosen.weights[model.name]}) for model in spec.models]
    heads = {"align_heads": True, "align_ridge": chosen.align_ridge}
    plain = merge_spec(folder, models, chosen.method, evaluate=True, **heads)
    Engine(CPU).merge(plain.model_copy(update={"base": spec.base}), silent)
    for model in models:
        ours, theirs = (read_model(root / "models" / model.name) for root in (spec.folder, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_said_of_the_published_model_is_so(whole: tuple[MergeSpec, MergeResult]) -> None:
    """Computed by transformers from the artifact, one row at a time, on the half that was held out."""
    spec, result = whole
    [chosen] = [candidate for candidate in result.candidates or () if candidate.chosen]
    for model in spec.models:
        assert model.evaluation is not None
        rows = sample(RowFile(model.evaluation), model.evaluation, None)
        _, held_out = halves(rows, 0, "rows")
        assert searched(result).held_out_rows[model.name] == len(held_out)
        assert searched(result).search_rows[model.name] == len(rows) - len(held_out)
        labels = [rows[place].label for place in held_out]
        scores = []
        for folder in (spec.folder / "models" / model.name, model.path):
            loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            said = []
            for place in held_out:
                with torch.inference_mode():
                    said.append(int(loaded(**tokenizer(rows[place].text, return_tensors="pt")).logits.argmax()))
            scores.append(accuracy_score(labels, said))
        metric = chosen.metrics[model.name]
        assert metric.value == pytest.approx(scores[0], abs=1e-12)
        assert metric.retention == pytest.approx(scores[0] / scores[1], abs=1e-12)
        assert metric.interval[0] <= metric.value <= metric.interval[1]
    assert result.mean_retention == chosen.mean_retention


def test_the_table_has_every_candidate_the_average_and_the_experts(whole: tuple[MergeSpec, MergeResult]) -> None:
    _, result = whole
    lines = {candidate.name: candidate for candidate in result.candidates or ()}
    plain = {"plain average", "plain task arithmetic", "base"}
    assert lines.keys() == {*CANDIDATES, *plain, "expert a", "expert b", "expert c"}
    for name in "abc":
        assert lines[f"expert {name}"].metrics[name].retention == 1.0
        assert lines[f"expert {name}"].weights == {other: float(other == name) for other in "abc"}
    [chosen] = [line for line in lines.values() if line.chosen]
    for line in lines.values():
        assert line.mean_retention is not None
        assert chosen.mean_retention is not None
        assert line.behind is not None
        assert line.behind.value == pytest.approx(chosen.mean_retention - line.mean_retention, abs=1e-12)
        assert line.behind.interval[0] <= line.behind.value <= line.behind.interval[1]
    assert {line.kind for line in lines.values()} == {"method", "average", "task_arithmetic", "expert", "base"}


def test_baselines_are_what_candidates_of_their_own_are(
    whole: tuple[MergeSpec, MergeResult], tiny_inputs: Path, inputs: Path, tmp_path: Path
) -> None:
    """A candidate's first trial has its defaults. Of task arithmetic, nothing of the task vectors leaves the base."""
    nothing = {"name": "task_arithmetic", "scale": 0.0}
    spec = job(tmp_path, tiny_inputs, inputs, candidates=["average", "task_arithmetic", nothing], trials=3)
    result = Engine(CPU).merge(spec, silent)
    lines = {candidate.name: candidate for candidate in result.candidates or ()}
    others = {candidate.name: candidate for candidate in whole[1].candidates or ()}
    same = {"average": "plain average", "task_arithmetic": "plain task arithmetic", "task_arithmetic 2": "base"}
    for candidate, baseline in same.items():
        assert lines[candidate].metrics == lines[baseline].metrics == others[baseline].metrics
    assert len({tuple(m.value for m in lines[baseline].metrics.values()) for baseline in same.values()}) == 3


def test_a_search_that_gains_nothing_over_the_average_says_so(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    spec = job(tmp_path, tiny_inputs, inputs, candidates=["average"], trials=1, must_beat=["average"])
    result = Engine(CPU).merge(spec, silent)
    assert result.accepted is False
    verdict, gain = result.notes[:2]
    assert verdict.startswith("what auto chose, average, is not accepted: on the held-out rows it does not beat plain")
    assert "gained +0.0000 of mean retention (+0.0000 to +0.0000) over the plain average" in gain


@pytest.mark.parametrize(("align_heads", "precision"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_the_table_is_of_models_as_they_are_stored_and_predict(
    tiny_inputs: Path, inputs: Path, tmp_path: Path, align_heads: bool, precision: str
) -> None:
    """By a correlation, which shows the least rounding."""
    how = {"candidates": ["average", "ties", "mask_fisher"], "trials": 6, "precision": precision}
    spec = job(tmp_path, tiny_inputs, inputs, "a", **how)
    graded = model_spec(
        tiny_inputs / "checkpoints" / "grade",
        tiny_inputs / "rows" / "grade.jsonl",
        evaluation=EvaluationSpec(source="grade", path=inputs / "grade.jsonl", label="label", metric="pearson"),
    )
    stored = spec.output.model_copy(update={"dtype": "bfloat16", "align_heads": align_heads})
    spec = spec.model_copy(update={"models": [*spec.models, graded], "output": stored})
    result = Engine(CPU).merge(spec, silent)
    assert result.metrics is not None
    lines = result.candidates or ()
    [chosen] = [line for line in lines if line.chosen]
    assert {name: metric.value for name, metric in chosen.metrics.items()} == {
        name: metric.merged for name, metric in result.metrics.items()
    }
    assert chosen.mean_retention is not None
    for line in lines:
        assert line.mean_retention is not None
        assert line.behind is not None
        assert line.behind.value == pytest.approx(chosen.mean_retention - line.mean_retention, abs=1e-5)


def test_a_merge_that_cannot_be_stored_is_not_chosen(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    """Of an embedding that no row uses nothing shows in the predictions."""
    large = tmp_path / "large"
    shutil.copytree(tiny_inputs / "checkpoints" / "a", large)

    def enlarge(tensors: Tensors) -> None:
        tensors["bert.embeddings.word_embeddings.weight"][1, 0] = 60_000

    edit_tensors(large, enlarge)
    spec = job(tmp_path, tiny_inputs, inputs, "ac", candidates=[{"name": "task_arithmetic", "scale": 2.0}, "average"])
    models = [spec.models[0].model_copy(update={"path": large}), spec.models[1]]
    stored = spec.output.model_copy(update={"dtype": "float16"})
    spec = spec.model_copy(update={"models": models, "output": stored})
    result = Engine(CPU).merge(spec, silent)
    [error] = {trial.error for trial in searched(result).failed}
    assert error == "tensor bert.embeddings.word_embeddings.weight has values beyond float16"
    assert result.method["name"] == "average"


def test_a_look_lets_the_better_half_go_on(whole: tuple[MergeSpec, MergeResult]) -> None:
    """Successive halving by hand: a trial goes on while it is among the better half of those that were looked at.

    What a candidate is by default is looked at to the end.
    """
    spec, result = whole
    assert spec.journal is not None
    _, *lines = map(json.loads, spec.journal.read_text().splitlines())
    rows = searched(result).search_rows
    shares = [share for share in SHARES if share == 1 or min(rows.values()) * share >= 32]
    assert len(shares) > 1
    seen: list[list[float]] = [[] for _ in shares]
    for line, trial in zip(lines, searched(result).trials, strict=True):
        values = [float(np.mean(list(look["smoothed"].values()))) for look in line["looks"]]
        for number, value in enumerate(values):
            seen[number].append(value)
            better = sorted(seen[number], reverse=True)[: max(1, len(seen[number]) // 2)]
            is_first = trial.number < len(CANDIDATES)
            goes_on = is_first or number == len(shares) - 1 or value >= better[-1]
            assert goes_on == (number < len(values) - 1 or number == len(shares) - 1)
        assert trial.pruned == (len(values) < len(shares))
        assert trial.objective == pytest.approx(values[-1])


@pytest.mark.long
def test_the_same_recipe_finds_the_same(
    whole: tuple[MergeSpec, MergeResult], tiny_inputs: Path, inputs: Path, tmp_path: Path
) -> None:
    spec, result = whole
    again = job(tmp_path, tiny_inputs, inputs)
    repeated = Engine(CPU).merge(again, silent)
    assert told(searched(repeated)) == told(searched(result))
    assert repeated.candidates == result.candidates
    for name in "abc":
        ours, first = (read_model(folder / "models" / name) for folder in (again.folder, spec.folder))
        assert all(torch.equal(ours[key], first[key]) for key in ours | first)
    other = Engine(CPU).merge(job(tmp_path / "other", tiny_inputs, inputs, seed=1), silent)
    assert told(searched(other)) != told(searched(result))


@pytest.mark.parametrize("left", [0, 5, 11, 12])
def test_another_attempt_goes_on_where_the_last_one_was(
    whole: tuple[MergeSpec, MergeResult], tiny_inputs: Path, inputs: Path, tmp_path: Path, left: int
) -> None:
    """Of a crash in the middle of writing a trial, the whole lines before it are left."""
    spec, result = whole
    assert spec.journal is not None
    lines = spec.journal.read_text().splitlines(keepends=True)
    again = job(tmp_path, tiny_inputs, inputs)
    assert again.journal is not None
    kept = lines[: 1 + left]
    again.journal.write_text("".join(kept) + "".join(lines[1 + left : 2 + left])[:-9])
    resumed = Engine(CPU).merge(again, silent)
    assert told(searched(resumed)) == told(searched(result))
    assert again.journal.read_text().splitlines(keepends=True)[: 1 + left] == kept
    assert [t.seconds for t in searched(resumed).trials][:left] == [t.seconds for t in searched(result).trials][:left]
    assert resumed.candidates == result.candidates


@pytest.mark.long
def test_other_rows_are_another_search(
    whole: tuple[MergeSpec, MergeResult], tiny_inputs: Path, inputs: Path, tmp_path: Path
) -> None:
    """What was tried does not count when an evaluation's file was changed between attempts."""
    spec, _ = whole
    assert spec.journal is not None
    again = job(tmp_path, tiny_inputs, inputs, trials=12)
    lines = (inputs / "a.jsonl").read_text().splitlines()
    changed = write_lines(tmp_path / "a.jsonl", [*lines[1:], lines[0]])
    first = again.models[0]
    assert first.evaluation is not None
    moved = first.model_copy(update={"evaluation": first.evaluation.model_copy(update={"path": changed})})
    assert again.journal is not None
    again.journal.write_bytes(spec.journal.read_bytes())
    head = again.journal.read_text().splitlines()[0]
    Engine(CPU).merge(again.model_copy(update={"models": [moved, *again.models[1:]]}), silent)
    assert again.journal.read_text().splitlines()[0] != head


def test_of_an_expert_no_more_is_held_than_what_is_not_merged(tiny_inputs: Path, tmp_path: Path) -> None:
    """All of them at once would need more memory than the plan counts."""
    info = inspect_checkpoint(tiny_inputs / "checkpoints" / "a", "local:a")
    plan, loaded = plan_merge([info]), load(info, CPU)
    backbone = SharedBackbone(plan, KeptOutputs(StatisticsStore(tmp_path, 0), "float32"), "float32")
    model = model_spec(info.path, evaluation=EvaluationSpec(source="a", metric="accuracy"))
    backbone.add(JobModel(model, info, "unused"), loaded, lambda _: None)
    parameters = dict(loaded.model.named_parameters())
    held = weakref.WeakValueDictionary({tensor.slot.name: parameters[tensor.slot.name] for tensor in plan.backbone})
    assert len(held) == len(plan.backbone)
    del loaded, parameters
    gc.collect()
    assert not list(held)


def floored(spec: MergeSpec, floors: Sequence[float | None]) -> MergeSpec:
    models = [m.model_copy(update={"min_retention": f}) for m, f in zip(spec.models, floors, strict=True)]
    return spec.model_copy(update={"models": models})


def test_a_floor_that_can_be_reached_is(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    """Of two experts one must be kept whole: with weights that may differ ninefold, it gets the more of them."""
    given = {"candidates": ["average"], "trials": 25, "seed": 3}
    free = Engine(CPU).merge(job(tmp_path / "free", tiny_inputs, inputs, "ab", **given), silent)
    kept = max(trial.retentions["b"] for trial in searched(free).trials if not trial.pruned)
    spec = floored(job(tmp_path / "floored", tiny_inputs, inputs, "ab", **given), [None, kept])
    search = searched(Engine(CPU).merge(spec, silent))
    assert search.feasible
    assert search.min_retention == {"b": kept}
    assert search.best.retentions["b"] >= kept


def test_a_floor_that_cannot_be_reached_is_said(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    spec = floored(job(tmp_path, tiny_inputs, inputs, "ab", candidates=["average", "regmean"], trials=4), [2.0, None])
    result = Engine(CPU).merge(spec, silent)
    search = searched(result)
    assert not search.feasible
    full = [trial for trial in search.trials if not trial.pruned]
    assert search.best.retentions["a"] == max(trial.retentions["a"] for trial in full)
    assert any("min_retention" in note and "of a, not 2" in note for note in result.notes)


def test_the_least_retention_can_be_what_counts(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    spec = job(tmp_path, tiny_inputs, inputs, candidates=["average"], trials=6, objective="min_retention")
    search = searched(Engine(CPU).merge(spec, silent))
    for trial in search.trials:
        assert trial.objective == min(trial.smoothed.values())


def test_a_merge_that_fails_costs_a_trial_and_no_job(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    """A scale that leaves the finite numbers: of the first candidate every trial fails, of the second none."""
    candidates = [{"name": "task_arithmetic", "scale": 10.0}, "average"]
    spec = job(tmp_path, tiny_inputs, inputs, "ab", candidates=candidates, trials=4)
    huge = [model.model_copy(update={"weight": 1e37}) for model in spec.models]
    result = Engine(CPU).merge(spec.model_copy(update={"models": huge}), silent)
    search = searched(result)
    assert {trial.candidate for trial in search.trials} == {"average"}
    assert {trial.candidate for trial in search.failed} == {"task_arithmetic"}
    assert all("the merge, with the head of" in trial.error for trial in search.failed)
    assert sorted(t.number for t in (*search.trials, *search.failed)) == [0, 1, 2, 3]
    assert "task_arithmetic" not in [candidate.name for candidate in result.candidates or ()]
    assert result.method["name"] == "average"


def test_an_expert_that_knows_nothing_has_nothing_to_keep(tiny_inputs: Path, tmp_path: Path) -> None:
    rows = [{"text": f"word {place}", "label": "LABEL_1"} for place in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    spec = job(tmp_path, tiny_inputs, tmp_path, "", candidates=["average"], trials=1)
    evaluation = EvaluationSpec(**dataset_spec(path).model_dump(), metric="matthews")
    models = [model_spec(tiny_inputs / "checkpoints" / name, evaluation=evaluation) for name in "ac"]
    with pytest.raises(InvalidDataset, match=r"itself has a matthews of 0 on the 10 rows"):
        Engine(CPU).merge(spec.model_copy(update={"models": models}), silent)
