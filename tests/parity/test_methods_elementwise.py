"""Methods without data, each against its formula, written down densely in float64, over blocks of a few rows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
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
    LAYERS,
    drifted_tensors,
    merge_spec,
    merged_of,
    model_spec,
    read_model,
    silent,
    tiny_base,
    tiny_checkpoint,
)
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.families import Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.methods import METHODS, MatrixParameters
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import BUILDERS, MeasuredModel
from worker.engine.merging.methods.blocks import Block
from worker.engine.merging.methods.combine import combine

Array = NDArray[np.float64]
Dense = Callable[[Array, Sequence[Array], Sequence[float]], Array]
"""Of the base, the versions and the models' weights."""

SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (40, 24),
    "embedding": (300, 8),
    "one row": (1, 30),
    "vector": (700,),
    "convolution": (12, 5, 3),
    "two elements": (2,),
    "one element": (1, 1),
    "scalar": (),
    "no rows": (0, 5),
    "empty rows": (5, 0),
    "no elements": (0,),
}
LAMBDAS = (1.0, 2.5, 0.5)
WHOLE = 10**6  # elements of a block: every tensor is one


def named(name: str = "bert.encoder.layer.0.intermediate.dense.weight") -> Slot:
    slot = BERT.slot(name)
    assert slot is not None
    return slot


tensors_of = partial(drifted_tensors, seed=7)


def merge(
    method: str,
    versions: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float] | None = None,
    slot: Slot | None = None,
    depth: float = 0.0,
    block_elements: int = 64,
    own: Sequence[Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> Tensor:
    """`own`: each model's own parameters."""
    models = [
        MeasuredModel(weight, parameters=of_model)
        for weight, of_model in zip(weights or [1.0] * len(versions), own or [{}] * len(versions), strict=True)
    ]
    merger = BUILDERS[method](METHODS[method].parameters(name=method, **parameters), models)
    slot = slot or named()
    return merged_of(merger, slot, versions, base, place=TensorPlace(slot.name, depth), block_elements=block_elements)


def float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def assert_dense(
    method: str, dense: Dense, weights: Sequence[float], tolerance: float = 2e-6, base: bool = True, **parameters: Any
) -> None:
    """In blocks of a few rows and in one, float32 and float64."""
    for name, shape in SHAPES.items():
        for dtype, within in ((torch.float32, tolerance), (torch.float64, 1e-11)):
            origin, versions = tensors_of(shape, len(weights), dtype)
            empty = not origin.numel()  # ranks and angles of nothing are no numbers
            expected = float64(origin) if empty else dense(float64(origin), [float64(v) for v in versions], weights)
            for block_elements in (64, WHOLE):
                how: dict[str, Any] = {"block_elements": block_elements, **parameters}
                found = merge(method, versions, origin if base else None, weights, **how)
                assert (found.dtype, found.shape) == (dtype, torch.Size(shape))
                np.testing.assert_allclose(float64(found), expected, rtol=0, atol=within, err_msg=f"{name} {dtype}")


# --- sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_a_weighted_sum(normalize: bool) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        total = sum(w * v for w, v in zip(weights, versions, strict=True))
        return np.asarray(total / sum(weights) if normalize else total)

    for weights in (LAMBDAS, (1.0, -0.25, 0.5)):
        assert_dense("linear", dense, weights, 5e-6, base=False, normalize=normalize)


def test_a_model_with_all_the_weight_is_the_merge_itself() -> None:
    _, versions = tensors_of((6, 5), 3, torch.float32)
    assert torch.equal(combine(versions, torch.tensor([0.0, 0.0, 1.0])), versions[2])
    rows = torch.tensor([[0.0, 1, -1, 0.5, 0, 0], [1.0, 0, 1, 0.5, 0, 0], [0.0, 0, 1, 0, 1, 1]])[:, :, None]
    found = combine(versions, rows)
    for row, only in ((0, 1), (1, 0), (4, 2), (5, 2)):
        assert torch.equal(found[row], versions[only][row])
    dense = sum(w.double() * v.double() for w, v in zip(rows, versions, strict=True))
    torch.testing.assert_close(found.double(), dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_is_a_weighted_sum_of_differences(normalize: bool) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        total = sum(w * (v - base) for w, v in zip(weights, versions, strict=True))
        return np.asarray(base + (total / np.sum(weights) if normalize and np.sum(weights) else total))

    for weights in (LAMBDAS, (1.0, -0.25, 0.5), (1.0, -0.75, -0.25), (0.0, 0.0, 0.0)):
        assert_dense("task_arithmetic", dense, weights, normalize=normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, -0.25, 0.5), (-1.0, -2.0, -0.5), (1.0, -1.0, 0.5), (0.0, 0.0, 0.0)])
def test_an_election_goes_by_the_weighted_vectors_where_weights_are_below_0(
    normalize: bool, weights: Sequence[float]
) -> None:
    """As mergekit says: where the weights that agree add up to 0, nothing is divided."""

    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        weighted = [w * (v - base) for w, v in zip(weights, versions, strict=True)]
        elected = np.sign(sum(weighted))
        agrees = [(np.sign(one) == elected) & (elected != 0) for one in weighted]
        merged = sum(np.where(has, one, 0) for one, has in zip(weighted, agrees, strict=True))
        total = sum(w * has for w, has in zip(weights, agrees, strict=True))
        return np.asarray(base + (merged / np.where(np.abs(total) < 1e-8, 1, total) if normalize else merged))

    assert_dense("ties", dense, weights, 5e-6, density=1.0, normalize=normalize)


