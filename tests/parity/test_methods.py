"""Each method against its formula, written down densely in float64, on a tiny BERT's tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parity.test_merging import normalised, owner_of, shares
from tests.score_names import named
from tests.tiny import merged_of
from worker.engine.catalog.families import ScoreName, Slot
from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.deberta_v2 import DEBERTA_V2
from worker.engine.catalog.methods import (
    GRAM,
    METHODS,
    NODE_FISHER,
    PARAMETER_FISHER,
    EsmParameters,
    RegMeanParameters,
    Statistic,
)
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.merging.methods import BUILDERS, MeasuredModel

Array = NDArray[np.float64]
Tensors = Mapping[str, Tensor]

LAYERS, HIDDEN, HEADS, NEURONS, WORDS = 2, 8, 2, 6, 11
LAMBDAS = (1.0, 2.5, 0.5)
LAYER = "bert.encoder.layer.{}."
IN_A_LAYER = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "attention.output.LayerNorm": (HIDDEN,),
    "intermediate.dense": (NEURONS, HIDDEN),
    "output.dense": (HIDDEN, NEURONS),
    "output.LayerNorm": (HIDDEN,),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "bert.embeddings.word_embeddings.weight": (WORDS, HIDDEN),
    "bert.pooler.dense.weight": (HIDDEN, HIDDEN),
    "bert.pooler.dense.bias": (HIDDEN,),
    **{LAYER.format(i) + f"{m}.weight": shape for i in range(LAYERS) for m, shape in IN_A_LAYER.items()},
    **{LAYER.format(i) + f"{m}.bias": shape[:1] for i in range(LAYERS) for m, shape in IN_A_LAYER.items()},
}
INPUTS = {
    "attention.self.query": "attention",
    "attention.self.key": "attention",
    "attention.self.value": "attention",
    "attention.output.dense": "heads",
    "intermediate.dense": "feed_forward",
    "output.dense": "neurons",
}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = generator(seed)
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


BASE = random_tensors(100)
VERSIONS = [{n: BASE[n] + 0.3 * step for n, step in random_tensors(seed).items()} for seed in range(3)]


def input_of(name: str) -> str | None:
    """What a matrix of a linear layer multiplies."""
    module, _, part = name.rpartition(".")
    if part == "bias":
        return None
    if module == "bert.pooler.dense":
        return "pooler"
    _, _, inner = module.partition("encoder.layer.")
    layer, _, inner = inner.partition(".")
    return f"layers.{layer}.{INPUTS[inner]}" if inner in INPUTS else None


def random_grams(seed: int, tokens: int = 50) -> dict[str, Tensor]:
    """Of inputs that are correlated, of different sizes, and not centred."""
    rng = generator(1000 + seed)
    grams = {}
    for name, shape in SHAPES.items():
        source = input_of(name)
        if source is not None and source not in grams:
            mixing = torch.randn(shape[1], shape[1], generator=rng, dtype=torch.float64)
            x = torch.randn(tokens, shape[1], generator=rng, dtype=torch.float64) @ mixing + 0.5
            grams[source] = (1 + seed) * x.T @ x / tokens
    return grams


def random_scores(seed: int) -> dict[ScoreName, Tensor]:
    """Heavy-tailed, with a node that is dead in every model, and one more in this."""
    rng = generator(2000 + seed)
    scores = {}
    for layer in range(LAYERS):
        for kind, count in (("heads", HEADS), ("neurons", NEURONS)):
            score = 10.0**seed * torch.randn(count, generator=rng, dtype=torch.float64).mul(2).exp()
            if kind == "neurons":
                score[0] = score[1 + seed] = 0
            scores[named(f"layers.{layer}.{kind}")] = score
    return scores


def random_information(seed: int) -> dict[str, Tensor]:
    """Heavy-tailed, in part zero everywhere, in part in this model."""
    rng = generator(3000 + seed)
    information = {}
    for name, shape in SHAPES.items():
        values = 10.0 ** (-3 * seed) * torch.randn(shape, generator=rng).mul(3).exp()
        values.view(-1)[0] = values.view(-1)[1 + seed] = 0
        information[name] = values
    return information


MODELS = [
    MeasuredModel(weight, random_scores(j), random_grams(j), random_information(j)) for j, weight in enumerate(LAMBDAS)
]


def slot_of(name: str) -> Slot:
    slot = BERT.slot(name)
    assert slot is not None, name
    return slot


def merge(
    method: str,
    models: Sequence[MeasuredModel] = MODELS,
    versions: Sequence[Tensors] = VERSIONS,
    base: Tensors = BASE,
    **parameters: Any,
) -> dict[str, Tensor]:
    merger = BUILDERS[method](METHODS[method].parameters(name=method, **parameters), list(models))
    return {name: merged_of(merger, slot_of(name), [v[name] for v in versions], base[name]) for name in versions[0]}


def float64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def assert_merged(found: Tensors, expected: Mapping[str, Array], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(float64(found[name]), tensor, rtol=0, atol=tolerance, err_msg=name)


def mean_of(name: str, weights: Array | Sequence[float] = LAMBDAS, versions: Sequence[Tensors] = VERSIONS) -> Array:
    return np.average([float64(version[name]) for version in versions], axis=0, weights=weights)


# --- task arithmetic and TIES ------------------------------------------------------------------------


def test_task_arithmetic_adds_the_weighted_task_vectors() -> None:
    expected = {
        name: float64(base)
        + sum(w * (float64(v[name]) - float64(base)) for w, v in zip(LAMBDAS, VERSIONS, strict=True))
        for name, base in BASE.items()
    }
    assert_merged(merge("task_arithmetic"), expected)


def dense_ties(base: Array, versions: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Element by element."""
    flat = [(version - base).ravel() for version in versions]
    kept = max(1, round(density * base.size))
    smallest = [sorted(abs(float(d)) for d in deltas)[-kept] for deltas in flat]
    merged = base.ravel().copy()
    for i in range(base.size):
        column = [(w, d[i] if abs(d[i]) >= least else 0.0) for w, d, least in zip(weights, flat, smallest, strict=True)]
        total = sum(w * d for w, d in column)
        agreeing = [(w, d) for w, d in column if d * total > 0]
        if agreeing:
            merged[i] += sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing)
    return merged.reshape(base.shape)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_trim_elect_and_merge(density: float) -> None:
    expected = {
        name: dense_ties(float64(base), [float64(v[name]) for v in VERSIONS], LAMBDAS, density)
        for name, base in BASE.items()
    }
    assert_merged(merge("ties", density=density), expected)


