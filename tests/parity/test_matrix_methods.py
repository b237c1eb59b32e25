"""Methods that merge the task vectors of linear layers as matrices: against the authors' code, and against a dense
computation that takes another way, by NumPy's decompositions."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from app.contracts.requests import MergeRequest
from tests.tiny import merge_spec, merged_of, model_spec, read_model, silent, tiny_base, tiny_checkpoint
from tests.tiny_families import TINY_FAMILIES, TINY_MIXTURES
from worker.engine.catalog.checkpoints.tensor_names import slot_of
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.families import Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.deberta_v2 import DEBERTA_V2
from worker.engine.catalog.families.gpt2 import GPT2
from worker.engine.catalog.families.table import Family
from worker.engine.catalog.methods import METHODS, MatrixParameters
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import BUILDERS, MeasuredModel

Array = NDArray[np.float64]
Dense = Callable[..., Array]
"""Of the task vectors, (outputs, inputs), their relative weights, whose mean is 1, and the method's parameters."""

LAMBDAS = (1.0, 2.5, 0.5)
SHAPES = ((12, 7), (7, 12), (9, 9))
WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"


def slot_in(family: Family, name: str) -> Slot:
    slot = family.slot(name)
    assert slot is not None
    return slot


LINEAR = slot_in(BERT, WEIGHT)
TRANSPOSED = slot_in(GPT2, "transformer.h.0.mlp.c_fc.weight")


def tensors_of(
    shape: Sequence[int], models: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """A base, and models that have drifted from it, in part alike."""
    rng = torch.Generator().manual_seed(5)
    base, common = (torch.randn(tuple(shape), generator=rng, dtype=torch.float64) for _ in range(2))
    steps = [torch.randn(tuple(shape), generator=rng, dtype=torch.float64) for _ in range(models)]
    return base.to(dtype), [(base + 0.2 * common + 0.3 * step).to(dtype) for step in steps]


def merge(
    method: str,
    versions: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float] | None = None,
    slot: Slot = LINEAR,
    **parameters: Any,
) -> Tensor:
    models = [MeasuredModel(weight) for weight in weights or [1.0] * len(versions)]
    merger = BUILDERS[method](METHODS[method].parameters(name=method, **parameters), models)
    return merged_of(merger, slot, versions, base)


def float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


# --- the formulas, by singular value decompositions of everything ------------------------------------


def orthogonal(vectors: Array) -> Array:
    """The solution of the Procrustes problem; singular values of rounding have no part."""
    u, s, vt = np.linalg.svd(vectors, full_matrices=False)
    kept = s > 1e-5 * s.max()
    return np.asarray(u[:, kept] @ vt[kept])


