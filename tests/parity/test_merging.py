"""The merge against a dense computation in float64, and who owns which slice against what masks do."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.score_names import named
from tests.tiny import (
    HEADS,
    LAYERS,
    NEURONS,
    Tensors,
    edit_tensors,
    float64_model,
    insert_masks,
    merge_spec,
    merged_of,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.catalog.families import NODE_KINDS, Kind, NodeKind, ScoreName
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.methods import MaskFisherParameters
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import BUILDERS, MeasuredModel

Scores = Mapping[Any, Tensor]
Array = NDArray[np.float64]

COUNTS = {"heads": HEADS, "neurons": NEURONS}
LABELS = (2, 3, 1)
CONVEX: tuple[dict[str, Any], ...] = (
    {},
    {"normalize": "none", "rest": "model", "floor": 0.0},
    {"preset": "paper"},
    {"name": "average"},
    {"name": "fisher"},
)
METHODS = (*CONVEX, {"name": "regmean"}, {"name": "mask_regmean"}, {"name": "aligned_regmean"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("merging")
    for seed, labels in enumerate(LABELS):
        tiny_checkpoint(root / f"m{seed}", labels=labels, seed=seed)
        write_rows(root / f"m{seed}.jsonl", labels=labels, seed=seed)
    return [root / f"m{seed}" for seed in range(len(LABELS))]


def merge(
    engine: Engine,
    folder: Path,
    checkpoints: Sequence[Path],
    method: Mapping[str, Any],
    weights: Sequence[float] | None = None,
    **output: Any,
) -> Tensors:
    """The merged backbone, as it is in the artifact in `folder`."""
    models = [
        model_spec(path, path.with_suffix(".jsonl"), weight=weight)
        for path, weight in zip(checkpoints, weights or [1.0] * len(checkpoints), strict=True)
    ]
    engine.merge(merge_spec(folder, models, method, **output), silent)
    return backbone(folder / "models" / checkpoints[0].name)


def backbone(folder: Path) -> Tensors:
    return {name: tensor for name, tensor in read_model(folder).items() if not name.startswith("classifier")}


def owner_of(name: str) -> tuple[str, int] | None:
    """The score and the axis that METHOD's table gives a BERT tensor; None for what no node owns."""
    inner = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if inner is None:
        return None
    layer, module, part = inner.groups()
    if module in ("attention.self.query", "attention.self.key", "attention.self.value"):
        return f"layers.{layer}.heads", 0
    if module == "intermediate.dense":
        return f"layers.{layer}.neurons", 0
    if part == "weight" and module == "attention.output.dense":
        return f"layers.{layer}.heads", 1
    if part == "weight" and module == "output.dense":
        return f"layers.{layer}.neurons", 1
    return None


def or_one(value: Any) -> Any:
    return np.where(value == 0, 1.0, value)


def normalised(scores: Scores, normalize: str) -> dict[str, Array]:
    """`F'` before the floor."""
    arrays = {name: score.numpy() for name, score in scores.items()}
    if normalize == "layer":
        return {name: score / or_one(score.mean()) for name, score in arrays.items()}
    if normalize == "model":
        norms = {kind: np.sqrt(sum((s**2).sum() for n, s in arrays.items() if n.endswith(kind))) for kind in COUNTS}
        return {name: score / or_one(norms[name.split(".")[-1]]) for name, score in arrays.items()}
    return arrays


def shares(lambdas: Array, scores: Sequence[Array]) -> Array:
    """`w_j = lambda_j F'_j / sum_k lambda_k F'_k`, (models, nodes); lambda alone where the sum is zero."""
    weighted = lambdas[:, None] * np.stack(scores)
    total = weighted.sum(0)
    uniform = np.broadcast_to((lambdas / lambdas.sum())[:, None], weighted.shape)
    return np.where(total > 0, weighted / or_one(total), uniform)