def one_tensor(method: str, versions: Sequence[Any], base: Any, weights: Sequence[float], **parameters: Any) -> Tensor:
    """A merge of vectors, given as lists."""
    tensors = [{"bert.pooler.dense.bias": torch.tensor(values)} for values in versions]
    models = [MeasuredModel(weight) for weight in weights]
    origin = {"bert.pooler.dense.bias": torch.tensor(base)}
    return merge(method, models, tensors, origin, **parameters)["bert.pooler.dense.bias"]


@pytest.mark.parametrize(
    ("versions", "weights", "expected"),
    [
        ([[1.0, 1.0, -1.0, 0.5, 0.0]], [1.0], [1.0, 1.0, -1.0, 0.0, 0.0]),  # equal magnitudes stay or go together
        ([[1.0, 0.0], [-1.0, 0.0]], [2.0, 2.0], [0.0, 0.0]),  # neither sign wins
        ([[1.0, 0.0], [-1.0, 0.0]], [2.0, 3.0], [-1.0, 0.0]),
        ([[1.0, 0.0], [3.0, 0.0], [-3.0, 0.0]], [1.0, 3.0, 1.0], [2.5, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], [0.0, 0.0]),
        ([[0.25], [0.75]], [1.0, 1.0], [0.5]),  # of one element, it is kept
    ],
)
def test_ties_in_small(versions: list[list[float]], weights: list[float], expected: list[float]) -> None:
    found = one_tensor("ties", versions, [0.0] * len(expected), weights, density=0.4)
    assert found.tolist() == expected