# --- election ----------------------------------------------------------------------------------------


def elected(
    deltas: Sequence[Array], weights: Sequence[float], normalize: bool, votes: Sequence[float] | None = None
) -> Array:
    """Element by element."""
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(merged.shape):
        column = [float(delta[place]) for delta in deltas]
        total = sum(v * d for v, d in zip(votes or weights, column, strict=True))
        agreeing = [(w, d) for w, d in zip(weights, column, strict=True) if d * total > 0]
        if agreeing:
            merged[place] = sum(w * d for w, d in agreeing) / (sum(w for w, _ in agreeing) if normalize else 1)
    return merged


def by_rank(delta: Array, first: int, last: int) -> Array:
    """What has the ranks `first` to `last` by magnitude, 1 the largest, and all of the same magnitude as these."""
    ordered = np.sort(abs(delta).ravel())[::-1]
    return np.where((abs(delta) <= ordered[first - 1]) & (abs(delta) >= ordered[last - 1]), delta, 0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_keeps_the_largest_elects_and_merges(density: float, normalize: bool) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        trimmed = [by_rank(v - base, 1, max(1, round(density * base.size))) for v in versions]
        return base + elected(trimmed, weights, normalize)

    assert_dense("ties", dense, LAMBDAS, density=density, normalize=normalize)


@pytest.mark.parametrize("elects", [True, False])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.01), (0.5, 0.2), (0.9, 0.5), (1.0, 0.3), (0.01, 0.0)])
def test_breadcrumbs_drops_outliers_and_small_changes(density: float, gamma: float, elects: bool) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        kept = max(1, round(density * base.size))
        outliers = min(round(gamma * base.size), base.size - kept)
        masked = [by_rank(v - base, outliers + 1, outliers + kept) for v in versions]
        if elects:
            return base + elected(masked, weights, True)
        return np.asarray(base + sum(w * t for w, t in zip(weights, masked, strict=True)))

    method = "breadcrumbs_ties" if elects else "breadcrumbs"
    assert_dense(method, dense, LAMBDAS, density=density, gamma=gamma)


@pytest.mark.parametrize("elects", [True, False])
def test_every_model_may_have_shares_of_its_own(elects: bool) -> None:
    """A number, a list of which these tensors have the first value, and the method's where there is none."""
    densities, gammas = (0.2, 0.7, 0.5), (0.1, 0.3, 0.0)
    own: list[dict[str, Any]] = [{"density": 0.2}, {"density": [0.7, 0.1], "gamma": 0.3}, {"gamma": [0.0, 0.9]}]

    def trimmed(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        deltas = [v - base for v in versions]
        kept = [max(1, round(density * base.size)) for density in densities]
        return base + elected([by_rank(d, 1, n) for d, n in zip(deltas, kept, strict=True)], weights, True)

    def masked(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        parts = []
        for version, density, gamma in zip(versions, densities, gammas, strict=True):
            kept = max(1, round(density * base.size))
            outliers = min(round(gamma * base.size), base.size - kept)
            parts.append(by_rank(version - base, outliers + 1, outliers + kept))
        if elects:
            return base + elected(parts, weights, True)
        return np.asarray(base + sum(w * t for w, t in zip(weights, parts, strict=True)))

    if elects:
        of_ties = [{name: value for name, value in of_model.items() if name == "density"} for of_model in own]
        assert_dense("ties", trimmed, LAMBDAS, density=0.5, own=of_ties)
    assert_dense("breadcrumbs_ties" if elects else "breadcrumbs", masked, LAMBDAS, density=0.5, gamma=0.1, own=own)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_sce_selects_weighs_and_erases(share: float) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        deltas = np.stack([v - base for v in versions])
        variance = deltas.var(0)
        least = np.sort(variance.ravel())[-max(1, round(share * base.size))]
        deltas = np.where(variance >= least, deltas, 0)
        energy = (deltas**2).reshape(len(deltas), -1).sum(1)
        return base + elected(list(deltas), (energy / energy.sum()).tolist(), True, [1.0] * len(deltas))

    assert_dense("sce", dense, (1.0, 1.0, 1.0), select_topk=share)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "sce"])
def test_where_no_sign_wins_the_base_stays(method: str) -> None:
    base, versions = torch.tensor([2.0, 2.0]), [torch.tensor([3.0, 2.5]), torch.tensor([1.0, 1.5])]
    assert torch.equal(merge(method, versions, base, **ALL_KEPT[method]), base)


def test_equal_magnitudes_stay_or_go_together() -> None:
    base, version = torch.zeros(6), torch.tensor([1.0, -1.0, 1.0, 0.5, -3.0, 0.0])
    assert merge("ties", [version], base, density=1 / 3).tolist() == [1.0, -1.0, 1.0, 0.0, -3.0, 0.0]
    found = merge("breadcrumbs", [version], base, density=1 / 6, gamma=1 / 6)
    assert found.tolist() == [1.0, -1.0, 1.0, 0.0, 0.0, 0.0]


