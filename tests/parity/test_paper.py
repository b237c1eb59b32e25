"""The preset `paper`: the published rule, from its description, by autograd through masks that are really there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from tests.tiny import (
    LAYERS,
    Tensors,
    edit_tensors,
    float64_model,
    insert_masks,
    merge_spec,
    model_spec,
    read_model,
    read_rows,
    silent,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.jobs.engine import Engine

BATCH = 32
EXAMPLES = 70  # two batches and a partial one
HEAD_DIM = 4
LABELS = {"classification": (2, 3, 2), "with-regression": (2, 1, 3)}
ROWS = (80, 90, 45)  # the last has fewer than asked for
DEAD_HEAD = (0, 1)  # layer, head: its context is zero in every model
DEAD_NEURON = (0, 5)  # nothing reads it in any model
DEAD_LAYER = 1  # of whose neurons nothing reads any

Scores = tuple[Tensor, Tensor]
"""Of the heads (layers, heads) and of the neurons (layers, neurons)."""


def kill(tensors: Tensors) -> None:
    """Make some masks without effect, so that their scores are exactly zero."""
    layer, head = DEAD_HEAD
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    for part in ("weight", "bias"):
        tensors[f"bert.encoder.layer.{layer}.attention.self.value.{part}"][rows] = 0
    tensors[f"bert.encoder.layer.{layer}.attention.output.dense.weight"][:, rows] = 0
    layer, neuron = DEAD_NEURON
    tensors[f"bert.encoder.layer.{layer}.output.dense.weight"][:, neuron] = 0
    tensors[f"bert.encoder.layer.{DEAD_LAYER}.output.dense.weight"][:] = 0


@pytest.fixture(scope="module", params=LABELS)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("paper")
    found = []
    for seed, (labels, rows) in enumerate(zip(LABELS[request.param], ROWS, strict=True)):
        found.append(tiny_checkpoint(root / f"m{seed}", labels=labels, seed=seed))
        edit_tensors(found[-1], kill)
        write_rows(root / f"m{seed}.jsonl", count=rows, labels=labels, seed=seed)
    return found


@pytest.fixture(scope="module")
def artifact(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in checkpoints]
    Engine().merge(merge_spec(folder, models, {"preset": "paper", "examples": EXAMPLES}), silent)
    return folder


@pytest.fixture(scope="module")
def scores(checkpoints: list[Path]) -> list[Scores]:
    return [published_scores(path) for path in checkpoints]


def published_scores(checkpoint: Path) -> Scores:
    """Squared gradients of the model's own loss, which is a batch's mean, summed over batches."""
    model = float64_model(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = read_rows(checkpoint.with_suffix(".jsonl"))[:EXAMPLES]
    heads, neurons = insert_masks(model)
    totals = torch.zeros_like(heads), torch.zeros_like(neurons)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        inputs = tokenizer([row.text for row in batch], padding="longest", return_tensors="pt")
        labels = torch.tensor([row.label for row in batch])
        loss = model(**inputs, labels=labels.double() if model.config.num_labels == 1 else labels).loss
        for total, gradient in zip(totals, torch.autograd.grad(loss, (heads, neurons), retain_graph=True), strict=True):
            total += gradient**2
    return totals


def published_score_of_slices(name: str, heads: Tensor, neurons: Tensor) -> Tensor:
    """The scores of a tensor's slices along its first axis; one score is the whole tensor's."""
    inner = re.search(r"layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if inner is None:
        return (heads.mean(1) + neurons.mean(1)).mean(0, keepdim=True)
    layer = int(inner[1])
    match inner[2]:
        case "attention.self.query" | "attention.self.key":
            return heads[layer].repeat_interleave(HEAD_DIM)
        case "intermediate.dense":
            return neurons[layer]
        case "attention.self.value" | "attention.output.dense" | "attention.output.LayerNorm":
            return heads[layer].mean(0, keepdim=True)
        case "output.dense" | "output.LayerNorm":
            return neurons[layer].mean(0, keepdim=True)
    raise AssertionError(f"the rule does not mention {name}")


def test_scores_are_the_published_sums_of_squared_batch_gradients(artifact: Path, scores: list[Scores]) -> None:
    for index, (heads, neurons) in enumerate(scores):
        found = load_file(artifact / "scores" / f"m{index}.safetensors")
        for layer in range(LAYERS):
            torch.testing.assert_close(found[f"layers.{layer}.heads"], heads[layer], rtol=1e-4, atol=0)
            torch.testing.assert_close(found[f"layers.{layer}.neurons"], neurons[layer], rtol=1e-4, atol=0)
        assert heads[DEAD_HEAD] == 0
        assert neurons[DEAD_NEURON] == 0
        assert not neurons[DEAD_LAYER].any()


def test_every_backbone_tensor_is_the_published_merge(
    artifact: Path, checkpoints: list[Path], scores: list[Scores]
) -> None:
    versions = [read_model(path) for path in checkpoints]
    merged = read_model(artifact / "models" / "m0")
    backbone = [name for name in versions[0] if not name.startswith("classifier")]
    assert {name for name in merged if not name.startswith("classifier")} == set(backbone)
    for name in backbone:
        weights = torch.stack([published_score_of_slices(name, *of_model) for of_model in scores])
        total = weights.sum(0)
        weights = torch.where(total > 0, weights / total, 1 / len(versions))
        expected = torch.zeros_like(versions[0][name], dtype=torch.float64)
        for version, weight in zip(versions, weights, strict=True):
            expected += weight.view(-1, *[1] * (expected.dim() - 1)) * version[name].double()
        np.testing.assert_allclose(merged[name].numpy(), expected.numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_the_preset_fixes_what_the_published_code_fixes(artifact: Path) -> None:
    method = merge_spec(artifact, [], {"preset": "paper"}).method
    fixed = {"estimator": "empirical", "normalize": "none", "precision": "float32", "floor": 0.0}
    assert {key: getattr(method, key) for key in fixed} == fixed
    with pytest.raises(ValueError, match="preset 'paper' fixes normalize to 'none'; leave it out"):
        merge_spec(artifact, [], {"preset": "paper", "normalize": "layer"})
