"""Cosines and conflicts of signs, against a dense computation in float64."""

import json
import os
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.contracts.jobs import PhaseName
from tests.tiny import LAYERS, edit_tensors, merge_spec, silent, tiny_base, tiny_checkpoint
from tests.tiny_adapters import tiny_adapter
from tests.tiny_language_models import tiny_model
from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, MergeSpec, ModelSpec
from worker.engine.catalog.planning.memory import BLOCK_ELEMENTS
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.jobs.engine import Engine
from worker.engine.merging.interference import Interference, compared_tensors, interference, spread_runs
from worker.specs import phases_of

Layers = dict[int | None, list[torch.Tensor]]


def dense(base: Path, models: list[Path]) -> Layers:
    """Each model's task vector by layer, float64, of every tensor that the base has too."""
    ancestor = load_file(base / "model.safetensors")
    layers: Layers = {}
    for index, folder in enumerate(models):
        parts: dict[int | None, list[torch.Tensor]] = {}
        for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
            origin = ancestor.get(name.removeprefix("bert."))
            if origin is None:
                continue
            words = name.split(".")
            layer = int(words[words.index("layer") + 1]) if "layer" in words else None
            parts.setdefault(layer, []).append((tensor.double() - origin.double()).flatten())
        for layer, found in parts.items():
            layers.setdefault(layer, []).append(torch.cat(found))
            assert len(layers[layer]) == index + 1
    return layers


def found_in(base: Path, models: list[Path], taking_part: list[int] | None = None) -> Interference:
    plan = plan_merge([inspect_checkpoint(m, m.name) for m in models], base=inspect_checkpoint(base, "base"))
    return compared(plan, taking_part or list(range(len(models))))


def compared(plan: MergePlan, taking_part: list[int], most: int = BLOCK_ELEMENTS) -> Interference:
    found = interference(compared_tensors(plan, taking_part), taking_part, most)
    assert found is not None
    return found


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = tiny_base(tmp_path / "base")
    folders = [tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]

    def halve(tensors: dict[str, torch.Tensor]) -> None:  # half of the first model's values never changed
        origin = load_file(base / "model.safetensors")
        for name, tensor in tensors.items():
            kept = origin.get(name.removeprefix("bert."))
            if kept is not None:
                tensor.view(-1)[::2] = kept.view(-1)[::2]

    edit_tensors(folders[0], halve)
    return base, folders


def test_cosines_and_conflicts_are_those_of_the_dense_task_vectors(models: tuple[Path, list[Path]]) -> None:
    base, folders = models
    found, wanted = found_in(base, folders), dense(base, folders)
    assert wanted.keys() == {None, *range(LAYERS)}
    assert found.layers.keys() == {("", layer) for layer in wanted}
    assert found.values == found.of == sum(of[0].numel() for of in wanted.values())
    wholes = [torch.cat([of[index] for of in wanted.values()]) for index in range(3)]
    for layer, vectors in [*wanted.items(), ("whole", wholes)]:
        ours = found.whole if layer == "whole" else found.layers["", layer]  # type: ignore[index]
        for i, j in combinations(range(3), 2):
            a, b = vectors[i], vectors[j]
            cosine = float((a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()))
            both = (a != 0) & (b != 0)
            conflicts = float(((a > 0) != (b > 0))[both].double().mean())
            assert ours.cosines[i, j].item() == pytest.approx(cosine, abs=1e-6)
            assert ours.conflicts[i, j].item() == pytest.approx(
                conflicts, abs=1e-4
            )  # differences in float32 may vanish


def test_of_a_large_tensor_as_many_rows_are_read_as_a_block_has(models: tuple[Path, list[Path]]) -> None:
    base, folders = models
    most = 64
    plan = plan_merge([inspect_checkpoint(f, f.name) for f in folders], base=inspect_checkpoint(base, "base"))
    found = compared(plan, [0, 1, 2], most)
    origin, *tensors = (load_file(folder / "model.safetensors") for folder in (base, *folders))
    products, values = torch.zeros(3, 3, dtype=torch.float64), 0
    for planned in plan.backbone:
        name = planned.sources[0].name
        rows = [row for run in spread_runs(planned.shape, most) for row in range(run.stop)[run]]
        deltas = [(of[name] - origin[name.removeprefix("bert.")])[rows].double().flatten() for of in tensors]
        assert len(deltas[0]) <= most
        products += torch.stack(deltas) @ torch.stack(deltas).T
        values += len(deltas[0])
    assert found.values == values < found.of
    torch.testing.assert_close(found.whole.products, products, rtol=1e-9, atol=0.0)