# --- angles ------------------------------------------------------------------------------------------


def slerp(first: Array, second: Array, t: float) -> Array:
    """By the rotation of one direction towards the other, the length of each vector kept apart."""
    a, b = first.ravel(), second.ravel()
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if not min(lengths):
        return (1 - t) * first + t * second
    cosine = np.clip(a @ b / lengths[0] / lengths[1], -1, 1)
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-4:
        return (1 - t) * first + t * second
    return np.asarray((math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(t: float) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        return slerp(versions[0], versions[1], t)

    assert_dense("slerp", dense, (1.0, 1.0), base=False, t=t)


@pytest.mark.parametrize("t", [0, 1])
def test_slerp_ends_at_the_very_model(t: int) -> None:
    for shape in SHAPES.values():
        _, versions = tensors_of(shape, 2, torch.float32)
        assert torch.equal(merge("slerp", versions, None, t=t), versions[t])


def test_slerp_turns_at_an_even_pace() -> None:
    """What the formula is for: unit vectors stay unit vectors, and the angle grows as t does."""
    first, second = torch.zeros(100, 2), torch.zeros(100, 2)
    first[0, 0], second[0, 0], second[99, 1] = 1, math.cos(2), math.sin(2)
    for t in (0.1, 0.5, 0.75):
        found = merge("slerp", [first, second], None, t=t)
        assert float(found.norm()) == pytest.approx(1, abs=1e-6)
        assert math.acos(float((found * first).sum())) == pytest.approx(2 * t, abs=1e-6)


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
def test_nuslerp_goes_by_weights(vectors: str, based: bool) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        start = base if based else np.zeros_like(base)
        first, second = (v - start for v in versions)
        t = weights[1] / sum(weights)
        if base.ndim < 2 or vectors == "tensor":
            return start + slerp(first, second, t)
        pair = [m.reshape(len(m), -1) for m in (first, second)]
        if vectors == "columns":
            pair = [m.T for m in pair]
        merged = np.stack([slerp(a, b, t) for a, b in zip(*pair, strict=True)])
        return start + (merged.T if vectors == "columns" else merged).reshape(base.shape)

    assert_dense("nuslerp", dense, (1.0, 2.5), base=based, vectors=vectors)


def model_stock(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
    deltas = [(v - base).ravel() for v in versions]
    pairs = [a @ b / float(np.linalg.norm(a) * np.linalg.norm(b) or 1) for a, b in combinations(deltas, 2)]
    cosine, count = max(0.0, float(np.mean(pairs))), len(versions)
    t = count * cosine / (1 + (count - 1) * cosine)
    return np.asarray(t * np.mean(versions, axis=0) + (1 - t) * base)


@pytest.mark.parametrize("models", [2, 3, 5])
def test_model_stock_goes_as_far_as_the_models_agree(models: int) -> None:
    assert_dense("model_stock", model_stock, [1.0] * models)


@pytest.mark.parametrize("models", [2, 3])
def test_model_stock_of_every_slice_by_itself(models: int) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        if base.ndim < 2:
            return model_stock(base, versions, weights)
        return np.stack([model_stock(row, [v[i] for v in versions], weights) for i, row in enumerate(base)])

    assert_dense("model_stock", dense, [1.0] * models, filter_wise=True)


def test_model_stock_of_orthogonal_or_opposite_models_is_the_base() -> None:
    base, step = tensors_of((40, 24), 1)[0], torch.zeros(40, 24)
    step[3, 5] = 1
    for other in (step.flip(0), -step, torch.zeros_like(step)):
        assert torch.equal(merge("model_stock", [base + step, base + other], base), base)


def karcher(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
    """By steps in the space of the tensors themselves, until the directions balance."""
    flat = [v.ravel() for v in versions]
    lengths = [np.linalg.norm(v) for v in flat]
    units = [v / n for v, n in zip(flat, lengths, strict=True)]
    shares = np.array(weights) / sum(weights)
    mean = sum(w * u for w, u in zip(shares, units, strict=True))
    if np.linalg.norm(mean) < 1e-6:
        return np.asarray(sum(w * v for w, v in zip(shares, versions, strict=True)))
    mean = mean / np.linalg.norm(mean)
    for _ in range(300):
        step = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            across = unit - (unit @ mean) * mean
            if np.linalg.norm(across) > 1e-12:
                angle = math.atan2(np.linalg.norm(across), unit @ mean)
                step += share * angle * across / np.linalg.norm(across)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return np.asarray((shares @ np.array(lengths)) * mean).reshape(base.shape)


@pytest.mark.parametrize("weights", [(1.0, 2.5), (1.0, 1.0, 1.0), (1.0, 2.5, 0.5, 1.0)])
def test_karcher_is_the_mean_on_the_sphere(weights: Sequence[float]) -> None:
    assert_dense("karcher", karcher, weights, base=False, tol=1e-14)


def test_karcher_stops_where_it_is_told() -> None:
    _, versions = tensors_of((40, 24), 4)
    far = [versions[0], -0.8 * versions[0] + versions[1], *versions[2:]]
    exact = merge("karcher", far, None)
    one, rough = merge("karcher", far, None, max_iter=1), merge("karcher", far, None, tol=0.5)
    assert 1e-4 < float((one - exact).abs().max()) < 0.5
    assert 1e-4 < float((rough - exact).abs().max()) < 0.5


def test_karcher_of_two_is_slerp_of_their_directions() -> None:
    _, [first, second] = tensors_of((40, 24), 2, torch.float64)
    second *= first.norm() / second.norm()
    found = merge("karcher", [first, second], None, [3.0, 1.0])
    torch.testing.assert_close(found, merge("slerp", [first, second], None, t=0.25), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "karcher"])
def test_without_an_arc_it_is_the_straight_line(method: str) -> None:
    _, [one] = tensors_of((40, 24), 1)
    zero = torch.zeros_like(one)
    for first, second in ((one, zero), (zero, one), (zero, zero), (one, -one), (one, 3 * one)):
        torch.testing.assert_close(merge(method, [first, second], None), (first + second) / 2, rtol=0, atol=1e-6)


def test_a_zero_vector_has_a_say_in_the_length_alone() -> None:
    _, [first, second] = tensors_of((40, 24), 2)
    with_zero = merge("karcher", [first, second, torch.zeros_like(first)], None)
    torch.testing.assert_close(with_zero, merge("karcher", [first, second], None) * 2 / 3, rtol=0, atol=1e-6)


# --- dropping at random ------------------------------------------------------------------------------

DROPPING = ("dare_linear", "dare_ties", "della", "della_linear")


def factors(method: str, shape: Sequence[int], model: int = 0, models: int = 1, **how: Any) -> Array:
    """What each element of a model's task vector is multiplied with."""
    versions, weights = [torch.ones(tuple(shape))] * models, [float(index == model) for index in range(models)]
    return float64(merge(method, versions, torch.zeros(tuple(shape)), weights, **how))


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.001])
def test_dare_keeps_a_share_and_makes_up_for_the_rest(density: float) -> None:
    found = factors("dare_linear", (1000, 200), density=density, block_elements=1 << 16)
    kept = found > 0
    np.testing.assert_allclose(found[kept], 1 / density, rtol=1e-6)
    deviation = math.sqrt(density * (1 - density) / found.size)
    assert abs(kept.mean() - density) <= 4 * deviation
    assert abs((kept[1:] & kept[:-1]).mean() - density**2) <= 5 * deviation + 1e-12, "neighbours are independent"


def test_what_is_dropped_depends_on_seed_model_and_tensor_alone() -> None:
    shape = (40, 24)
    other = named("bert.encoder.layer.1.intermediate.dense.weight")
    for method in DROPPING:
        found = factors(method, shape, models=2)
        assert np.array_equal(found, factors(method, shape, models=2)), method
        assert np.array_equal(found > 0, factors(method, shape, models=3) > 0), method
        for changed in (
            factors(method, shape, models=2, seed=1),
            factors(method, shape, model=1, models=2),
            factors(method, shape, models=2, slot=other),
        ):
            agree = ((found > 0) == (changed > 0)).mean()
            assert 0.4 < agree < 0.6, method
        rows = (found > 0).reshape(20, -1)
        assert len({row.tobytes() for row in rows}) == len(rows), "every block has random numbers of its own"


@pytest.mark.parametrize("method", DROPPING)
@pytest.mark.parametrize("normalize", [True, False])
def test_what_was_not_dropped_is_summed_or_elected(method: str, normalize: bool) -> None:
    base, versions = tensors_of((40, 24))
    alone = [
        float64(merge(method, versions, base, [float(j == k) for k in range(3)], normalize=False) - base)
        for j in range(3)
    ]
    found = merge(method, versions, base, LAMBDAS, normalize=normalize)
    if method in ("dare_ties", "della"):
        expected = elected(alone, LAMBDAS, normalize)
    else:
        expected = np.asarray(sum(w * t for w, t in zip(LAMBDAS, alone, strict=True)))
        expected = expected / sum(LAMBDAS) if normalize else expected
    np.testing.assert_allclose(float64(found), float64(base) + expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", DROPPING)
def test_every_model_may_keep_a_share_of_its_own(method: str) -> None:
    """Of a task vector of ones: in a row, the rank is the place."""
    rows, count = 4000, 9
    densities, epsilons = (0.9, 0.2, 0.6), (0.1, 0.15, 0.25)
    own: list[dict[str, Any]] = [{"density": 0.9}, {"density": [0.2, 1.0]}, {}]
    parameters: dict[str, Any] = {"density": 0.6, "normalize": False}
    if method.startswith("della"):
        own = [{**own[0], "epsilon": [0.1, 0.5]}, {**own[1], "epsilon": 0.15}, {}]
        parameters["epsilon"] = 0.25
    for model, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True)):
        found = factors(method, (rows, count), model, 3, own=own, block_elements=1 << 16, **parameters)
        spread = min(epsilon, density, 1 - density) if method.startswith("della") else 0.0
        for place in range(count):
            probability = density - spread + 2 * spread * place / (count - 1)
            kept = found[:, place] != 0
            np.testing.assert_allclose(found[kept, place], 1 / probability, rtol=1e-6)
            assert abs(kept.mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / rows) + 1e-12


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.0), (0.2, 0.5), (0.9, 0.2), (1.0, 0.3)])
def test_della_keeps_the_larger_rather(density: float, epsilon: float) -> None:
    rng = np.random.default_rng(0)
    rows, count = 3000, 9
    delta = rng.permuted(np.tile(np.arange(1, count + 1) * np.array([1, -1] * 4 + [1]), (rows, 1)), axis=1)
    delta = (delta * rng.uniform(0.1, 10, (rows, 1))).astype(np.float32)
    found = float64(
        merge(
            "della_linear",
            [torch.from_numpy(delta)],
            torch.zeros(rows, count),
            block_elements=1 << 16,
            density=density,
            epsilon=epsilon,
        )
    )
    spread = min(epsilon, density, 1 - density)
    rank = abs(delta).argsort(1).argsort(1)
    probability = density - spread + 2 * spread * rank / (count - 1)
    kept = found != 0
    np.testing.assert_allclose(found[kept], (delta / np.where(kept, probability, 1))[kept], rtol=1e-5)
    for place in range(count):
        expected = probability[rank == place][0]
        assert abs(kept[rank == place].mean() - expected) <= 4 * math.sqrt(expected * (1 - expected) / rows) + 1e-12