def components(matrix: Array) -> tuple[Array, Array, Array]:
    """Without those that are zero, whose vectors are anything."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6
    return u[:, kept], s[kept], vt[kept]


def tsv_m(deltas: Sequence[Array], weights: Sequence[float], rank: float = 1.0) -> Array:
    parts = [components(delta) for delta in deltas]
    most = max(1, math.floor(rank * min(deltas[0].shape) / len(deltas) + 1e-9))
    left = orthogonal(np.concatenate([u[:, :most] for u, _, _ in parts], axis=1))
    right = orthogonal(np.concatenate([vt[:most] for _, _, vt in parts]).T)
    values = np.concatenate([w * s[:most] for w, (_, s, _) in zip(weights, parts, strict=True)])
    return np.asarray(left @ np.diag(values) @ right.T)


DENSE: Mapping[str, Dense] = {"tsv_m": tsv_m}
VARIANTS: Sequence[tuple[str, dict[str, Any]]] = [("tsv_m", {}), ("tsv_m", {"rank": 0.6})]
VARIED = pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)
EVERY = pytest.mark.parametrize("method", DENSE)


def dense(method: str, base: Tensor, versions: Sequence[Tensor], weights: Sequence[float], **parameters: Any) -> Array:
    relative = [weight * len(weights) / sum(weights) for weight in weights]
    deltas = [float64(version) - float64(base) for version in versions]
    return np.asarray(float64(base) + DENSE[method](deltas, relative, **parameters))


def mean_of(versions: Sequence[Tensor], weights: Sequence[float]) -> Array:
    return np.asarray(np.average([float64(version) for version in versions], axis=0, weights=weights))


@VARIED
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), LAMBDAS, (1.0, 3.0)], ids=str)
def test_a_linear_layer_is_merged_by_the_formula(
    method: str, parameters: dict[str, Any], weights: Sequence[float]
) -> None:
    for shape in SHAPES:
        for dtype, within in ((torch.float32, 2e-6), (torch.float64, 1e-9)):
            base, versions = tensors_of(shape, len(weights), dtype)
            found = merge(method, versions, base, weights, **parameters)
            assert found.dtype == dtype
            expected = dense(method, base, versions, weights, **parameters)
            np.testing.assert_allclose(float64(found), expected, rtol=0, atol=within, err_msg=f"{shape} {dtype}")


# --- the authors' code -------------------------------------------------------------------------------


def authors_input(shape: tuple[int, int], model: int) -> Tensor:
    """A task vector that anyone can make again; the base is zero."""
    place = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    return torch.sin((model + 1.7) * (place + 0.3) ** 2)


AUTHORS: Sequence[tuple[str, dict[str, Any], tuple[int, int], list[list[float]]]] = [
    (
        "tsv_m",
        {},
        (6, 4),
        [
            [0.455147385, -0.629632981, 0.999345764, -1.065820611],
            [-1.225648692, -0.909443091, 0.028929239, -0.891343855],
            [-0.930806063, 0.908790455, -0.821486223, -0.902050631],
            [-0.638831699, -0.275654023, 0.558493257, 1.095119767],
            [0.9165239, -0.535917868, -1.134567365, -0.451525272],
            [0.383789203, -0.665287536, -1.091953487, 0.646747984],
        ],
    ),
    (
        "tsv_m",
        {},
        (4, 6),
        [
            [-0.964866576, 0.491444092, 0.80297676, -0.932760974, -0.342261576, 1.264198917],
            [-1.065895306, 0.405642637, -0.507132043, 0.936656269, -0.890271201, -0.078241128],
            [-1.033129531, -0.452229838, -0.554808733, -0.423965872, 0.486468975, -1.209157803],
            [-0.215243851, -1.135416768, 0.964260771, -0.225319329, -1.039559376, -0.072775772],
        ],
    ),
]
"""What the authors' code made of two task vectors. `tsv_m`: `compute_and_sum_svd_mem_reduction` of
AntoAndGar/task_singular_vectors at commit a6c9718."""


@pytest.mark.parametrize(("method", "parameters", "shape", "expected"), AUTHORS)
def test_the_authors_code_gives_the_same_numbers(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], expected: list[list[float]]
) -> None:
    versions = [authors_input(shape, model) for model in range(2)]
    found = merge(method, versions, torch.zeros(shape, dtype=torch.float64), **parameters)
    np.testing.assert_allclose(float64(found), expected, rtol=0, atol=1e-8)


def test_every_method_of_matrices_is_here() -> None:
    assert {name for name, entry in METHODS.items() if issubclass(entry.parameters, MatrixParameters)} == DENSE.keys()


# --- which tensors are matrices ----------------------------------------------------------------------


@EVERY
def test_a_matrix_stored_as_inputs_and_outputs_merges_as_its_transpose(method: str) -> None:
    base, versions = tensors_of((12, 7), dtype=torch.float64)
    found = merge(method, [v.T.contiguous() for v in versions], base.T.contiguous(), LAMBDAS, TRANSPOSED)
    torch.testing.assert_close(found.T, merge(method, versions, base, LAMBDAS), rtol=0, atol=1e-12)


@EVERY
def test_tensors_of_no_linear_layer_are_averaged(method: str) -> None:
    """So are tensors outside of the layers where no table says what they are."""
    for name, shape in (
        ("bert.embeddings.word_embeddings.weight", (30, 8)),
        ("bert.embeddings.position_embeddings.weight", (12, 8)),
        ("bert.encoder.layer.0.output.LayerNorm.weight", (8,)),
        ("bert.encoder.layer.0.output.dense.bias", (8,)),
    ):
        base, versions = tensors_of(shape)
        average = merge("average", versions, base, LAMBDAS, slot_in(BERT, name))
        assert torch.equal(merge(method, versions, base, LAMBDAS, slot_in(BERT, name)), average), name
    for name, axes in (("model.embed.weight", (30, 8)), ("model.layers.0.conv.weight", (6, 5, 3))):
        base, versions = tensors_of(axes)
        average = merge("average", versions, base, LAMBDAS, slot_of(name))
        assert torch.equal(merge(method, versions, base, LAMBDAS, slot_of(name)), average), name


@EVERY
def test_matrices_without_gram_matrices_count_too(method: str) -> None:
    """A head's view of positions, the pooler, and matrices inside the layers of an architecture without a table."""
    base, versions = tensors_of((9, 9))
    expected = merge(method, versions, base)
    for slot in (
        slot_in(DEBERTA_V2, "deberta.encoder.layer.0.attention.self.pos_key_proj.weight"),
        slot_in(BERT, "bert.pooler.dense.weight"),
        slot_of("model.layers.3.mixer.in_proj.weight"),
    ):
        assert torch.equal(merge(method, versions, base, slot=slot), expected), slot.name


