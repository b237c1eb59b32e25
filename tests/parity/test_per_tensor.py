"""Parameters that differ between tensors: every tensor is as in a merge with its own values everywhere."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.parity.test_merging import dense_merge
from tests.parity.test_methods import (
    BASE,
    LAYERS,
    MODELS,
    SHAPES,
    VERSIONS,
    Array,
    assert_merged,
    conditioned,
    dense_fisher,
    float64,
    input_of,
    mean_of,
    merge,
    slot_of,
    solved,
)
from tests.score_names import named
from tests.tiny import merged_of
from worker.engine.catalog.methods import METHODS, MaskFisherParameters
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace
from worker.engine.merging.methods import BUILDERS
from worker.engine.merging.methods.mask_fisher import node_weights, weight_errors, weight_shares
from worker.engine.merging.stopping import Scored, errors_at
from worker.engine.scoring.statistics import NodeStatistics

# The three models' weights, and one more number, in every form.
WEIGHTS: dict[str, tuple[Any, Any, Any]] = {
    "by layer": ([0.5, 2.0], [1.0, 1.0, 3.0], 0.25),
    "by filter": (
        [{"filter": "*attention*", "value": [3.0, 0.0]}, {"filter": "*weight", "value": 0.0}],
        [{"filter": "*.query.*", "value": 0.0}, {"filter": "*", "value": 0.7}],
        [{"filter": "no tensor", "value": 5.0}],
    ),
}


def depth_of(name: str) -> float:
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0]) / (LAYERS - 1)
    return 0.0 if "embeddings" in name else 1.0


def resolved(setting: Any, name: str, default: float) -> float:
    """The same as the engine should find, from the description."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        matching = [entry["value"] for entry in setting if re.match(translate(entry["filter"]), name)]
        setting = matching[0] if matching else default
    if isinstance(setting, list):
        return float(np.interp(depth_of(name), np.linspace(0, 1, len(setting)), setting))
    return float(setting)


def parsed(setting: Any) -> Any:
    return TypeAdapter(PerTensor[float]).validate_python(setting)


def merged_per_tensor(method: str, weights: Sequence[Any], **parameters: Any) -> dict[str, Tensor]:
    models = [replace(model, weight=parsed(weight)) for model, weight in zip(MODELS, weights, strict=True)]
    merger = BUILDERS[method](METHODS[method].parameters(name=method, **parameters), models)
    return {
        name: merged_of(merger, slot_of(name), [v[name] for v in VERSIONS], BASE[name], place=place_of(name))
        for name in SHAPES
    }


def place_of(name: str) -> TensorPlace:
    return TensorPlace(name, depth_of(name))


def dense_average(weights: Sequence[float], value: float) -> Mapping[str, Array]:
    return {name: mean_of(name, weights) for name in SHAPES}


def dense_task_arithmetic(weights: Sequence[float], value: float) -> Mapping[str, Array]:
    return {
        name: float64(base)
        + sum(w * (float64(v[name]) - float64(base)) for w, v in zip(weights, VERSIONS, strict=True))
        for name, base in BASE.items()
    }


def dense_mask_fisher(weights: Sequence[float], value: float) -> Mapping[str, Array]:
    return dense_merge(VERSIONS, [model.scores for model in MODELS], weights, "layer", "model", value)


def dense_fisher_of(weights: Sequence[float], value: float) -> Mapping[str, Array]:
    models = [replace(model, weight=weight) for model, weight in zip(MODELS, weights, strict=True)]
    return dense_fisher(models, VERSIONS, True, value)


def dense_regmean(weights: Sequence[float], value: float) -> Mapping[str, Array]:
    found = dict(dense_average(weights, value))
    for name in SHAPES:
        source = input_of(name)
        if source is not None:
            grams = conditioned([float64(m.grams[source]) for m in MODELS], 0.9, value)
            found[name] = solved([float64(v[name]) for v in VERSIONS], grams, weights)
    return found


Dense = Callable[[Sequence[float], float], Mapping[str, Array]]
DENSE: dict[str, tuple[Dense, str | None, dict[str, Any]]] = {
    "average": (dense_average, None, {}),
    "task_arithmetic": (dense_task_arithmetic, None, {}),
    "mask_fisher": (dense_mask_fisher, "floor", {"rest": "model"}),
    "fisher": (dense_fisher_of, "floor", {}),
    "regmean": (dense_regmean, "ridge", {"shrink": 0.9}),
}
VALUES: tuple[Any, ...] = ([0.0, 0.5], [{"filter": "*bias", "value": 0.3}, {"filter": "*.0.*", "value": [0.1, 0.7]}])