def test_della_ranks_equal_magnitudes_by_place() -> None:
    found = factors("della_linear", (2000, 2), density=0.5, epsilon=0.5, block_elements=1 << 16)
    assert not found[:, 0].any()
    assert (found[:, 1] == 1).all()


def test_a_row_of_one_element_is_kept_as_the_density_says() -> None:
    for shape in ((), (1,), (2000, 1)):
        found = factors("della_linear", shape, density=0.25, epsilon=0.2, block_elements=1 << 16)
        assert set(np.unique(found)) <= {0.0, 4.0}


# --- methods that came from mergekit -----------------------------------------------------------------


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.05, 0.3, 2.0])
def test_nearswap_moves_no_element_by_more_than_t(t: float) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        [version] = versions
        share = np.clip(t / np.maximum(np.abs(base - version), 1e-6), 0, 1)
        return np.asarray(share * version + (1 - share) * base)

    assert_dense("nearswap", dense, (1.0,), t=t)


@pytest.mark.parametrize("t", [-0.5, 1.5, 3.0])
def test_slerp_goes_on_beyond_its_ends(t: float) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        first, second = versions
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        cosine = np.clip((first * second).sum() / lengths, -1, 1) if lengths else 1.0
        angle = np.arccos(cosine)
        if np.sin(angle) < 1e-4:
            return np.asarray((1 - t) * first + t * second)
        return np.asarray((np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle))

    assert_dense("slerp", dense, (1.0, 1.0), 1e-5, base=False, t=t)