def dense_merge(
    versions: Sequence[Tensors],
    scores: Sequence[Scores],
    weights: Sequence[float],
    normalize: str = "layer",
    rest: str = "uniform",
    floor: float = 1e-3,
) -> dict[str, Array]:
    """The whole merge with one weight per element, in float64."""
    lambdas = np.array(weights)
    floored = [
        {n: np.maximum(s, floor * or_one(s.mean())) for n, s in normalised(of_model, normalize).items()}
        for of_model in scores
    ]
    by_model = [normalised(of_model, "model") for of_model in scores]
    merged = {}
    for name, first in versions[0].items():
        owner = owner_of(name)
        if owner is not None:
            score, axis = owner
            share = shares(lambdas, [of_model[score] for of_model in floored])
            share = share.repeat(first.shape[axis] // share.shape[1], axis=1)
            share = share.reshape(len(lambdas), *[-1 if d == axis else 1 for d in range(first.dim())])
        elif rest == "uniform":
            share = (lambdas / lambdas.sum()).reshape(-1, *[1] * first.dim())
        else:
            inner = re.search(r"layer\.(\d+)\.", name)
            layers = [int(inner[1])] if inner else range(LAYERS)
            of_block = [[[s[f"layers.{i}.{kind}"].mean() for i in layers for kind in COUNTS]] for s in by_model]
            share = shares(lambdas, [np.mean(means, axis=1) for means in of_block]).reshape(-1, *[1] * first.dim())
        merged[name] = (share * np.stack([version[name].double().numpy() for version in versions])).sum(0)
    return merged


def assert_merged(found: Mapping[str, Tensor], expected: Mapping[str, Array], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].double().numpy(), tensor, rtol=0, atol=tolerance, err_msg=name)