@pytest.mark.parametrize("value", VALUES, ids=["layers", "filters"])
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("method", DENSE)
def test_a_tensor_has_its_own_weights_and_parameters(method: str, form: str, value: Any) -> None:
    dense, parameter, further = DENSE[method]
    given = {} if parameter is None else {parameter: value}
    default = METHODS[method].parameters(name=method)
    expected = {}
    for name in SHAPES:
        weights = [resolved(weight, name, 1.0) for weight in WEIGHTS[form]]
        own = 0.0 if parameter is None else resolved(value, name, getattr(default, parameter))
        expected[name] = dense(weights, own)[name]
    assert_merged(merged_per_tensor(method, WEIGHTS[form], **given, **further), expected, 1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mask_fisher", {"preset": "paper"}),
        ("mask_fisher", {"floor": 0.2}),
        ("mask_regmean", {"columns": True, "neuron_rows": True, "shrink": [0.2, 0.9], "rest": "model"}),
        ("mask_regmean", {"ridge": [{"filter": "*key*", "value": 0.5}], "floor": [0.1, 0.0]}),
        ("ties", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", WEIGHTS)
def test_a_tensor_is_as_if_its_values_were_everyones(method: str, form: str, options: dict[str, Any]) -> None:
    found = merged_per_tensor(method, WEIGHTS[form], **options)
    defaults = METHODS[method].parameters(name=method)
    for name in SHAPES:
        weights = [resolved(weight, name, 1.0) for weight in WEIGHTS[form]]
        models = [replace(model, weight=weight) for model, weight in zip(MODELS, weights, strict=True)]
        own: dict[str, Any] = {
            key: resolved(value, name, getattr(defaults, key)) if isinstance(value, list) else value
            for key, value in options.items()
        }
        assert torch.equal(found[name], merge(method, models, [{name: v[name]} for v in VERSIONS], **own)[name]), name


def test_weight_shares_are_means_over_the_tensors_that_nodes_own() -> None:
    first, second = parsed([{"filter": "*query*", "value": 3.0}, {"filter": "*", "value": 1.0}]), 1.0
    models = [replace(MODELS[0], weight=first), replace(MODELS[1], weight=second)]
    places = {
        named("layers.0.heads"): [
            place_of(f"bert.encoder.layer.0.attention.self.{what}.weight") for what in ("query", "key")
        ]
    }
    even = [replace(m, scores={named("layers.0.heads"): torch.ones(4).double()}) for m in models]
    shares = weight_shares(node_weights(even, MaskFisherParameters(floor=0.0)), places)
    assert shares == pytest.approx([(0.75 + 0.5) / 2, 0.375])


def test_errors_of_merge_weights_are_root_mean_squares_over_tensors() -> None:
    rng = torch.Generator().manual_seed(3)
    of_models = []
    for _ in range(2):
        sums = NodeStatistics()
        sums.add({named("layers.0.heads"): torch.randn(50, 4, generator=rng).exp()})
        of_models.append(sums)
    weight = parsed([{"filter": "*query*", "value": 3.0}, {"filter": "*", "value": 1.0}])
    floor = parsed([{"filter": "*query*", "value": 1.0}])
    names = [f"bert.encoder.layer.0.attention.self.{what}.weight" for what in ("query", "key")]
    method = METHODS["mask_fisher"].parameters(name="mask_fisher").model_copy(update={"floor": floor})
    scored = [Scored(weight, {50: of_models[0]}, 10**6), Scored(1.0, {50: of_models[1]}, 10**6)]
    found = errors_at(method, scored, 50, {named("layers.0.heads"): [place_of(name) for name in names]})  # type: ignore[arg-type]
    squares = []
    for lam, least in ((3.0, 1.0), (1.0, 1e-3)):
        scores = [sums.scores()[named("layers.0.heads")] for sums in of_models]
        floored = [torch.maximum(s / s.mean(), torch.tensor(least).double()) for s in scores]
        w = torch.stack([lam * floored[0], floored[1]])
        w /= w.sum(0)
        rho = torch.stack([s.relative_errors(10**6, "layer", least)[named("layers.0.heads")] for s in of_models])
        squares.append(weight_errors(w, rho) ** 2)
    assert found is not None
    torch.testing.assert_close(found[named("layers.0.heads")], ((squares[0] + squares[1]) / 2).sqrt())