def test_nearswap_takes_what_is_near_as_it_is() -> None:
    base, versions = torch.zeros(3), [torch.tensor([0.25, -0.5, 2.0])]
    assert merge("nearswap", versions, base, t=0.5).tolist() == [0.25, -0.5, 0.5]


@pytest.mark.parametrize(("r", "alpha"), [(None, None), (0.1, 0.2), (2.0, 100.0), (-1.0, 0.5)])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.5, 9.0])
def test_ram_averages_over_the_models_that_change_an_element(
    r: float | None, alpha: float | None, epsilon: float
) -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        deltas = [version - base for version in versions]
        changed = [np.abs(delta) > epsilon for delta in deltas]
        count = sum(has.astype(int) for has in changed)
        merged = base.copy()
        for delta, has in zip(deltas, changed, strict=True):
            factor = 1.0
            if r is not None and alpha is not None:
                unique = max((has & (count == 1)).sum(), epsilon or 1.0)
                factor = 1 + r * min((has & (count > 1)).sum() / unique, alpha)
            merged = merged + np.where(has, np.where(count == 1, factor * delta, delta / np.maximum(count, 1)), 0)
        return np.asarray(merged)

    if r is None:
        assert_dense("ram", dense, (1.0, 1.0, 1.0), epsilon=epsilon)
    else:
        assert_dense("ramplus_tl", dense, (1.0, 1.0, 1.0), 1e-5, epsilon=epsilon, r=r, alpha=alpha)


@pytest.mark.parametrize("weights", [LAMBDAS, (1.0, -0.25, 0.5), (0.3, 0.9)])
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_the_mean_direction_with_the_mean_length(
    weights: Sequence[float], based: bool, normalize: bool
) -> None:
    """Along the tangent at the mean of the directions, as its author writes it down."""

    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        shares = np.array(weights) / (sum(weights) if normalize else 1)
        vectors = np.stack([(v - base if based else v).ravel() for v in versions])
        lengths = np.linalg.norm(vectors, axis=1)
        units = vectors / (lengths + 1e-8)[:, None]
        mean = shares @ units
        mean /= np.linalg.norm(mean)
        tangents = units - (units @ mean)[:, None] * mean
        along = shares @ tangents
        angle = np.linalg.norm(along) + 1e-8
        merged = (mean * np.cos(angle) + along * np.sin(angle) / angle) * (lengths @ shares)
        return np.asarray(merged.reshape(base.shape) + (base if based else 0))

    assert_dense("multislerp", dense, weights, 1e-5, base=based, normalize_weights=normalize)