def test_ties_of_a_tensor_of_several_chunks_is_ties_of_the_whole() -> None:
    rng = generator(0)
    versions = [torch.randn(300_000, generator=rng) for _ in range(2)]
    found = one_tensor("ties", [v.tolist() for v in versions], [0.0] * 300_000, [1.0, 2.0])
    kept = [np.where(abs(v) >= np.sort(abs(v))[-60_000], v, 0) for v in map(float64, versions)]
    sign = np.sign(kept[0] + 2 * kept[1])
    shares = np.stack([(np.sign(k) == sign) * w for k, w in zip(kept, (1, 2), strict=True)])
    expected = np.where(sign == 0, 0, (shares * kept).sum(0) / np.maximum(shares.sum(0), 1))
    np.testing.assert_allclose(float64(found), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_task_vectors_of_zero_leave_the_base(method: str) -> None:
    found = merge(method, versions=[BASE] * 3)
    assert all(torch.equal(found[name], BASE[name]) for name in BASE)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_task_vectors_need_a_base(method: str) -> None:
    merger = BUILDERS[method](METHODS[method].parameters(name=method), MODELS[:1])
    with pytest.raises(RuntimeError, match="needs a base"):
        merged_of(merger, slot_of(QUERY), [VERSIONS[0][QUERY]])


# --- Fisher ------------------------------------------------------------------------------------------


def dense_fisher(
    models: Sequence[MeasuredModel], versions: Sequence[Tensors], normalize: bool, floor: float
) -> dict[str, Array]:
    information = []
    for model in models:
        everything = np.concatenate([float64(f[:]).ravel() for f in model.fisher.values()])
        norm = np.sqrt((everything**2).sum()) if normalize and everything.any() else 1.0
        information.append({name: float64(f[:]) / norm for name, f in model.fisher.items()})
    mean = np.concatenate([f.ravel() for of_model in information for f in of_model.values()]).mean()
    merged = {}
    for name in versions[0]:
        floored = np.stack([np.maximum(of_model[name], floor * mean) for of_model in information])
        weights = shares(np.array([m.weight for m in models]), [f.ravel() for f in floored])
        merged[name] = (weights * np.stack([float64(v[name]).ravel() for v in versions])).sum(0)
        merged[name] = merged[name].reshape(versions[0][name].shape)
    return merged


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.1])
def test_fisher_weights_each_parameter_by_its_own_information(normalize: bool, floor: float) -> None:
    expected = dense_fisher(MODELS, VERSIONS, normalize, floor)
    assert_merged(merge("fisher", normalize=normalize, floor=floor), expected)


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_fisher_falls_back_to_lambda_where_no_model_has_information(floor: float) -> None:
    found = merge("fisher", floor=floor)[QUERY]
    assert float(found.view(-1)[0]) == pytest.approx(mean_of(QUERY).ravel()[0], abs=1e-6)
    none = [replace(m, fisher={name: torch.zeros(shape) for name, shape in SHAPES.items()}) for m in MODELS]
    assert_merged(merge("fisher", none, floor=floor), {name: mean_of(name) for name in SHAPES})


def test_fisher_does_not_depend_on_the_scale_of_a_models_information() -> None:
    other = [replace(MODELS[0], fisher={n: f[:] * 1e-12 for n, f in MODELS[0].fisher.items()}), *MODELS[1:]]
    assert_merged(merge("fisher", other), {name: float64(t) for name, t in merge("fisher").items()})


def test_fisher_of_a_tensor_of_several_chunks() -> None:
    rng, name = generator(0), "bert.pooler.dense.bias"
    versions = [{name: torch.randn(300_000, generator=rng)} for _ in range(2)]
    models = [MeasuredModel(w, fisher={name: torch.rand(300_000, generator=rng)}) for w in (1.0, 3.0)]
    assert_merged(merge("fisher", models, versions, versions[0]), dense_fisher(models, versions, True, 1e-6))


# --- RegMean -----------------------------------------------------------------------------------------


def conditioned(grams: Sequence[Array], shrink: float, ridge: float) -> list[Array]:
    mean = np.mean([np.diag(gram).mean() for gram in grams])
    eye = np.eye(len(grams[0]))
    return [shrink * gram + (1 - shrink) * gram * eye + ridge * mean * eye for gram in grams]


def solved(versions: Sequence[Array], grams: Sequence[Array], weights: Sequence[float] | Array) -> Array:
    left = sum(w * gram for w, gram in zip(weights, grams, strict=True))
    right = sum(w * version @ gram for w, version, gram in zip(weights, versions, grams, strict=True))
    return np.asarray(np.linalg.solve(np.asarray(left), np.asarray(right).T).T)