# --- what holds of all of them -----------------------------------------------------------------------


@VARIED
def test_task_vectors_of_zero_leave_the_base(method: str, parameters: dict[str, Any]) -> None:
    for shape in (*SHAPES, (1, 5), (5, 1), (1, 1), (0, 3), (3, 0)):
        base, _ = tensors_of(shape)
        assert torch.equal(merge(method, [base] * 3, base, LAMBDAS, **parameters), base)


@VARIED
def test_a_model_that_did_not_change_a_matrix_takes_no_directions(method: str, parameters: dict[str, Any]) -> None:
    """Its task vector has no singular vectors; those that a decomposition returns would be anything."""
    base, versions = tensors_of((9, 9), dtype=torch.float64)
    given = [*versions[:2], base]
    found = merge(method, given, base, LAMBDAS, **parameters)
    expected = dense(method, base, given, LAMBDAS, **parameters)
    np.testing.assert_allclose(float64(found), expected, rtol=0, atol=1e-9)


@VARIED
def test_the_order_of_the_models_does_not_matter(method: str, parameters: dict[str, Any]) -> None:
    """Nor does it where models are equal, or changed a few directions alone, so that vectors depend on each other."""
    for shape in SHAPES:
        base, versions = tensors_of(shape)
        low = base + 0.3 * versions[0][:, :2] @ versions[1][:2, :] if shape[0] == shape[1] else versions[2]
        for given in (versions, [versions[0], versions[0], versions[1]], [versions[0], low, low]):
            found = merge(method, given, base, LAMBDAS, **parameters)
            turned = merge(method, given[::-1], base, LAMBDAS[::-1], **parameters)
            torch.testing.assert_close(found, turned, rtol=0, atol=3e-6)


@VARIED
def test_only_the_ratio_of_weights_matters_and_0_takes_a_model_out(method: str, parameters: dict[str, Any]) -> None:
    base, versions = tensors_of((9, 9))
    found = merge(method, versions, base, LAMBDAS, **parameters)
    scaled = merge(method, versions, base, [1e6 * weight for weight in LAMBDAS], **parameters)
    torch.testing.assert_close(found, scaled, rtol=0, atol=1e-6)
    first, _, last = versions
    without = merge(method, [first, last], base, (1.0, 2.0), **parameters)
    assert torch.equal(merge(method, versions, base, (1.0, 0.0, 2.0), **parameters), without)


@VARIED
def test_a_matrix_of_one_row_or_one_column_merges(method: str, parameters: dict[str, Any]) -> None:
    for shape in ((1, 8), (8, 1), (1, 1), (2, 2)):
        base, versions = tensors_of(shape, dtype=torch.float64)
        found = merge(method, versions, base, LAMBDAS, **parameters)
        expected = dense(method, base, versions, LAMBDAS, **parameters)
        np.testing.assert_allclose(float64(found), expected, rtol=0, atol=1e-9, err_msg=str(shape))


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_sight(method: str, bad: float) -> None:
    """The merge is refused for it, so no method may hide it."""
    for shape in ((9, 9), (9,)):
        base, versions = tensors_of(shape)
        versions[-1].view(-1)[-1] = bad
        assert not torch.isfinite(merge(method, versions, base)).all()