def test_multislerp_of_opposites_is_a_line_and_of_more_that_cancel_out_is_refused() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([-6.0, -8.0])
    assert merge("multislerp", [one, other], None).tolist() == [-1.5, -2.0]
    assert merge("multislerp", [torch.zeros(2)] * 3, None).tolist() == [0.0, 0.0]
    three = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.75**0.5]), torch.tensor([-0.5, -(0.75**0.5)])]
    with pytest.raises(NumericalError, match="cancel out in tensor bert"):
        merge("multislerp", three, None, eps=1e-6)


def softmax(values: Array) -> Array:
    shifted = np.exp(values - values.max(-1, keepdims=True)) if values.ndim else np.ones(())
    return np.asarray(shifted / (shifted.sum(-1, keepdims=True) if values.ndim else 1))


def test_arcee_fusion_takes_outlying_changes_alone() -> None:
    def dense(base: Array, versions: Sequence[Array], weights: Sequence[float]) -> Array:
        [version] = versions
        p, q = softmax(version) + 1e-8, softmax(base) + 1e-8
        terms = p * np.log(p / q)
        scores = np.abs(version - base) * (terms.sum(-1, keepdims=True) if base.ndim else terms)
        ordered = np.sort(scores.ravel())
        first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
        taken = scores >= median + 1.5 * (third - first)
        assert scores.size < 100 or 0 < taken.mean() < 0.25
        return np.asarray(np.where(taken, version, base))

    assert_dense("arcee_fusion", dense, (1.0,))


# --- all of them -------------------------------------------------------------------------------------

BASED = (
    "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "model_stock", "ram", "ramplus_tl", "nearswap",
    "arcee_fusion", *DROPPING,
)  # fmt: skip
UNBASED = ("linear", "slerp", "nuslerp", "multislerp", "karcher")
EVERY = (*BASED, *UNBASED)
ALL_KEPT: Mapping[str, dict[str, Any]] = {
    **{name: {"density": 1.0} if "density" in METHODS[name].parameters.model_fields else {} for name in EVERY},
    "nearswap": {"t": 100.0},
    "ram": {"epsilon": 0.0},
    "ramplus_tl": {"epsilon": 0.0, "r": 0.0},
}
TAKES_LITTLE = ("arcee_fusion",)  # of any change


def test_every_method_without_data_is_here() -> None:
    """But for those of `test_matrix_methods`."""
    without = {name for name, entry in METHODS.items() if "dataset" not in entry.needs}
    others = {name for name in without if not issubclass(METHODS[name].parameters, MatrixParameters)}
    assert {*EVERY, "average", "passthrough"} == others  # the last copies: it has no formula


def models_of(method: str) -> int:
    """How many to merge, where the number does not matter."""
    return METHODS[method].models[1] or 3


@pytest.mark.parametrize("method", [name for name in EVERY if name not in TAKES_LITTLE])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_equal_models_merge_into_themselves(method: str, shape: Sequence[int]) -> None:
    base, [version] = tensors_of(shape, 1)
    found = merge(method, [version] * models_of(method), base, **_as_a_mean(method))
    exact = method in (*UNBASED, "model_stock") and "slerp" not in method[1:]  # which here add to the base
    torch.testing.assert_close(found, version, rtol=0, atol=0 if exact else 5e-7)


def _as_a_mean(method: str) -> dict[str, Any]:
    normalize = {"normalize": True} if "normalize" in METHODS[method].parameters.model_fields else {}
    return {**normalize, **ALL_KEPT[method]}


def test_equal_models_merge_into_themselves_without_a_base() -> None:
    for shape in SHAPES.values():
        for dtype in (torch.float32, torch.float64):
            _, [version] = tensors_of(shape, 1, dtype)
            for method in UNBASED:
                models = models_of(method)
                found = merge(method, [version] * models, None, LAMBDAS[:models])
                assert torch.equal(found, version), (method, dtype)


@pytest.mark.parametrize(
    "method", [name for name in EVERY if METHODS[name].models[0] == 1 and name not in TAKES_LITTLE]
)
def test_one_model_is_its_own_merge(method: str) -> None:
    for shape in SHAPES.values():
        base, versions = tensors_of(shape, 1)
        found = merge(method, versions, base, **ALL_KEPT[method])
        torch.testing.assert_close(found, versions[0], rtol=0, atol=5e-7)


@pytest.mark.parametrize("method", BASED)
def test_task_vectors_of_zero_leave_the_base(method: str) -> None:
    for shape in SHAPES.values():
        base, _ = tensors_of(shape)
        assert torch.equal(merge(method, [base] * models_of(method), base), base)