def random_scores(seed: int, scale: float) -> dict[ScoreName, Tensor]:
    """Heavy-tailed scores with a node that is dead in every model, one that is dead in this, and a dead layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for layer in range(LAYERS):
        for kind, count in COUNTS.items():
            score = scale * torch.randn(count, generator=generator, dtype=torch.float64).mul(2).exp()
            score[0] = 0
            score[1 + seed] = 0
            scores[named(f"layers.{layer}.{kind}")] = score
    scores[named("layers.1.neurons")] = torch.zeros(NEURONS, dtype=torch.float64)
    return scores


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.5, 1.0)])
@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("rest", ["uniform", "model"])
@pytest.mark.parametrize("normalize", ["layer", "model", "none"])
def test_mask_fisher_is_the_dense_computation(
    checkpoints: list[Path], normalize: Any, rest: Any, floor: float, weights: tuple[float, ...]
) -> None:
    versions = [backbone(path) for path in checkpoints]
    scores = [random_scores(seed, scale=10.0 ** (seed - 1)) for seed in range(len(versions))]
    parameters = MaskFisherParameters(normalize=normalize, rest=rest, floor=floor)
    models = [MeasuredModel(weight, of_model) for weight, of_model in zip(weights, scores, strict=True)]
    merger = BUILDERS["mask_fisher"](parameters, models)
    found = {}
    for name in versions[0]:
        slot = BERT.slot(name)
        assert slot is not None, name
        found[name] = merged_of(merger, slot, [version[name] for version in versions])
    assert_merged(found, dense_merge(versions, scores, weights, normalize, rest, floor))


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"normalize": "model", "rest": "model", "floor": 0.01}, (1.0, 2.0, 0.5)),
        ({"normalize": "none", "floor": 0.0}, (1.0, 1.0, 3.0)),
    ],
)
def test_the_artifact_is_the_dense_computation_with_its_own_scores(
    engine: Engine, checkpoints: list[Path], tmp_path: Path, method: dict[str, Any], weights: tuple[float, ...]
) -> None:
    found = merge(engine, tmp_path, checkpoints, method, weights)
    scores = [load_file(tmp_path / "scores" / f"{path.name}.safetensors") for path in checkpoints]
    scores = [{name: s for name, s in of_model.items() if not name.endswith("stderr")} for of_model in scores]
    assert_merged(found, dense_merge([backbone(path) for path in checkpoints], scores, weights, **method))


@pytest.mark.parametrize("normalize", ["layer", "model", "none"])
def test_a_layer_that_is_dead_in_one_model_does_not_outvote_the_others(normalize: Any) -> None:
    slot = BERT.slot("bert.encoder.layer.0.intermediate.dense.bias")
    assert slot is not None
    alive = {
        named(f"layers.{i}.{kind}"): torch.full((n,), 1e-6).double()
        for i in range(LAYERS)
        for kind, n in COUNTS.items()
    }
    dead = {**alive, named("layers.0.neurons"): torch.zeros(NEURONS, dtype=torch.float64)}
    merger = BUILDERS["mask_fisher"](
        MaskFisherParameters(normalize=normalize), [MeasuredModel(1.0, alive), MeasuredModel(1.0, dead)]
    )
    share_of_the_dead = merged_of(merger, slot, [torch.zeros(NEURONS), torch.ones(NEURONS)])
    assert float(share_of_the_dead.max()) < 0.01


@pytest.fixture(scope="module")
def probe(checkpoints: list[Path]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, 100, (3, 12), generator=generator)}


NODES = [
    (nodes, layer, index)
    for nodes, index in ((NODE_KINDS["heads"], 2), (NODE_KINDS["neurons"], 7))
    for layer in range(LAYERS)
]


@pytest.mark.parametrize(("nodes", "layer", "index"), NODES)
@pytest.mark.parametrize("multiplier", [0.0, 0.3, -2.0])
def test_scaling_what_a_node_owns_after_its_activation_is_scaling_its_mask(
    checkpoints: list[Path], probe: Tensors, nodes: NodeKind, layer: int, index: int, multiplier: float
) -> None:
    masked = float64_model(checkpoints[1])
    with torch.no_grad():
        insert_masks(masked)[list(COUNTS).index(nodes.name)][layer, index] = multiplier
        expected = masked(**probe).logits
        assert not torch.allclose(expected, float64_model(checkpoints[1])(**probe).logits)
        # A head's mask can be seen on either side of its context, a neuron's only behind the non-linearity.
        for kinds in ({Kind.VALUE}, {Kind.ATTENTION_OUTPUT}) if nodes.name == "heads" else ({Kind.DOWN},):
            scaled = float64_model(checkpoints[1])
            for name, parameter in scaled.named_parameters():
                slot = BERT.slot(name)
                if slot and slot.kind in kinds and slot.owner and slot.layer == layer:
                    assert slot.owner.kinds == (nodes,)
                    owned_slice(parameter, slot.owner.axis, COUNTS[nodes.name], index).mul_(multiplier)
            torch.testing.assert_close(scaled(**probe).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("nodes", "layer", "index"), NODES)
def test_what_a_node_owns_is_exactly_what_matters_no_more_when_it_is_masked(
    checkpoints: list[Path], probe: Tensors, nodes: NodeKind, layer: int, index: int
) -> None:
    model = float64_model(checkpoints[1])
    mask = insert_masks(model)[list(COUNTS).index(nodes.name)]
    with torch.no_grad():
        mask[layer, index] = 0
    model(**probe).logits.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        slot = BERT.slot(name)
        assert slot is not None, name
        assert parameter.grad is not None, name
        if name.endswith("key.bias"):
            parameter.grad[parameter.grad.abs() < 1e-12] = 1  # softmax does not see it: its gradient is rounding
        owner = slot.owner
        if owner is not None and owner.scores == (ScoreName(layer, nodes),):
            owned = owned_slice(parameter.grad, owner.axis, COUNTS[nodes.name], index)
            assert name.endswith("key.bias") or not owned.any(), name
            owned.fill_(1)
        if slot.kind is not Kind.EMBEDDING:
            assert slices_without_effect(parameter.grad, owner.axis if owner else 0) == 0, name


def owned_slice(tensor: Tensor, axis: int, count: int, index: int) -> Tensor:
    width = tensor.shape[axis] // count
    return tensor.narrow(axis, index * width, width)


def slices_without_effect(gradient: Tensor, axis: int) -> int:
    rows = gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1)
    return int((~rows.any(1)).sum())


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, torch.float32) for method in METHODS),
        *(({}, of) for of in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_identical_models_give_identical_bits(
    engine: Engine, tmp_path: Path, dtype: torch.dtype, method: dict[str, Any]
) -> None:
    first = tiny_checkpoint(tmp_path / "a", seed=1, dtype=dtype)
    copies = [first, *(Path(shutil.copytree(first, tmp_path / name)) for name in "bc")]
    for seed, copy in enumerate(copies):
        write_rows(copy.with_suffix(".jsonl"), seed=seed)
    merged = merge(engine, tmp_path / "out", copies, method, (1.0, 0.7, 2.3))
    versions = backbone(first)
    assert merged.keys() == versions.keys()
    for name, tensor in versions.items():
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_order_of_the_models_does_not_matter(
    engine: Engine, checkpoints: list[Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    first = merge(engine, tmp_path / "first", checkpoints, method, (1.0, 2.0, 3.0))
    other = merge(engine, tmp_path / "other", checkpoints[::-1], method, (3.0, 2.0, 1.0))
    # A refitted layer reads what float32 layers before it give, so that rounding grows with depth: here to 2e-5.
    tolerance = 1e-4 if method.get("name") == "aligned_regmean" else 1e-6
    for name in first:
        torch.testing.assert_close(first[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "absent"), [*((method, 0) for method in METHODS), ({}, 2)], ids=str)
def test_weight_zero_removes_a_model(
    engine: Engine, checkpoints: list[Path], tmp_path: Path, method: dict[str, Any], absent: int
) -> None:
    weights = [0.0 if index == absent else 1.5 for index in range(len(checkpoints))]
    merge(engine, tmp_path / "with", checkpoints, method, weights)
    present = [path for index, path in enumerate(checkpoints) if index != absent]
    without = merge(engine, tmp_path / "without", present, method, [1.5] * len(present))
    for path in checkpoints:
        merged = backbone(tmp_path / "with" / "models" / path.name)
        assert merged.keys() == without.keys()
        assert all(torch.equal(merged[name], without[name]) for name in without), path.name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_only_the_ratio_of_weights_matters(
    engine: Engine, checkpoints: list[Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    first = merge(engine, tmp_path / "first", checkpoints, method, (1.0, 2.0, 0.5))
    scaled = merge(engine, tmp_path / "scaled", checkpoints, method, (1e6, 2e6, 0.5e6))
    for name in first:
        torch.testing.assert_close(first[name], scaled[name], rtol=0, atol=1e-6)


def test_average_is_the_weighted_mean(engine: Engine, checkpoints: list[Path], tmp_path: Path) -> None:
    weights = (3.0, 0.5, 1.0)
    versions = [backbone(path) for path in checkpoints]
    merged = merge(engine, tmp_path, checkpoints, {"name": "average"}, weights)
    means = {
        name: np.average([version[name].double().numpy() for version in versions], axis=0, weights=weights)
        for name in versions[0]
    }
    assert_merged(merged, means)


@pytest.mark.parametrize("method", CONVEX, ids=str)
def test_every_slice_is_between_its_versions(
    engine: Engine, checkpoints: list[Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    versions = [backbone(path) for path in checkpoints]
    merged = merge(engine, tmp_path, checkpoints, method, (1.0, 2.0, 3.0))
    for name, tensor in merged.items():
        stacked = torch.stack([version[name] for version in versions])
        assert bool((tensor >= stacked.amin(0) - 1e-6).all()), name
        assert bool((tensor <= stacked.amax(0) + 1e-6).all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_storage_is_rounded_once_at_the_end(engine: Engine, tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = [tiny_checkpoint(tmp_path / f"narrow{seed}", seed=seed, dtype=dtype) for seed in range(2)]
    wide = [Path(shutil.copytree(path, tmp_path / f"wide{i}")) for i, path in enumerate(narrow)]
    for path in wide:
        edit_tensors(path, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    for seed, path in enumerate([*narrow, *wide]):
        write_rows(path.with_suffix(".jsonl"), seed=seed % 2)
    found, expected = merge(engine, tmp_path / "n", narrow, {}), merge(engine, tmp_path / "w", wide, {})
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_models_of_different_dtypes_merge_in_the_wider_one(engine: Engine, tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    mixed = [tiny_checkpoint(tmp_path / f"m{seed}", seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    merged = merge(engine, tmp_path / "out", mixed, {"name": "average"})
    versions = [backbone(path) for path in mixed]
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    means = {name: np.mean([v[name].double().numpy() for v in versions], axis=0) for name in versions[0]}
    assert_merged(merged, means)


def test_older_tensor_names_merge_as_the_newer_ones_do(engine: Engine, checkpoints: list[Path], tmp_path: Path) -> None:
    old = Path(shutil.copytree(checkpoints[1], tmp_path / checkpoints[1].name))
    shutil.copyfile(checkpoints[1].with_suffix(".jsonl"), old.with_suffix(".jsonl"))

    def older(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    edit_tensors(old, lambda tensors: {older(name): tensor for name, tensor in tensors.items()})
    expected = merge(engine, tmp_path / "new", checkpoints, {})
    for order in ([checkpoints[0], old, checkpoints[2]], [old, checkpoints[0], checkpoints[2]]):
        merged = merge(engine, tmp_path / order[0].parent.name / order[0].name / "out", order, {})
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