@pytest.mark.parametrize(("shrink", "ridge"), [(0.9, 1e-6), (1.0, 0.0), (0.0, 0.1)])
def test_regmean_solves_the_normal_equations(shrink: float, ridge: float) -> None:
    expected = {}
    for name in SHAPES:
        source = input_of(name)
        expected[name] = mean_of(name)
        if source is not None:
            grams = conditioned([float64(m.grams[source]) for m in MODELS], shrink, ridge)
            expected[name] = solved([float64(v[name]) for v in VERSIONS], grams, LAMBDAS)
    assert_merged(merge("regmean", shrink=shrink, ridge=ridge), expected, 1e-5)


def test_regmean_gives_the_outputs_that_are_nearest_to_every_models_own() -> None:
    """The least-squares problem itself, over the stacked inputs of all models."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(rows, HIDDEN)) * np.arange(1, HIDDEN + 1) for rows in (30, 50, 20)]
    weights = [np.sqrt(w / len(x)) for w, x in zip(LAMBDAS, inputs, strict=True)]
    versions = [float64(v[QUERY]) for v in VERSIONS]
    stacked = np.concatenate([w * x for w, x in zip(weights, inputs, strict=True)])
    outputs = np.concatenate([w * x @ v.T for w, x, v in zip(weights, inputs, versions, strict=True)])
    expected = np.linalg.lstsq(stacked, outputs)[0].T
    grams = [{"layers.0.attention": torch.from_numpy(x.T @ x / len(x)).float()} for x in inputs]
    models = [replace(m, grams=g) for m, g in zip(MODELS, grams, strict=True)]
    found = merge("regmean", models, [{QUERY: v[QUERY]} for v in VERSIONS], shrink=1.0, ridge=0.0)
    assert_merged(found, {QUERY: expected}, 1e-5)


def with_gram(models: Sequence[MeasuredModel], *grams: Tensor) -> list[MeasuredModel]:
    """Every input of model j has the same Gram matrix; cut to the size of the input."""
    return [
        replace(m, grams={source: gram[: len(g), : len(g)] for source, g in m.grams.items()})
        for m, gram in zip(models, grams, strict=True)
    ]


ACTMAT = [
    [-0.296418273, 1.017531391, 6.764066083, -4.507013627],
    [5.47516719, 2.922880942, -0.428047369, 4.472480136],
    [0.7513498, -6.249628353, -2.04021789, 3.005242643],
]
"""What `merge_actmat` of github.com/marawangamal/actmat, commit 42292c7d, makes of the matrices of the test below."""


@pytest.mark.parametrize("transposed", [False, True])
def test_regmean_of_estimates_is_what_their_authors_make(transposed: bool) -> None:
    rng = generator(7)
    base = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    versions = [base + (1 + j) * torch.randn(3, 4, generator=rng, dtype=torch.float64) for j in range(2)]
    slot = replace(slot_of(QUERY), transposed=transposed)
    if transposed:
        base, versions = base.T.contiguous(), [version.T.contiguous() for version in versions]
    parameters = RegMeanParameters(gram="deltas", ridge=0.0)
    found = merged_of(BUILDERS["regmean"](parameters, [MeasuredModel(1.0)] * 2), slot, versions, base)
    np.testing.assert_allclose(float64(found.T if transposed else found), ACTMAT, rtol=0, atol=2e-8)


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_regmean_of_estimates_solves_the_normal_equations_of_task_vectors(shrink: float) -> None:
    """With the weights, `shrink` and `ridge` of measured matrices, and others as the average."""
    found = merge("regmean", [MeasuredModel(weight) for weight in LAMBDAS], gram="deltas", shrink=shrink, ridge=0.01)
    for name, base in BASE.items():
        expected = mean_of(name)
        if input_of(name) is not None:
            grams = [(float64(v[name]) - float64(base)).T @ (float64(v[name]) - float64(base)) for v in VERSIONS]
            ridge = 0.01 * np.mean([np.diag(gram).mean() for gram in grams]) * np.eye(len(grams[0]))
            grams = [shrink * g + (1 - shrink) * np.diag(np.diag(g)) + ridge for g in grams]
            left = np.sum([w * g for w, g in zip(LAMBDAS, grams, strict=True)], axis=0)
            weighted = [w * float64(v[name]) @ g for w, v, g in zip(LAMBDAS, VERSIONS, grams, strict=True)]
            expected = np.linalg.solve(left, np.sum(weighted, axis=0).T).T
        np.testing.assert_allclose(float64(found[name]), expected, rtol=0, atol=1e-5, err_msg=name)
    same = merge("regmean", [MeasuredModel(1.0)] * 2, [VERSIONS[0]] * 2, gram="deltas")
    assert all(torch.equal(same[name], VERSIONS[0][name]) for name in BASE)
    assert all(torch.equal(t, BASE[n]) for n, t in merge("regmean", MODELS, [BASE] * 3, gram="deltas").items())


def test_regmean_without_inputs_is_the_average() -> None:
    models = with_gram(MODELS, *[torch.zeros(HIDDEN, HIDDEN)] * 3)
    assert_merged(merge("regmean", models), {name: mean_of(name) for name in SHAPES})


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("method", ["regmean", "mask_regmean"])
def test_inputs_that_do_not_span_the_space_are_no_obstacle(method: str, ridge: float) -> None:
    """Along the one direction that is there, the merged layer does as the average; beyond it, nothing explodes."""
    direction = torch.linspace(-1, 1, HIDDEN)[:, None]
    models = with_gram(MODELS, *[direction @ direction.T] * 3)
    options: dict[str, Any] = {"columns": True, "neuron_rows": True} if method == "mask_regmean" else {}
    found = merge(method, models, shrink=1.0, ridge=ridge, **options)
    assert all(bool(tensor.isfinite().all()) and float(tensor.abs().max()) < 10 for tensor in found.values())
    if method == "regmean":
        np.testing.assert_allclose(float64(found[QUERY] @ direction), mean_of(QUERY) @ float64(direction), atol=1e-4)


def test_a_model_without_inputs_leaves_the_layer_to_the_others() -> None:
    zero = torch.zeros(HIDDEN, HIDDEN)
    models = with_gram(MODELS, torch.eye(HIDDEN), zero, torch.eye(HIDDEN))
    expected = np.average([float64(VERSIONS[0][QUERY]), float64(VERSIONS[2][QUERY])], axis=0, weights=(1.0, 0.5))
    np.testing.assert_allclose(float64(merge("regmean", models, ridge=1e-6)[QUERY]), expected, atol=1e-4)


def test_gram_matrices_that_are_no_numbers_are_refused_by_name() -> None:
    models = with_gram(MODELS, *[torch.full((HIDDEN, HIDDEN), float("nan"))] * 3)
    with pytest.raises(NumericalError, match=r"layers\.0\.attention"):
        merge("regmean", models, [{QUERY: v[QUERY]} for v in VERSIONS])


# --- mask RegMean ------------------------------------------------------------------------------------


def dense_mask_regmean(normalize: str, rest: str, columns: bool, neuron_rows: bool) -> dict[str, Array]:
    """One solve for each row that a node owns, with shrink 0.9 and ridge 1e-6; floor's default."""
    lambdas = np.array(LAMBDAS)
    by_node = [normalised(m.scores, normalize) for m in MODELS]
    by_node = [{n: np.maximum(s, 1e-3 * (s.mean() or 1)) for n, s in of_model.items()} for of_model in by_node]
    by_model = [normalised(m.scores, "model") for m in MODELS]
    merged = {}
    for name, shape in SHAPES.items():
        versions = [float64(v[name]) for v in VERSIONS]
        owner, source = owner_of(name), input_of(name)
        of_rest = lambdas / lambdas.sum()
        if rest == "model":
            layers = [name.split(".")[3]] if "layer." in name else ["0", "1"]
            block = [[[s[f"layers.{i}.{k}"].mean() for i in layers for k in ("heads", "neurons")]] for s in by_model]
            of_rest = shares(lambdas, [np.mean(means, axis=1) for means in block])[:, 0]
        weights = None
        if owner is not None:
            weights = shares(lambdas, [s[owner[0]] for s in by_node]).repeat(1, axis=1)
            weights = weights.repeat(shape[owner[1]] // weights.shape[1], axis=1)  # (models, rows or columns)
        if source is None:
            by_slice = of_rest if weights is None else weights
            by_slice = by_slice.reshape(len(lambdas), -1, *[1] * (len(shape) - 1))
            merged[name] = (by_slice * np.stack(versions)).sum(0)
            continue
        grams = conditioned([float64(m.grams[source]) for m in MODELS], 0.9, 1e-6)
        if weights is None:
            merged[name] = solved(versions, grams, of_rest)
        elif owner is not None and owner[1] == 0 and (owner[0].endswith("heads") or neuron_rows):
            rows = [solved([v[[o]] for v in versions], grams, weights[:, o]) for o in range(shape[0])]
            merged[name] = np.concatenate(rows)
        elif owner is not None and owner[1] == 1 and columns:
            scaled = [np.diag(np.sqrt(w)) @ g @ np.diag(np.sqrt(w)) for w, g in zip(weights, grams, strict=True)]
            left, zero = sum(scaled), versions[0]
            right = sum((v - zero) @ g for v, g in zip(versions, scaled, strict=True))
            merged[name] = zero + np.asarray(right) @ np.linalg.inv(np.asarray(left))
        else:
            merged[name] = solved(versions, grams, lambdas)
    return merged


@pytest.mark.parametrize("normalize", ["layer", "model"])
@pytest.mark.parametrize("rest", ["uniform", "model"])
@pytest.mark.parametrize(("columns", "neuron_rows"), [(False, False), (True, False), (False, True), (True, True)])
def test_mask_regmean_solves_for_every_node(normalize: Any, rest: Any, columns: bool, neuron_rows: bool) -> None:
    options = {"normalize": normalize, "rest": rest, "columns": columns, "neuron_rows": neuron_rows}
    found = merge("mask_regmean", shrink=0.9, ridge=1e-6, **options)
    assert_merged(found, dense_mask_regmean(normalize, rest, columns, neuron_rows), 1e-5)


def test_more_slices_than_are_factorised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: float64(t) for name, t in merge("mask_regmean", neuron_rows=True).items()}
    monkeypatch.setattr("worker.engine.merging.methods.regmean.BATCH_BYTES", 4 * 8 * HIDDEN**2)
    assert_merged(merge("mask_regmean", neuron_rows=True), expected, 1e-7)


