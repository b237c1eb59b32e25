"""Methods that merge the task vectors of linear layers as matrices: against the authors' code, and against a dense
computation that takes another way, by NumPy's decompositions."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from app.contracts.requests import MergeRequest
from tests.tiny import (
    drifted_tensors,
    merge_spec,
    merged_of,
    model_spec,
    read_model,
    silent,
    tiny_base,
    tiny_checkpoint,
)
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


tensors_of = partial(drifted_tensors, seed=5)


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


def iso_c(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    u, s, vt = components(sum_of(deltas, weights))
    return np.asarray(u @ vt * s.mean()) if len(s) else np.zeros_like(deltas[0])


def iso_cts(deltas: Sequence[Array], weights: Sequence[float], common: float = 0.8) -> Array:
    directions, count = min(deltas[0].shape), len(deltas)
    of_each = min(round((directions - int(common * directions)) / count), directions // count)
    parts = [first(components(sum_of(deltas, weights)), directions - count * of_each)]
    u = parts[0][0]
    for delta, weight in zip(deltas, weights, strict=True):
        parts.append(first(components(weight * (delta - u @ (u.T @ delta))), of_each))
    values = np.concatenate([s for _, s, _ in parts])
    left, right = np.concatenate([u for u, _, _ in parts], axis=1), np.concatenate([vt for _, _, vt in parts]).T
    return (
        np.asarray(orthogonal(left) @ orthogonal(right).T * values.mean()) if len(values) else np.zeros_like(deltas[0])
    )


def first(found: tuple[Array, Array, Array], count: int) -> tuple[Array, Array, Array]:
    u, s, vt = found
    return u[:, :count], s[:count], vt[:count]


def sum_of(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.asarray(sum(weight * delta for delta, weight in zip(deltas, weights, strict=True)))


def wudi(
    deltas: Sequence[Array],
    weights: Sequence[float],
    filter: str = "ridge",
    ridge: float = 1e-3,
    time: float = 300.0,
    rank: float = 0.65,
) -> Array:
    """`[sum_j w_j t_j G_j + S R] [sum_j w_j G_j + R]^-1`, with S where it starts and R what a filter adds."""
    grams = [weight * d.T @ d / max(1e-300, (d**2).sum()) for d, weight in zip(deltas, weights, strict=True)]
    exact, total = sum(d @ gram for d, gram in zip(deltas, grams, strict=True)), np.asarray(sum(grams))
    if not total.any():
        return np.zeros_like(deltas[0])
    if filter == "ridge":
        added = ridge * np.trace(total) / len(total) * np.eye(len(total))
        start = sum_of(deltas, weights) / len(deltas)
        return np.asarray((exact + start @ added) @ np.linalg.inv(total + added))
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(total))
    values = values.clip(0)
    parts, kept = 1 - np.exp(-time * values), math.ceil(rank * len(values) - 1e-9)
    if filter == "participation":
        parts, kept = np.ones(len(values)), math.ceil(np.sqrt(values).sum() ** 2 / values.sum() - 1e-6)
    kept = min(kept, int((values > 1e-12 * values[0]).sum()))
    along, start = vectors[:, :kept], sum_of(deltas, weights)
    return np.asarray(start + (exact - start @ total) @ along * parts[:kept] / values[:kept] @ along.T)


DENSE: Mapping[str, Dense] = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts, "wudi": wudi}
VARIANTS: Sequence[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("tsv_m", {"rank": 0.6}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"common": 0.3}),
    ("wudi", {}),
    ("wudi", {"filter": "exponential", "time": 20.0}),
    ("wudi", {"filter": "participation"}),
]
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
    return torch.sin((model + 1.7) * (place + 0.3) ** 2) * 0.5 ** torch.arange(shape[1])


AUTHORS: Sequence[tuple[str, dict[str, Any], tuple[int, int], list[list[float]]]] = [
    (
        "tsv_m",
        {},
        (6, 4),
        [
            [0.0869463, -0.3405589, 0.2184061, -0.504049],
            [-0.5832344, -0.2180684, 0.1827811, 0.3788637],
            [-0.9475004, 0.3889169, -0.2109464, -0.1082727],
            [-0.3929516, -0.3825384, -0.2127437, 0.0939167],
            [0.185834, -0.4193984, -0.6555895, -0.857148],
            [0.3502339, -0.396776, -0.2913801, 0.1338014],
        ],
    ),
    (
        "iso_c",
        {},
        (6, 4),
        [
            [0.081074, -0.270012, 0.4247063, -0.6269601],
            [-0.2392896, -0.1994741, -0.121168, 0.0120397],
            [-0.6203741, 0.2546067, -0.2790412, -0.3227509],
            [-0.4424007, -0.5433814, 0.2288176, 0.2786192],
            [0.1028276, -0.2613519, -0.4082966, -0.3447605],
            [0.2059143, -0.395348, -0.4532156, 0.0592337],
        ],
    ),
    (
        "iso_cts",
        {"common": 0.5},
        (6, 4),
        [
            [-0.5415162, 0.0287042, 0.5556674, -0.515031],
            [-0.4876017, -0.2081511, -0.0840971, 0.4724292],
            [-0.3825048, 0.4873231, -0.6877492, -0.0457128],
            [-0.5684092, -0.1822068, -0.0875787, -0.0777901],
            [0.1402266, -0.3680234, -0.449999, -0.7032626],
            [-0.0640105, -0.7575486, -0.158582, 0.1816304],
        ],
    ),
    (
        "wudi",
        {"filter": "exponential", "time": 5.0},
        (6, 4),
        [
            [0.2797378, -0.1488658, 0.2402924, -0.1610861],
            [-0.2577187, -0.0295537, -0.0376392, -0.0108865],
            [-0.7199109, 0.2895536, -0.2990948, -0.0787262],
            [-0.2374661, -0.3756927, -0.1129465, 0.0490636],
            [0.0804469, -0.6781647, -0.6725827, -0.0730182],
            [0.1873851, -0.5287738, -0.3970068, 0.0157885],
        ],
    ),
    (
        "wudi",
        {"filter": "participation"},
        (6, 4),
        [
            [0.2887942, -0.1334778, 0.1793112, -0.1590288],
            [-0.2542539, -0.0095435, 0.054263, -0.0128804],
            [-0.7283843, 0.2681962, -0.2852271, -0.0796016],
            [-0.2364113, -0.387246, -0.2242893, 0.0518213],
            [0.0636966, -0.7555594, -0.9588892, -0.0671916],
            [0.1855066, -0.53898, -0.4484846, 0.0169057],
        ],
    ),
    (
        "tsv_m",
        {},
        (4, 6),
        [
            [0.3061919, -0.4047735, 0.1628746, -0.1197385, -0.3872658, 0.0895245],
            [-0.5981784, -0.2138572, -0.6000546, 0.0631073, -0.5967214, 0.0548311],
            [-0.108618, -0.6806532, -0.287409, 0.1212146, 0.1334717, -0.0942544],
            [-0.9251625, -0.1844598, 0.0888338, 0.0137936, 0.1141144, -0.0350702],
        ],
    ),
    (
        "iso_c",
        {},
        (4, 6),
        [
            [0.2364925, -0.4297755, 0.2061135, -0.174443, -0.3123695, -0.0264068],
            [-0.2176094, -0.1418155, -0.4281253, 0.1855073, -0.3505214, -0.0615296],
            [-0.1168962, -0.4317565, 0.0186817, 0.2663698, 0.3725427, -0.0406513],
            [-0.541589, -0.047222, 0.2318032, -0.2401666, -0.0608617, 0.0339922],
        ],
    ),
    (
        "iso_cts",
        {"common": 0.5},
        (4, 6),
        [
            [-0.0245236, -0.0836017, 0.7343437, 0.1177218, -0.4416718, -0.2793052],
            [-0.3631733, -0.1098077, -0.4411641, 0.5267156, -0.3948372, -0.2487792],
            [0.2722705, -0.8670962, -0.0745577, -0.0458773, 0.0119479, 0.0013782],
            [-0.7902172, -0.2418553, 0.1386235, -0.299201, 0.1562183, 0.133102],
        ],
    ),
    (
        "wudi",
        {"filter": "exponential", "time": 5.0},
        (4, 6),
        [
            [0.2797036, -0.2532984, 0.2313347, -0.110234, -0.01998, -0.0129662],
            [-0.4949037, -0.7034723, -0.7066165, 0.2969786, -0.0973743, -0.0900498],
            [-0.3158009, -0.3808251, -0.199283, 0.1051247, 0.0234566, -0.0495822],
            [-0.7321007, -0.1549962, 0.0383565, -0.1391309, -0.0421848, 0.0038752],
        ],
    ),
    (
        "wudi",
        {"filter": "participation"},
        (4, 6),
        [
            [0.2752543, -0.2737572, 0.1576319, -0.0255999, -0.0346766, -0.02098],
            [-0.5407293, -0.8805083, -1.1427343, 0.5430392, -0.1211538, -0.1389983],
            [-0.3327197, -0.4468318, -0.4078357, 0.1977562, 0.019573, -0.0723634],
            [-0.7275537, -0.1426485, 0.0169069, -0.1479604, -0.0367461, 0.0021636],
        ],
    ),
]
"""What the authors' code made of two task vectors. `tsv_m`: `compute_and_sum_svd_mem_reduction` of
AntoAndGar/task_singular_vectors at commit a6c9718. `iso_c` and `iso_cts`: the functions of this name in
danielm1405/iso-merging at d34010a. `wudi`: `swudi_merge` (`exponential`) and `aswudi_merge` (`participation`), which
compute in float32, in WalkerWorldPeace/MLLMerging at 5f8a458."""
DESCENDED = [
    [0.5114057, 0.0543229, 0.0607113, -0.136899],
    [-0.722159, -0.1865488, 0.0675927, 0.3870731],
    [-0.1044207, 0.0451526, 0.0187965, -0.1949687],
    [0.5784074, 0.1189033, -0.2022995, -0.5552859],
    [-0.0707152, -0.2946283, -0.3844649, -0.0716984],
    [-0.0394933, 0.0162881, -0.258838, 0.6962542],
]
"""What `get_merge_vector` of nathanielyvo/WUDI-Merging at dc3cd12 made of eight task vectors, a thousandth in size,
after 200,000 steps instead of 300: its Adam had come within 3e-5 of the minimum by then."""


@pytest.mark.parametrize(("method", "parameters", "shape", "expected"), AUTHORS)
def test_the_authors_code_gives_the_same_numbers(
    method: str, parameters: dict[str, Any], shape: tuple[int, int], expected: list[list[float]]
) -> None:
    versions = [authors_input(shape, model) for model in range(2)]
    found = merge(method, versions, torch.zeros(shape, dtype=torch.float64), **parameters)
    np.testing.assert_allclose(float64(found), expected, rtol=0, atol=2e-6 if method == "wudi" else 1e-7)


def test_the_authors_descent_comes_to_the_closed_form_of_wudi() -> None:
    versions = [authors_input((6, 4), model) for model in range(8)]
    found = merge("wudi", versions, torch.zeros(6, 4, dtype=torch.float64), ridge=0.0)
    np.testing.assert_allclose(float64(found), DESCENDED, rtol=0, atol=3e-5)


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


def test_wudi_of_equal_models_is_the_model_to_the_bit() -> None:
    """It starts from their mean, and has no way to go."""
    for dtype in (torch.float32, torch.float64):
        for shape in SHAPES:
            base, [version] = tensors_of(shape, 1, dtype)
            assert torch.equal(merge("wudi", [version] * 3, base, LAMBDAS), version)


def test_iso_c_of_equal_models_has_their_directions_in_one_size() -> None:
    base, [version] = tensors_of((9, 9), 1, torch.float64)
    u, s, vt = np.linalg.svd(float64(version - base))
    found = float64(merge("iso_c", [version] * 3, base, scale=2.0))
    np.testing.assert_allclose(found, float64(base) + 3 * s.mean() * u @ vt, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"time": 3.0}, "time is of the filter 'exponential', and the filter is 'ridge'"),
        ({"filter": "participation", "rank": 0.5}, "rank is of the filter 'exponential'"),
        ({"filter": "exponential", "ridge": 0.1}, "ridge is of the filter 'ridge', and the filter is 'exponential'"),
        ({"filter": "exponential", "time": 0.0}, "greater than 0"),
    ],
)
def test_parameters_of_another_filter_are_refused(given: dict[str, Any], why: str) -> None:
    entry = METHODS["wudi"]
    with pytest.raises(ValidationError, match=why):
        entry.parameters(name="wudi", **given)
    every_value = entry.parameters.model_validate({"name": "wudi", "filter": "participation"}).model_dump()
    assert not {"ridge", "time", "rank"} & every_value.keys()
    assert entry.parameters(**every_value).model_dump() == every_value, "what a result says can be asked for"


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
