"""`report.json`: its numbers are those of the artifact, computed anew; its keys are documented."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.reports import invented_result
from tests.score_names import named
from tests.tiny import (
    HEADS,
    LAYERS,
    NEURONS,
    dataset_spec,
    merge_spec,
    model_spec,
    silent,
    tiny_base,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec, MergeSpec
from worker.engine.catalog.data.spec import HubSource
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.jobs.engine import Engine
from worker.engine.reporting import contents
from worker.engine.reporting.card import model_card

WEIGHTS = {"a": 1.0, "b": 3.0}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeSpec, MergeResult]:
    root = tmp_path_factory.mktemp("merged")
    tiny_base(root / "base")
    models = []
    for seed, (name, weight) in enumerate(WEIGHTS.items()):
        rows = write_rows(root / f"{name}.jsonl", count=80, seed=seed)
        evaluation = EvaluationSpec(**dataset_spec(rows, limit=40, split="test").model_dump(), metric="matthews")
        checkpoint = tiny_checkpoint(root / name, seed=seed)
        models.append(model_spec(checkpoint, rows, weight=weight, evaluation=evaluation))
    spec = merge_spec(root / "out", models, {"examples": 64, "floor": 0.2}, evaluate=True)
    spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=root / "base")})
    return spec, Engine().merge(spec, silent)


@pytest.fixture(scope="module")
def report(merged: tuple[MergeSpec, MergeResult]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged[0].folder / "report.json").read_text())
    return found


def scores_of(folder: Path, name: str, nodes: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(layers, nodes)."""
    scores = load_file(folder / "scores" / f"{name}.safetensors")
    return np.stack([scores[f"layers.{layer}.{nodes}"].double().numpy() for layer in range(LAYERS)])


def test_maps_have_the_scores_and_the_merge_weights_that_follow(
    merged: tuple[MergeSpec, MergeResult], report: dict[str, Any]
) -> None:
    folder = merged[0].folder
    assert [(of["nodes"], of["layers"], of["count"]) for of in report["maps"]["maps"]] == [
        ("heads", LAYERS, HEADS),
        ("neurons", LAYERS, NEURONS),
    ]
    shares: dict[str, list[float]] = {name: [] for name in WEIGHTS}
    for of in report["maps"]["maps"]:
        scores = {name: scores_of(folder, name, of["nodes"]) for name in WEIGHTS}
        for name in WEIGHTS:
            np.testing.assert_allclose(of["scores"][name], scores[name], rtol=1e-3)
        relative = {name: s / s.mean(1, keepdims=True) for name, s in scores.items()}
        lifted = {name: WEIGHTS[name] * np.maximum(s, 0.2 * s.mean(1, keepdims=True)) for name, s in relative.items()}
        for name in WEIGHTS:
            wanted = lifted[name] / sum(lifted.values())
            np.testing.assert_allclose(of["weights"][name], wanted, rtol=1e-3)
            shares[name] += list(wanted.flat)
        assert of["lambdas"] == {"a": 0.25, "b": 0.75}
    for model in report["models"]:
        assert model["weight_share"] == pytest.approx(np.mean(shares[model["name"]]), rel=1e-6)


def test_large_maps_are_means_over_runs_of_nodes_and_layers(merged: tuple[MergeSpec, MergeResult]) -> None:
    spec, _ = merged
    layers, nodes = 100, 1000
    generator = torch.Generator().manual_seed(0)
    scores = {
        named(f"layers.{layer}.{kind}"): torch.rand(nodes, generator=generator, dtype=torch.float64)
        for layer in range(layers)
        for kind in ("heads", "neurons")
    }
    maps = contents.of_scores(spec, {"a": scores}).maps
    assert maps is not None
    assert (maps.models, maps.left_out) == (["a"], 0)
    for of in maps.maps:
        dense = np.stack([scores[named(f"layers.{layer}.{of.nodes}")].numpy() for layer in range(layers)])
        wanted = [
            [part.mean(1).mean() for part in np.array_split(rows, contents.BLOCKS, 1)]
            for rows in np.array_split(dense, contents.BLOCKS)
        ]
        np.testing.assert_allclose(np.array(of.scores["a"], dtype=float), wanted, rtol=1e-3)
        assert of.weights == {}