EXACT = [{n: t.double() for n, t in version.items()} for version in VERSIONS]
ALL_ON: dict[str, Any] = {"columns": True, "neuron_rows": True}


def test_mask_regmean_of_equal_scores_is_regmean() -> None:
    even = {n: torch.full_like(s, 3.0) for n, s in MODELS[0].scores.items()}
    models = [replace(m, scores=even) for m in MODELS]
    expected = {name: float64(t) for name, t in merge("regmean", models, EXACT).items()}
    assert_merged(merge("mask_regmean", models, EXACT, **ALL_ON), expected, 1e-12)


@pytest.mark.parametrize("rest", ["uniform", "model"])
def test_mask_regmean_of_uncorrelated_inputs_is_mask_fisher(rest: str) -> None:
    models = with_gram(MODELS, *[torch.eye(HIDDEN)] * 3)
    expected = {name: float64(t) for name, t in merge("mask_fisher", models, EXACT, rest=rest).items()}
    found = merge("mask_regmean", models, EXACT, rest=rest, shrink=1.0, ridge=0.0, **ALL_ON)
    assert_merged(found, expected, 1e-12)


def test_a_heads_view_of_positions_is_no_linear_layer_of_regmean() -> None:
    """It reads positions, of which there are no Gram matrices, but its rows have owners."""
    slot = DEBERTA_V2.slot("deberta.encoder.layer.0.attention.self.pos_key_proj.weight")
    assert slot is not None
    versions = [v[QUERY] for v in VERSIONS]
    for method, same_as in (("regmean", "average"), ("mask_regmean", "mask_fisher")):
        found, expected = (
            merged_of(BUILDERS[name](METHODS[name].parameters(name=name), MODELS), slot, versions)
            for name in (method, same_as)
        )
        assert torch.equal(found, expected)