def test_adapters_change_their_base_by_what_they_add(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", seed=1000)
    adapters = [tiny_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate("ab")]
    ancestor = inspect_checkpoint(base, "base")
    plan = plan_merge([inspect_model(f, f.name, ancestor) for f in adapters], base=ancestor)
    found = compared(plan, [0, 1])
    deltas = []
    for planned in plan.backbone:
        of = [torch.zeros(planned.shape, dtype=torch.float64) for _ in adapters]
        for index, source in enumerate(planned.sources):
            if source.delta is not None:
                weights = load_file(adapters[index] / "adapter_model.safetensors")
                a, b = (weights[part.name].double() for part in (source.delta.a, source.delta.b))
                of[index] = source.delta.scaling * (b @ a)
        deltas.append(torch.stack([delta.flatten() for delta in of]))
    vectors = torch.cat(deltas, dim=1)
    assert vectors.count_nonzero() > 0
    torch.testing.assert_close(found.whole.products, vectors @ vectors.T, rtol=1e-4, atol=1e-7)


def test_only_models_that_take_part_are_compared(models: tuple[Path, list[Path]]) -> None:
    base, folders = models
    all_of_them, two = found_in(base, folders), found_in(base, folders, [0, 2])
    assert two.of_pairs(two.whole.products) == [all_of_them.whole.products[0, 2].item()]
    assert two.whole.cosines[0, 1].item() == pytest.approx(all_of_them.whole.cosines[0, 2].item(), abs=1e-12)


def test_a_model_that_is_its_base_has_neither(tmp_path: Path) -> None:
    base, other = tiny_model(tmp_path / "base"), tiny_model(tmp_path / "a", seed=1)
    whole = found_in(base, [base, other]).whole
    assert whole.cosines[0, 1].isnan()
    assert whole.conflicts[0, 1].isnan()


def test_without_a_base_or_with_one_model_there_is_nothing_to_compare(models: tuple[Path, list[Path]]) -> None:
    base, folders = models
    infos = [inspect_checkpoint(folder, folder.name) for folder in folders]
    assert compared_tensors(plan_merge(infos), [0, 1]) == []
    assert compared_tensors(plan_merge(infos, base=inspect_checkpoint(base, "base")), [1]) == []
    assert interference([], [0, 1]) is None


# --- the step of a job -------------------------------------------------------------------------------


def job(models: tuple[Path, list[Path]], folder: Path, **output: Any) -> MergeSpec:
    base, folders = models
    specs = [ModelSpec(name=f.name, source=f"local:{f.name}", path=f, parameters={}) for f in folders]
    spec = merge_spec(folder, specs, {"name": "average", "precision": "auto"}, **output)
    return spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})


def test_a_job_compares_after_merging_and_says_how_long_it_took(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    phases: list[str] = []
    result = Engine().merge(job(models, tmp_path / "out"), lambda phase, *_: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["loading", "merging", "comparing"]
    assert result.timings.interference_seconds > 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interference"]["pairs_in_all"] == 3
    assert report["timings"]["interference_seconds"] == result.timings.interference_seconds


def test_files_that_change_while_they_are_compared_are_noticed(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    def change(phase: str, *_: object) -> None:
        if phase == "comparing":
            os.utime(models[0] / "model.safetensors", ns=(0, 0))

    with pytest.raises(InvalidCheckpoint, match="changed while the job ran"):
        Engine().merge(job(models, tmp_path / "out"), change)


def test_switched_off_nothing_is_read_again(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> TensorReader:
        raise AssertionError("the checkpoints are read once more")

    monkeypatch.setattr("worker.engine.merging.interference.TensorReader", refuse)
    phases: list[str] = []
    spec = job(models, tmp_path / "out", interference=False)
    result = Engine().merge(spec, lambda phase, *_: phases.append(phase))
    assert "comparing" not in phases
    assert PhaseName.COMPARING not in phases_of(spec)
    assert result.timings.interference_seconds == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interference"] is None
    assert "interference" not in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(AssertionError, match="once more"):
        Engine().merge(job(models, tmp_path / "on"), silent)


@pytest.mark.parametrize("shape", [(), (7,), (100, 8), (1000, 8), (999, 3), (5, 200), (3, 5000), (1_000_000,)])
def test_runs_of_rows_are_spread_over_the_tensor_and_bounded(shape: tuple[int, ...]) -> None:
    most = 1024
    runs = spread_runs(shape, most)
    rows, width = (shape or (1,))[0], int(torch.Size(shape[1:]).numel())
    taken = sum(run.stop - run.start for run in runs)
    assert taken * width <= max(most, width)
    assert taken == rows or taken * width > most // 2 or taken == 1
    assert all(first.stop <= second.start for first, second in pairwise(runs))
    assert runs[0].start >= 0
    assert runs[-1].stop <= rows
    if rows > taken > 1:
        assert (runs[0].start, runs[-1].stop) == (0, rows)