def test_models_of_different_sizes_have_maps_of_their_own(merged: tuple[MergeSpec, MergeResult]) -> None:
    sizes = {"a": (2, 3, 5), "b": (4, 2, 5)}
    scores = {
        name: {
            named(f"layers.{layer}.{kind}"): torch.rand(count, dtype=torch.float64)
            for layer in range(layers)
            for kind, count in (("heads", heads), ("neurons", neurons))
        }
        for name, (layers, heads, neurons) in sizes.items()
    }
    maps = contents.of_scores(merged[0], scores).maps
    assert maps is not None
    assert maps.models == ["a", "b"]
    found = {(name, of.layers, of.nodes, of.count) for of in maps.maps for name in of.scores}
    assert found == {("a", 2, "heads", 3), ("a", 2, "neurons", 5), ("b", 4, "heads", 2), ("b", 4, "neurons", 5)}
    for of in maps.maps:
        for name, grid in of.scores.items():
            wanted = np.stack([scores[name][named(f"layers.{layer}.{of.nodes}")].numpy() for layer in range(of.layers)])
            np.testing.assert_allclose(np.array(grid, dtype=float), wanted, rtol=1e-3)


def test_the_report_has_numbers_only_and_says_how_it_was_made(
    merged: tuple[MergeSpec, MergeResult], report: dict[str, Any]
) -> None:
    text = (merged[0].folder / "report.json").read_text()
    assert not [name for name in ("NaN", "Infinity") if name in text]
    made = report["construction"]
    assert made["heads"] == "kept"
    assert made["dtype"] == "float32"
    assert sum(group["tensors"] for group in made["groups"]) == sum(report["owners"].values())
    assert {group["kind"]: group["owner"] for group in made["groups"]}["query"] == "heads"
    layers = report["interference"]["layers"]
    assert [layer["layer"] for layer in layers] == [*range(LAYERS), None]
    assert report["interference"]["share_read"] == 1
    assert all(-1 <= layer["cosine"]["least"] <= layer["cosine"]["most"] <= 1 for layer in layers)
    manifest = json.loads((merged[0].folder / "manifest.json").read_text())
    assert (report["versions"], report["threads"]) == (manifest["versions"], manifest["threads"])


def test_every_key_of_the_report_is_documented(report: dict[str, Any]) -> None:
    page = (REPOSITORY / "docs" / "report.md").read_text()
    missing = [key for key in [*report, *MergeResult.model_fields] if f"`{key}`" not in page]
    assert missing == []


# --- the card ----------------------------------------------------------------------------------------


def test_the_hub_reads_the_evaluations_from_the_card(merged: tuple[MergeSpec, MergeResult]) -> None:
    spec, result = merged
    card = ModelCard.load(spec.folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert set(card.data.tags) == {"merge", "maskmerge"}
    assert card.data.license is None
    assert card.data.model_name == spec.name
    found = {evaluated.task_name: evaluated for evaluated in card.data.eval_results}
    assert result.metrics is not None
    assert set(found) == set(result.metrics)
    for name, metric in result.metrics.items():
        evaluated = found[name]
        assert isinstance(evaluated, EvalResult)
        assert evaluated.task_type == "text-classification"
        assert (evaluated.dataset_name, evaluated.dataset_split) == (f"{name}.jsonl", "test")
        assert evaluated.metric_type == "matthews_correlation"
        assert evaluated.metric_value == pytest.approx(metric.merged, abs=1e-6)
        assert evaluated.metric_name is not None
        assert f"on {metric.examples} rows" in evaluated.metric_name


def test_a_card_names_what_it_came_from_on_the_hub_and_the_candidates(merged: tuple[MergeSpec, MergeResult]) -> None:
    spec, result = merged
    hub = HubSource(repository="org/data", commit="0" * 40)
    models = [
        model.model_copy(
            update={
                "hub": HubSource(repository=f"org/{model.name}", commit="1" * 40),
                "evaluation": model.evaluation and model.evaluation.model_copy(update={"hub": hub, "config": "mrpc"}),
            }
        )
        for model in spec.models
    ]
    searched = result.model_copy(update={"candidates": invented_result(list(WEIGHTS)).candidates})
    plan = plan_merge([inspect_checkpoint(m.path, m.source) for m in spec.models if m.path])
    text = model_card(spec.model_copy(update={"models": models, "name": 'x: "y" & <z>'}), plan, searched)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == ["org/a", "org/b"]
    assert head["base_model_relation"] == "merge"
    assert head["datasets"] == ["org/data"]
    name, evaluations = model_index_to_eval_results(head["model-index"])
    assert name == 'x: "y" & <z>'
    assert {(e.dataset_type, e.dataset_config, e.dataset_split) for e in evaluations} == {("org/data", "mrpc", "test")}
    assert ModelCard(text).data["base_model"] == ["org/a", "org/b"]
    assert "| mask_fisher (chosen) |" in text
    assert all(math.isfinite(e.metric_value) for e in evaluations)