@pytest.mark.parametrize("method", [name for name in EVERY if name not in DROPPING])
def test_blocks_change_nothing(method: str) -> None:
    """Thresholds are exact; sums differ by their rounding."""
    for shape in SHAPES.values():
        base, versions = tensors_of(shape, models_of(method))
        parts, whole = (merge(method, versions, base, block_elements=n) for n in (64, WHOLE))
        summed = method in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce")
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6 if summed else 0)


@pytest.mark.parametrize("method", EVERY)
def test_no_method_holds_a_whole_tensor(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, read = 0, Block.of

    def watched(rows: slice, versions: Sequence[Tensor], base: Tensor | None) -> Block:
        nonlocal longest
        longest = max(longest, rows.stop - rows.start)
        return read(rows, versions, base)

    monkeypatch.setattr(Block, "of", watched)
    base, versions = tensors_of(SHAPES["embedding"], models_of(method))
    merge(method, versions, base)
    assert longest == 64 // 8


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_sight(method: str, bad: float) -> None:
    """The merge is refused for it, so no method may hide it."""
    for shape in ((40, 24), ()):
        base, versions = tensors_of(shape, models_of(method))
        versions[-1].view(-1)[-1] = bad
        assert not torch.isfinite(merge(method, versions, base)).all()


@pytest.mark.parametrize("method", EVERY)
def test_inputs_are_left_as_they_were(method: str) -> None:
    base, versions = tensors_of((8, 8), models_of(method))
    before = [base.clone(), *(v.clone() for v in versions)]
    merge(method, versions, base)
    assert all(torch.equal(a, b) for a, b in zip(before, [base, *versions], strict=True))


@pytest.mark.parametrize("method", [name for name in EVERY if models_of(name) > 2 and name not in DROPPING])
def test_the_order_of_the_models_does_not_matter(method: str) -> None:
    base, versions = tensors_of((40, 24))
    weights = LAMBDAS if METHODS[method].parameters(name=method).weighs_models else (1.0, 1.0, 1.0)
    found, turned = merge(method, versions, base, weights), merge(method, versions[::-1], base, weights[::-1])
    torch.testing.assert_close(found, turned, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("method", "parameter", "low", "high"),
    [
        ("slerp", "t", 0.1, 0.9),
        ("ties", "density", 0.1, 0.9),
        ("breadcrumbs", "density", 0.1, 0.5),
        ("breadcrumbs", "gamma", 0.0, 0.4),
        ("dare_linear", "density", 0.1, 0.9),
        ("della", "density", 0.3, 0.6),
        ("della", "epsilon", 0.0, 0.3),
        ("sce", "select_topk", 0.1, 0.9),
        ("nearswap", "t", 0.01, 0.3),
        ("ram", "epsilon", 0.1, 0.5),
    ],
)
def test_a_parameter_may_differ_between_tensors(method: str, parameter: str, low: float, high: float) -> None:
    base, versions = tensors_of((40, 24), models_of(method))

    def merged(value: Any, depth: float = 0.0) -> Tensor:
        parameters: dict[str, Any] = {parameter: value}
        return merge(method, versions, base, depth=depth, **parameters)

    middle = merged((low + high) / 2)
    assert torch.equal(merged([low, high], depth=0.5), middle)
    elsewhere = {"filter": "*.value.*", "value": low}
    assert torch.equal(merged([elsewhere, {"filter": "*.intermediate.*", "value": (low + high) / 2}]), middle)
    assert torch.equal(merged([elsewhere]), merge(method, versions, base))
    assert not torch.equal(merged(low), middle)


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two models."""
    root = tmp_path_factory.mktemp("drifted")
    return tiny_base(root / "base"), [tiny_checkpoint(root / f"m{seed}", seed=seed) for seed in range(2)]


# --- what results say of it --------------------------------------------------------------------------


def merged_models(folder: Path, drifted: tuple[Path, list[Path]], weights: Sequence[float], **method: Any) -> Any:
    base, checkpoints = drifted
    models = [model_spec(checkpoints[i % 2], weight=w, name=f"m{i}") for i, w in enumerate(weights)]
    spec = merge_spec(folder, models, method)
    origin = CheckpointSpec(source="local:base", path=base)
    return Engine(torch.device("cpu")).merge(spec.model_copy(update={"base": origin}), silent).models


def test_shares_of_slerp_are_means_of_t_over_all_merged_parameters(
    drifted: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    t = [{"filter": "*.attention.*", "value": [0.25, 1.0]}, {"filter": "*.intermediate.*", "value": 0.1}]
    gone = total = 0.0
    for name, tensor in read_model(drifted[1][0]).items():
        if name.startswith("classifier"):
            continue
        layer = int(name.split(".")[3]) if ".layer." in name else 0
        at = 0.5
        if ".intermediate." in name:
            at = 0.1
        elif ".attention." in name:
            at = 0.25 + 0.75 * layer / (LAYERS - 1)
        gone, total = gone + at * tensor.numel(), total + tensor.numel()
    first, second = merged_models(tmp_path, drifted, (1.0, 1.0), name="slerp", t=t)
    assert second.weight_share == pytest.approx(gone / total, rel=1e-9)
    assert first.weight_share == pytest.approx(1 - gone / total, rel=1e-9)


@pytest.mark.parametrize("method", ["sce", "model_stock"])
def test_where_the_data_decide_there_are_no_shares(
    method: str, drifted: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    models = merged_models(tmp_path, drifted, (1.0, 0.0, 1.0), name=method)
    assert [model.weight_share for model in models] == [None, 0.0, None]
    card = (tmp_path / "README.md").read_text()
    assert [line.rsplit("|")[-2].strip() for line in card.splitlines() if line.startswith("| m")][1:] == [
        "-",
        "0.000",
        "-",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [model["weight_share"] for model in report["models"]] == [None, 0.0, None]


# --- what is refused ---------------------------------------------------------------------------------


def requested(
    method: str, weights: Sequence[float], base: str | None = "local:base", own: Mapping[str, Any] | None = None
) -> MergeRequest:
    """`own`: the first model's own parameters."""
    models: list[dict[str, Any]] = [
        {"name": f"m{index}", "checkpoint": f"local:m{index}", "weight": weight} for index, weight in enumerate(weights)
    ]
    models[0]["parameters"] = own or {}
    return MergeRequest.model_validate({"method": {"name": method}, "models": models, "base": base})


@pytest.mark.parametrize("method", METHODS)
def test_what_a_model_may_have_of_its_own_goes_by_tensor(method: str) -> None:
    entry = METHODS[method]
    expected = {
        "ties": ["density"], "dare_linear": ["density"], "dare_ties": ["density"], "della": ["density", "epsilon"],
        "della_linear": ["density", "epsilon"], "breadcrumbs": ["density", "gamma"],
        "breadcrumbs_ties": ["density", "gamma"],
    }  # fmt: skip
    described = entry.describe()
    assert described["per_model"] == expected.get(method, [])
    assert all("oneOf" in described["parameters"]["properties"][name] for name in described["per_model"])


@pytest.mark.parametrize(
    ("method", "own", "place", "why"),
    [
        ("ties", {"densty": 0.5}, ("densty",), "its own density, not 'densty'; did you mean 'density'?"),
        ("ties", {"weight": 0.5}, ("weight",), "its own density, not 'weight'"),
        ("della", {"epsilom": 0}, ("epsilom",), "its own density and epsilon, not 'epsilom'; did you mean 'epsilon'?"),
        ("dare_ties", {"epsilon": 0.1}, ("epsilon",), "its own density, not 'epsilon'"),
        ("linear", {"density": 0.5}, ("density",), "no parameters of its own in method linear"),
        ("ties", {"density": 1.5}, ("density", "<number>"), "less than or equal to 1"),
        ("breadcrumbs", {"gamma": [0.1, 1]}, ("gamma", "<layers>", 1), "less than 1"),
        ("dare_ties", {"density": "much"}, ("density",), "give a number, a list of numbers"),
        ("della", {"epsilon": math.inf}, ("epsilon", "<number>"), "finite"),
        (
            "della",
            {"epsilon": [{"filter": "*", "value": [0.1, 0.6]}]},
            ("epsilon", "<filters>", 0, "value", "<layers>", 1),
            "less than or equal to 0.5",
        ),
    ],
)
def test_own_parameters_that_do_not_suit_the_method_are_refused_by_name(
    method: str, own: dict[str, Any], place: tuple[object, ...], why: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        requested(method, (1, 1), own=own)
    [error] = refused.value.errors()
    assert error["loc"] == ("models", 0, "parameters", *place)
    assert why in error["msg"]


@pytest.mark.parametrize(
    ("method", "weights", "why"),
    [
        ("slerp", (1, 1, 1), "exactly 2 models; 3 take part"),
        ("slerp", (1, 0), "exactly 2 models; 1 take part"),
        ("nuslerp", (1,), "exactly 2 models; 1 take part"),
        ("model_stock", (1, 0, 0), "at least 2 models; 1 take part"),
        ("slerp", (1, 2), "weights"),
        ("model_stock", (1, 2), "weights"),
        ("sce", (1, 2), "weights"),
    ],
)
def test_models_that_do_not_suit_the_method_are_refused(method: str, weights: Sequence[float], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        requested(method, weights)


@pytest.mark.parametrize("method", EVERY)
def test_a_base_is_asked_for_where_it_is_needed(method: str) -> None:
    weights = [1.0] * models_of(method)
    assert requested(method, weights).method.name == method
    assert METHODS[method].parameters(name=method).needs_base is (method in BASED)
    assert ("base" in METHODS[method].needs) is (method in BASED)
    if method in BASED:
        with pytest.raises(ValidationError, match="name it as base"):
            requested(method, weights, base=None)
    else:
        assert requested(method, weights, base=None).base is None


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("slerp", {"t": 11}),
        ("ties", {"density": 0}),
        ("breadcrumbs", {"gamma": 1}),
        ("della", {"epsilon": 0.6}),
        ("dare_ties", {"density": [0.5, 2]}),
        ("sce", {"select_topk": 0}),
        ("karcher", {"max_iter": 0}),
        ("karcher", {"tol": 0}),
        ("dare_linear", {"seed": -1}),
    ],
)
def test_parameters_out_of_bounds_are_refused(method: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(parameters))):
        METHODS[method].parameters(name=method, **parameters)