@EVERY
def test_inputs_are_left_as_they_were(method: str) -> None:
    base, versions = tensors_of((9, 9))
    before = [tensor.clone() for tensor in (base, *versions)]
    merge(method, versions, base, LAMBDAS)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *versions), strict=True))


@EVERY
def test_a_base_is_needed_and_weights_below_0_are_refused(method: str) -> None:
    def requested(base: str | None, weight: float = 1.0) -> MergeRequest:
        models = [{"name": f"m{i}", "checkpoint": f"local:m{i}", "weight": w} for i, w in enumerate((1.0, weight))]
        return MergeRequest.model_validate({"method": {"name": method}, "models": models, "base": base})

    assert requested("local:base", 2.0).method.needs_base
    with pytest.raises(ValidationError, match="name it as base"):
        requested(None)
    with pytest.raises(ValidationError, match="weight"):
        requested("local:base", -0.5)


# --- equal models ------------------------------------------------------------------------------------


def test_tsv_m_of_equal_models_is_the_part_of_each_that_it_keeps() -> None:
    """N equal components count once. So one model is its own merge, and several are not."""
    for count in (1, 2, 3):
        for shape in SHAPES:
            base, [version] = tensors_of(shape, 1, torch.float64)
            u, s, vt = np.linalg.svd(float64(version - base), full_matrices=False)
            kept = min(shape) // count
            expected = float64(base) + u[:, :kept] @ np.diag(s[:kept]) @ vt[:kept]
            found = float64(merge("tsv_m", [version] * count, base))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


# --- through the engine ------------------------------------------------------------------------------

TINY = {**{name: TINY_FAMILIES[name] for name in ("bert", "gpt2", "phi3")}, "qwen3_moe": TINY_MIXTURES["qwen3_moe"]}
"""A plain family, transposed matrices, fused ones, and experts of a mixture."""
NOT_LINEAR = ("embed", "norm", "wte", "wpe", "ln_", "LayerNorm")


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Path]]:
    """A base and two models of it."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    models = [tiny_checkpoint(root / f"m{seed}", family=TINY[name], seed=seed) for seed in range(2)]
    return name, tiny_base(root / "base", family=TINY[name]), models


@EVERY
def test_every_tensor_of_a_family_is_merged_as_its_purpose_says(
    family: tuple[str, Path, list[Path]], tmp_path: Path, method: str
) -> None:
    name, base, checkpoints = family
    weights = (1.0, 2.0)
    models = [model_spec(path, weight=weight) for path, weight in zip(checkpoints, weights, strict=True)]
    spec = merge_spec(tmp_path / "out", models, {"name": method, "scale": 0.5})
    origin = CheckpointSpec(source="local:base", path=base)
    Engine(torch.device("cpu")).merge(spec.model_copy(update={"base": origin}), silent)
    found = read_model(spec.folder / "models" / "m0")
    ancestor, versions = read_model(base), [read_model(path) for path in checkpoints]
    linear = 0
    for tensor, merged in found.items():
        if tensor.startswith(TINY[name].head):
            continue
        origin_of, own = _in_base(ancestor, tensor), [version[tensor] for version in versions]
        is_linear = merged.dim() == 2 and not any(part in tensor for part in NOT_LINEAR)
        linear += is_linear
        if is_linear and name == "gpt2":
            expected = dense(method, origin_of.T, [version.T for version in own], weights).T
        elif is_linear:
            expected = dense(method, origin_of, own, weights)
        else:
            expected = mean_of(own, weights)
        expected = (expected + float64(origin_of)) / 2
        np.testing.assert_allclose(float64(merged), expected, rtol=0, atol=2e-6, err_msg=tensor)
    assert linear >= 8
    shutil.rmtree(tmp_path / "out")


def _in_base(ancestor: Mapping[str, Tensor], name: str) -> Tensor:
    """A base has no head, and so no prefix."""
    return ancestor[name] if name in ancestor else ancestor[name.partition(".")[2]]