# --- all of them -------------------------------------------------------------------------------------

WEIGHTED = ("fisher", "regmean", "mask_regmean")
NEW = ("task_arithmetic", "ties", *WEIGHTED)


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("options", [{}, ALL_ON], ids=["default", "all on"])
def test_identical_models_stay_as_they_are(method: str, options: dict[str, Any]) -> None:
    found = merge(method, versions=[VERSIONS[0]] * 3, **(options if method == "mask_regmean" else {}))
    assert all(torch.equal(found[name], VERSIONS[0][name]) for name in SHAPES)


@pytest.mark.parametrize("method", NEW)
def test_one_model_is_its_own_merge(method: str) -> None:
    expected = VERSIONS[0]
    full: dict[str, Any] = {"density": 1.0} if method == "ties" else {}
    found = merge(method, [replace(MODELS[0], weight=1.0)], [expected], **full)
    assert_merged(found, {name: float64(t) for name, t in expected.items()}, 1e-6)
    if method in WEIGHTED:
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("options", [{}, ALL_ON], ids=["default", "all on"])
def test_the_order_of_the_models_does_not_matter(method: str, options: dict[str, Any]) -> None:
    options = options if method == "mask_regmean" else {}
    found = merge(method, MODELS[::-1], VERSIONS[::-1], **options)
    assert_merged(found, {name: float64(t) for name, t in merge(method, **options).items()}, 3e-6)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize(
    ("given", "result"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_the_result_is_in_float32_or_better(method: str, given: torch.dtype, result: torch.dtype) -> None:
    versions = [VERSIONS[0], {n: t.to(given) for n, t in VERSIONS[1].items()}]
    found = merge(method, MODELS[:2], versions)
    assert {tensor.dtype for tensor in found.values()} == {result}
    assert {name: tensor.shape for name, tensor in found.items()} == SHAPES


@pytest.mark.parametrize("method", NEW)
def test_a_matrix_of_one_row_or_one_column_merges(method: str) -> None:
    name = "bert.pooler.dense.weight"
    for shape in ((1, HIDDEN), (HIDDEN, 1), (1, 1)):
        versions = [{name: v[name][: shape[0], : shape[1]]} for v in VERSIONS]
        models = [replace(m, grams={"pooler": torch.eye(shape[1])}, fisher={name: torch.ones(shape)}) for m in MODELS]
        found = merge(method, models, versions, {name: torch.zeros(shape)})
        assert found[name].shape == shape
        if method in WEIGHTED:
            assert_merged(found, {name: mean_of(name, versions=versions)})


@pytest.mark.parametrize("method", NEW)
def test_inputs_are_left_as_they_were(method: str) -> None:
    before = [{n: t.clone() for n, t in tensors.items()} for tensors in (BASE, *VERSIONS)]
    measured = [{**m.scores, **m.grams, **{n: f[:] for n, f in m.fisher.items()}} for m in MODELS]
    copies = [{n: t.clone() for n, t in tensors.items()} for tensors in measured]
    merge(method)
    for originals, kept in zip((BASE, *VERSIONS, *measured), (*before, *copies), strict=True):
        assert all(torch.equal(originals[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("method", "statistics", "needs_base", "scale"),
    [
        ("task_arithmetic", set(), True, 0.4),
        ("ties", set(), True, 1.0),
        ("fisher", {PARAMETER_FISHER}, False, 1.0),
        ("regmean", {GRAM}, False, 1.0),
        ("mask_regmean", {GRAM, NODE_FISHER}, False, 1.0),
        ("aligned_regmean", {GRAM}, False, 1.0),
    ],
)
def test_what_a_method_needs(method: str, statistics: set[Statistic], needs_base: bool, scale: float) -> None:
    parameters = METHODS[method].parameters(name=method)
    assert parameters.statistics == statistics
    assert parameters.needs_base is needs_base
    assert parameters.scale == scale
    assert ("base" in METHODS[method].needs) is needs_base
    assert ("dataset" in METHODS[method].needs) is bool(statistics)


# --- ESM -----------------------------------------------------------------------------------------------

AUTHORS_ESM = [
    [0.892074328, -3.284237931, 3.08326, -1.112382302, -1.665172282, -0.070602209],
    [1.427627594, 2.425212623, 1.354267903, 2.537470661, -0.755019193, 1.748910947],
    [2.427534424, -1.045853473, -0.441099771, 1.378929955, 1.975093301, -0.349059523],
    [1.334641672, -0.711792694, 1.125346947, 1.064917876, 0.972065643, -1.101822884],
]
"""What `esm_merge` and `_compute_esd` of github.com/kiddo127/ESM (ESM-ViT), commit fc82fe76, make of the matrices and
rows of the test below: with eigenvalues that are all 1, which leaves out the factor that the paper does not have,
without the last factor of 2, and with one layer, so that it is scaled against no other."""


def shifts(outputs: int, inputs: int, models: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, its task vectors, and rows that models read."""
    rng = generator(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    base = drawn(outputs, inputs)
    deltas = [(1 + j) * 0.5 * drawn(outputs, inputs) for j in range(models)]
    return base, deltas, [drawn(20, inputs) @ drawn(inputs, inputs) for _ in range(models)]


def read(rows: Sequence[Tensor], weights: Sequence[float]) -> list[MeasuredModel]:
    return [
        MeasuredModel(w, grams={"layers.0.attention": x.T @ x / len(x)}) for w, x in zip(weights, rows, strict=True)
    ]


def test_esm_is_what_its_authors_make() -> None:
    base, deltas, rows = shifts(4, 6, 2, seed=11)
    merger = BUILDERS["esm"](EsmParameters(), read(rows, [1.0, 1.0]))
    found = merged_of(merger, slot_of(QUERY), [base + delta for delta in deltas], base)
    np.testing.assert_allclose(float64(found), AUTHORS_ESM, rtol=0, atol=1e-8)


def polar(matrix: Array) -> Array:
    """With the mean singular value instead of each."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(s.mean() * u @ v)


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 5), (5, 9)])
@pytest.mark.parametrize("power", [0.0, 2.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_esm_keeps_the_principal_directions_of_shifted_outputs(
    outputs: int, inputs: int, power: float, transposed: bool
) -> None:
    """By singular values of `X D^T` itself, with weights."""
    base, deltas, rows = shifts(outputs, inputs, 2, seed=12)
    weights = np.array([1.5, 0.5])
    kept = int(0.8 * outputs / 2)
    directions = [np.linalg.svd(float64(x @ d.T))[2][:kept].T for x, d in zip(rows, deltas, strict=True)]
    norms = np.array([np.linalg.norm(float64(delta)) for delta in deltas])
    scales = weights * (norms / norms.mean()) ** power
    parts = [s * p.T @ float64(d) for s, p, d in zip(scales, directions, deltas, strict=True)]
    coordinates = np.concatenate(parts)
    by_input = np.linalg.norm(coordinates, axis=0)
    coordinates *= (by_input / by_input.mean()) ** power
    expected = float64(base) + polar(np.concatenate(directions, axis=1)) @ polar(coordinates)
    slot = replace(slot_of(QUERY), transposed=transposed)
    versions = [base, *(base + delta for delta in deltas)]
    base, *versions = [version.T.contiguous() if transposed else version for version in versions]
    for order in ([0, 1], [1, 0]):
        models = read([rows[j] for j in order], weights[order].tolist())
        merger = BUILDERS["esm"](EsmParameters(rank=0.8, power=power), models)
        found = merged_of(merger, slot, [versions[j] for j in order], base)
        np.testing.assert_allclose(float64(found.T if transposed else found), expected, rtol=0, atol=1e-9)


def test_esm_averages_what_is_no_linear_layer_and_leaves_what_no_model_changed() -> None:
    found = merge("esm")
    others = [name for name in SHAPES if input_of(name) is None]
    assert_merged({name: found[name] for name in others}, {name: mean_of(name) for name in others})
    still = merge("esm", versions=[{**v, QUERY: BASE[QUERY]} for v in VERSIONS])
    assert torch.equal(still[QUERY], BASE[QUERY])
    nobody = [replace(m, grams={name: torch.zeros_like(g) for name, g in m.grams.items()}) for m in MODELS]
    unread = merge("esm", nobody)
    alike = [replace(m, grams={name: torch.eye(len(g)) for name, g in m.grams.items()}) for m in MODELS]
    assert_merged(unread, {name: float64(tensor) for name, tensor in merge("esm", alike).items()}, 1e-6)
    one_changed = [{**v, QUERY: BASE[QUERY]} for v in VERSIONS[:2]] + VERSIONS[2:]
    delta = float64(merge("esm", versions=one_changed)[QUERY]) - float64(BASE[QUERY])
    assert np.linalg.matrix_rank(delta, tol=1e-5) == HIDDEN // 3
