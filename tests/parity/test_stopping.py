"""Errors of scores and merge weights against direct computations and the bootstrap; where scoring stops and goes on."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from tests.score_names import named
from tests.tiny import (
    LAYERS,
    dataset_spec,
    edit_json,
    merge_spec,
    model_spec,
    silent,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import ScoreSpec, StoreSpec
from worker.engine.catalog.contracts.statistics import Facts
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import GRAM, NODE_FISHER, MaskFisherParameters, RegMeanParameters, ScoringParameters
from worker.engine.catalog.methods.parameters import MOST_AUTO_EXAMPLES
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import LabelMap
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.methods.mask_fisher import node_weights, weight_errors
from worker.engine.merging.stopping import Scored, errors_at, point
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample, block_ends, looks
from worker.engine.scoring.statistics import NodeStatistics
from worker.engine.scoring.store import StatisticsStore

Array = NDArray[np.float64]
Squares = dict[ScoreName, Array]
"""By score name, (rows, nodes)."""

SITES = {
    named("layers.0.heads"): 4,
    named("layers.1.heads"): 4,
    named("layers.0.neurons"): 24,
    named("layers.1.neurons"): 24,
}
OWNED = {site: [TensorPlace(site, 0.0)] for site in SITES}
ROWS = 700
BOOTSTRAP_TOLERANCE = 0.1  # of a root mean square over a layer's nodes, with 400 resamples of 1,500 rows


def squares(seed: int, rows: int) -> Squares:
    """What squared gradients look like: an example is large at all nodes or at none, and nodes differ in scale."""
    rng = np.random.default_rng(seed)
    example = rng.lognormal(0, 1.0, (rows, 1))
    found = {}
    for site, nodes in SITES.items():
        found[site] = example * rng.lognormal(0, 1.0, (1, nodes)) * rng.lognormal(0, 0.7, (rows, nodes))
    found[named("layers.0.neurons")][:, 3] = 0  # dead
    found[named("layers.1.neurons")][:, 5] *= 1e-5  # below the floor
    return found


def statistics(q: Squares) -> NodeStatistics:
    found = NodeStatistics()
    rows = len(next(iter(q.values())))
    for start in range(0, rows, 64):
        found.add({site: torch.from_numpy(of[start : start + 64]) for site, of in q.items()})
    return found


@pytest.mark.parametrize("population", [500, 501, 2000, 10**9])
def test_relative_errors_are_those_of_a_ratio_of_means(population: int) -> None:
    """METHOD's `u_i = (q_i - F'_i m) / M`, one example after the other."""
    q = squares(0, 500)
    found = statistics(q).relative_errors(population)
    for site, of in q.items():
        score, mean = of.mean(0), of.mean()
        normalised = score / mean
        u = np.array([(row - normalised * row.mean()) / mean for row in of])
        variance = u.var(0, ddof=1) / 500 * max(0.0, 1 - 500 / population)
        expected = np.divide(np.sqrt(variance), normalised, out=np.zeros_like(score), where=normalised > 0)
        np.testing.assert_allclose(found[site].numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=site)


def test_raw_relative_errors_are_those_of_means() -> None:
    q = squares(1, 300)
    found = statistics(q).relative_errors(900, "none")
    for site, of in q.items():
        error = np.sqrt(of.var(0, ddof=1) / 300 * (1 - 300 / 900))
        expected = np.divide(error, of.mean(0), out=np.zeros_like(error), where=of.mean(0) > 0)
        np.testing.assert_allclose(found[site].numpy(), expected, rtol=1e-9, atol=0, err_msg=site)


def test_errors_over_the_models_norm_are_bounded_by_at_most_a_few_times_what_they_are() -> None:
    q = squares(2, 400)
    found = statistics(q).relative_errors(10**9, "model")
    for kind in ("heads", "neurons"):
        sites = [site for site in q if site.endswith(kind)]
        all_of_kind = np.concatenate([q[site] for site in sites], axis=1)
        score = all_of_kind.mean(0)
        norm = np.linalg.norm(score)
        along = all_of_kind @ score / norm  # of each example: what it adds to the norm
        u = (all_of_kind - score / norm * along[:, None]) / norm
        exact = np.divide(u.std(0, ddof=1) / 20, score / norm, out=np.zeros_like(score), where=score > 0)
        bound = torch.cat([found[site] for site in sites]).numpy()
        assert (bound >= exact).all()
        assert np.sqrt((bound**2).mean()) < 4 * np.sqrt((exact**2).mean())


@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_a_node_at_the_floor_is_as_uncertain_as_its_layers_mean(normalize: Any) -> None:
    q = squares(3, 300)
    found = statistics(q).relative_errors(10**9, normalize, floor=1e-3)[named("layers.1.neurons")]
    unfloored = statistics(q).relative_errors(10**9, normalize)[named("layers.1.neurons")]
    of_rows = q[named("layers.1.neurons")].mean(1)
    expected = 0.0 if normalize == "layer" else of_rows.std(ddof=1) / 300**0.5 / of_rows.mean()
    expected *= (1 - 300 / 10**9) ** 0.5
    assert float(found[5]) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(found[torch.arange(24) != 5], unfloored[torch.arange(24) != 5])


def merge_weights(scores: Sequence[Mapping[ScoreName, Array]], lambdas: Sequence[float], floor: float) -> Squares:
    """(models, nodes) by score name, of scores normalised by layer."""
    found = {}
    for site in SITES:
        normalised = [of[site] / of[site].mean() for of in scores]
        weighted = np.array([lam * np.maximum(f, floor) for lam, f in zip(lambdas, normalised, strict=True)])
        found[site] = weighted / weighted.sum(0)
    return found


def engine_errors(models: Sequence[Squares], lambdas: Sequence[float], populations: Sequence[int]) -> Squares:
    """The same from the engine's sums, with its default floor."""
    method = MaskFisherParameters()
    scored = [
        Scored(lam, {len(q[named("layers.0.heads")]): statistics(q)}, population)
        for lam, q, population in zip(lambdas, models, populations, strict=True)
    ]
    found = errors_at(method, scored, 10**9, OWNED)
    assert found is not None
    return {site: of.numpy() for site, of in found.items()}


def test_errors_of_merge_weights_follow_from_how_each_row_moves_them() -> None:
    """Sum over models and rows of the squared derivative of the weights in the direction of that row."""
    lambdas, populations, step = (1.0, 2.0, 0.5), (1000, 10**9, 300), 1e-6
    models = [squares(seed, 300) for seed in (10, 11, 12)]
    means = [{site: of.mean(0) for site, of in q.items()} for q in models]
    at_means = merge_weights(means, lambdas, 1e-3)
    expected = {site: np.zeros_like(weights) for site, weights in at_means.items()}
    for place, (q, population) in enumerate(zip(models, populations, strict=True)):
        for row in range(300):
            moved = list(means)
            moved[place] = {site: mean + step * (q[site][row] - mean) for site, mean in means[place].items()}
            weights = merge_weights(moved, lambdas, 1e-3)
            for site, of in weights.items():
                derivative = (of - at_means[site]) / step
                expected[site] += derivative**2 / 300 / 299 * (1 - 300 / population)
    found = engine_errors(models, lambdas, populations)
    for site, variance in expected.items():
        np.testing.assert_allclose(found[site], np.sqrt(variance), rtol=1e-4, atol=1e-8, err_msg=site)


def test_errors_of_merge_weights_are_those_of_the_bootstrap_over_rows() -> None:
    rows, lambdas = 1500, (1.0, 0.7)
    models = [squares(seed, rows) for seed in (20, 21)]
    rng = np.random.default_rng(0)
    draws: dict[ScoreName, list[Array]] = {site: [] for site in SITES}
    for _ in range(400):
        counts = [rng.multinomial(rows, np.full(rows, 1 / rows)) / rows for _ in models]
        means = [{site: c @ of for site, of in q.items()} for c, q in zip(counts, models, strict=True)]
        for site, of in merge_weights(means, lambdas, 1e-3).items():
            draws[site].append(of)
    found = engine_errors(models, lambdas, (10**9, 10**9))
    for site, of_resamples in draws.items():
        expected = np.stack(of_resamples).std(0)
        ratio = np.sqrt((found[site] ** 2).mean() / (expected**2).mean())
        assert abs(ratio - 1) < BOOTSTRAP_TOLERANCE, (site, ratio)


def test_a_model_alone_stands_against_one_as_uncertain_as_itself() -> None:
    q = squares(30, 400)
    (of_twins, _) = engine_errors([q], (1.0,), (10**9,))[named("layers.0.heads")]
    rho = statistics(q).relative_errors(10**9, floor=1e-3)[named("layers.0.heads")].numpy()
    np.testing.assert_allclose(of_twins, rho / 8**0.5, rtol=1e-12)


def test_only_shares_matter_and_a_model_without_weight_has_no_error() -> None:
    rho = torch.tensor([0.1, 0.2]).double()
    weights = torch.tensor([[1.0, 0.5], [0.0, 0.5]]).double()
    found = weight_errors(weights, torch.stack([rho, rho]))
    assert found.tolist()[1][0] == found.tolist()[0][0] == 0
    np.testing.assert_allclose(found[:, 1].numpy(), 0.5 * 0.5 * 0.2 * 2**0.5)
    models = [MeasuredModel(lam, {named("layers.0.heads"): torch.ones(2).double()}) for lam in (3.0, 3.0)]
    weights = node_weights(models, MaskFisherParameters(floor=0.0))(named("layers.0.heads"), TensorPlace("", 0.0))
    assert torch.equal(weights, torch.full((2, 2), 0.5).double())


def test_blocks_end_where_scoring_may_stop() -> None:
    assert block_ends(200) == [200]
    assert block_ends(256) == [256]
    assert block_ends(3000) == [256, 512, 1024, 2048, 3000]
    assert block_ends(4096) == [256, 512, 1024, 2048, 3072, 4096]
    assert looks(200) == [200]
    assert looks(5000) == [256, 512, 1024, 2048, 4096, 5000]
    assert set(looks(MOST_AUTO_EXAMPLES)) <= set(block_ends(MOST_AUTO_EXAMPLES))


@dataclass(frozen=True)
class Case:
    """A tiny model, and a file of rows for it."""

    checkpoint: Path
    loaded: LoadedModel
    file: Path

    def sample(self, rows: int = ROWS, *, labels: bool = False, **columns: Any) -> Sample:
        spec = dataset_spec(self.file, **columns)
        read = sample(RowFile(spec), spec, rows)
        return Sample(read, ROWS, spec, self.loaded, LabelMap(self.loaded.task) if labels else None)

    def measure(
        self,
        store: StatisticsStore,
        rows: int,
        measured: Measured | None = None,
        method: ScoringParameters | None = None,
    ) -> tuple[Measured, Sample]:
        """Scores of the first rows; the sample says how many of them were tokenised for it."""
        measurer = Measurer(method or MaskFisherParameters(), [], "float32", store, BatchSizes())
        own = self.sample(rows)
        return measurer.measure(measured or Measured(), self.loaded, "digest", own, rows, silent), own


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("stopping")
    checkpoint = tiny_checkpoint(root / "a", labels=3)
    file = write_rows(root / "a.jsonl", count=ROWS, labels=3)
    return Case(checkpoint, load(inspect_checkpoint(checkpoint, "a"), torch.device("cpu")), file)


def assert_same_bits(found: Measured, expected: Measured) -> None:
    one, other = found.of(NODE_FISHER), expected.of(NODE_FISHER)
    assert set(one) == set(other)
    assert len(one) == 5 * 2 * LAYERS
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_going_on_from_fewer_rows_gives_the_bits_of_all_at_once(case: Case, tmp_path: Path) -> None:
    with (
        StatisticsStore(tmp_path / "whole", 10**9) as at_once,
        StatisticsStore(tmp_path / "kept", 10**9) as kept,
        StatisticsStore(tmp_path / "forgetful", 0) as forgetful,  # removes what it kept before
    ):
        whole, _ = case.measure(at_once, ROWS)
        assert sorted(whole.sums) == [256, 512, ROWS]
        case.measure(kept, 512)
        rest, own = case.measure(kept, ROWS)
        assert own.truncated == (0, ROWS - 512)  # tokenised: those that were not measured yet
        assert not rest.cached
        assert sorted(rest.sums) == [256, 512, ROWS]
        assert_same_bits(rest, whole)
        measured = Measured()
        for rows in (256, 512, ROWS):
            measured, own = case.measure(forgetful, rows, measured)
        assert own.truncated == (0, ROWS - 512)
        assert_same_bits(measured, whole)


def test_what_is_kept_is_neither_measured_nor_tokenised_again(case: Case, tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        first, _ = case.measure(store, ROWS)
        again, own = case.measure(store, ROWS)
        assert (first.cached, again.cached) == (False, True)
        assert own.truncated == (0, 0)
        assert sorted(again.sums) == sorted(first.sums)
        assert_same_bits(again, first)
        fewer, own = case.measure(store, 512)
        assert (fewer.cached, own.truncated) == (True, (0, 0))


def test_scores_of_blocks_are_those_of_all_rows(case: Case, tmp_path: Path) -> None:
    """Mean, sums and standard errors as they follow from every row's own squares."""
    from worker.engine.scoring.estimators import Estimator
    from worker.engine.scoring.scorer import score

    with StatisticsStore(tmp_path, 10**9) as store:
        found, own = case.measure(store, ROWS)
        kept = dict(found.of(NODE_FISHER))
    examples = [example for block in own.blocks(0, ROWS) for example in block]
    assert [example.index for example in examples] == list(range(ROWS))
    each = [score(case.loaded, [e], Estimator("expected"), "float32", "rows", silent).total for e in examples]
    for site in each[0]:
        q = np.stack([of[site].numpy() for of in each])
        products = (q * q.mean(1, keepdims=True)).sum(0)
        for name, expected in ((".sum", q.sum(0)), (".sum_squares", (q**2).sum(0)), (".sum_products", products)):
            np.testing.assert_allclose(kept[f"{site}{name}"].numpy(), expected, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(kept[site].numpy(), q.mean(0), rtol=1e-4)


def test_the_address_of_a_statistic_follows_from_texts_and_tokenizer(case: Case, tmp_path: Path) -> None:
    def of(own: Sample, rows: int = 512, *, with_labels: bool = False) -> str:
        digest = own.digest(rows, with_labels=with_labels)
        return Facts(statistic=GRAM, checkpoint="c", rows=digest, tokens=own.tokens, precision="float32").address

    reference = of(case.sample())
    assert of(case.sample(rows=600)) == reference  # a prefix is a prefix, however many rows there are
    assert of(case.sample(labels=True)) == reference
    assert of(case.sample(max_length=1000)) == reference  # the model's own limit is less
    assert of(case.sample(labels=True), with_labels=True) != reference
    others = [of(case.sample(), rows=256), of(case.sample(max_length=20)), of(case.sample(seed=1))]
    lines = case.file.read_text().splitlines()
    changed = tmp_path / case.file.name
    changed.write_text("\n".join([*(json.dumps({**json.loads(line), "text": "one"}) for line in lines)]))
    others.append(of(Case(case.checkpoint, case.loaded, changed).sample()))
    for file, change in (("tokenizer.json", {"post_processor": None}), ("tokenizer_config.json", {"anything": 1})):
        copy = Path(shutil.copytree(case.checkpoint, tmp_path / file))
        edit_json(copy / file, **change)
        loaded = load(inspect_checkpoint(copy, "copy"), torch.device("cpu"))
        others.append(of(Case(copy, loaded, case.file).sample()))
    assert len({reference, *others}) == 1 + len(others)


def test_an_unknown_label_is_found_before_anything_is_tokenised(case: Case, tmp_path: Path) -> None:
    lines = case.file.read_text().splitlines()
    file = tmp_path / "wrong.jsonl"
    file.write_text("\n".join([*lines, '{"text": "one", "label": 7}']))
    with pytest.raises(InvalidDataset, match=r"wrong\.jsonl, line 701: label 7 is out of range"):
        Case(case.checkpoint, case.loaded, file).sample(ROWS + 1, labels=True)


@pytest.fixture(scope="module")
def pair(case: Case, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints with 700 and with 300 rows beside them."""
    root = tmp_path_factory.mktemp("pair")
    checkpoints = [Path(shutil.copytree(case.checkpoint, root / "a")), tiny_checkpoint(root / "b", seed=5)]
    shutil.copyfile(case.file, root / "a.jsonl")
    write_rows(root / "b.jsonl", count=300, seed=5)
    return checkpoints


def merge(pair: Sequence[Path], folder: Path, store: Path | None = None, **method: Any) -> Any:
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in pair]
    spec = merge_spec(folder, models, method)
    if store is not None:
        spec = spec.model_copy(update={"store": StoreSpec(folder=store, max_bytes=10**9)})
    done: list[int] = []
    result = Engine().merge(spec, lambda phase, count, *_: done.append(count) if phase == "scoring" else None)
    assert done == sorted(done)
    assert done[-1] == sum(model.examples for model in result.models)
    return result


def test_scoring_stops_where_the_weights_are_known_to_the_tolerance(pair: list[Path], tmp_path: Path) -> None:
    exact = merge(pair, tmp_path / "number", examples=ROWS).stopping
    assert (exact.tolerance, exact.reached) == (None, None)
    errors = {at.examples: at.error for at in exact.curve}
    assert list(errors) == [256, 512, ROWS]
    assert errors[256] > errors[512] > errors[ROWS] == 0


@pytest.mark.parametrize(("tolerance", "rows"), [(0.9, [256, 256]), (1e-6, [ROWS, 300])])
def test_auto_takes_as_many_rows_as_it_needs(
    pair: list[Path], tmp_path: Path, tolerance: float, rows: list[int]
) -> None:
    result = merge(pair, tmp_path / "auto", examples="auto", tolerance=tolerance)
    assert [model.examples for model in result.models] == rows
    assert (result.stopping.tolerance, result.stopping.reached) == (tolerance, True)
    assert result.stopping.curve[-1].error <= tolerance
    assert result.stopping.curve[-1].error == max(result.stopping.curve[-1].errors.values())
    assert len(result.stopping.curve[-1].errors) == 2 * LAYERS
    given = merge(pair, tmp_path / "given", examples=rows[0])
    for ours, theirs in zip(result.models, given.models, strict=True):
        assert 0 <= ours.weight_error <= tolerance
        if rows[0] == 256:
            assert (ours.weight_error, ours.weight_share) == (theirs.weight_error, theirs.weight_share)


@pytest.mark.parametrize("tolerance", [0.02, 1e-6])
def test_scores_without_a_merge_stop_for_each_model_where_its_merge_alone_would(
    pair: list[Path], tmp_path: Path, tolerance: float
) -> None:
    method = MaskFisherParameters(examples="auto", tolerance=tolerance, precision="float32")
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in pair]
    spec = ScoreSpec(name="scores", models=models, method=method, recipe={}, folder=tmp_path / "scores")
    found = Engine().score(spec, silent)
    report = (tmp_path / "scores" / "report.html").read_text()
    for path, model in zip(pair, found.models, strict=True):
        alone = merge([path], tmp_path / "merged" / path.name, examples="auto", tolerance=tolerance)
        assert model.stopping == alone.stopping
        assert model.stopping is not None
        assert model.stopping.reached
        assert model.examples == alone.models[0].examples == model.stopping.curve[-1].examples
        assert all(f"{look.error:.4f}" in report for look in model.stopping.curve)
    assert [model.examples for model in found.models] == ([ROWS, 300] if tolerance < 1e-3 else [512, 256])


def test_auto_measures_gram_matrices_on_the_rows_that_scoring_stopped_at(pair: list[Path], tmp_path: Path) -> None:
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in pair]
    method = {"name": "mask_regmean", "examples": "auto", "tolerance": 0.9}
    store = StoreSpec(folder=tmp_path / "store", max_bytes=10**9)
    for folder, asked in (("auto", method), ("given", {"name": "mask_regmean", "examples": 256})):
        spec = merge_spec(tmp_path / folder, models, asked).model_copy(update={"store": store})
        result = Engine().merge(spec, silent)
        assert [model.examples for model in result.models] == [256, 256]
        assert [model.score_cached for model in result.models] == [folder == "given"] * 2


def test_a_killed_merge_goes_on_where_it_was(pair: list[Path], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(phase: str, done: int, *_: object) -> None:
        if phase == "scoring" and done >= 600:
            raise Killed

    models = [model_spec(path, path.with_suffix(".jsonl")) for path in pair]
    store = StoreSpec(folder=tmp_path / "store", max_bytes=10**9)
    spec = merge_spec(tmp_path / "killed", models, {"examples": ROWS}).model_copy(update={"store": store})
    with pytest.raises(Killed):
        Engine().merge(spec, kill)
    done: list[int] = []
    again = spec.model_copy(update={"folder": tmp_path / "again"})
    Engine().merge(again, lambda phase, count, *_: done.append(count) if phase == "scoring" else None)
    assert done[1] == 512  # all at once: they were kept


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"tolerance": 0.1}, "tolerance says when examples 'auto' stops"),
        ({"tolerance": 0.1, "examples": 512}, "tolerance says when examples 'auto' stops"),
        ({"examples": "auto", "preset": "paper"}, "preset 'paper'"),
    ],
)
def test_what_has_no_sense_is_refused(method: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        MaskFisherParameters.model_validate(method)


def test_auto_is_for_methods_that_score_mask_nodes() -> None:
    with pytest.raises(ValidationError, match="regmean has none"):
        RegMeanParameters(examples="auto")
    method = MaskFisherParameters(examples="auto")
    assert (method.tolerance, method.most_examples) == (0.1, MOST_AUTO_EXAMPLES)
    assert MaskFisherParameters.model_validate(method.model_dump()) == method
    assert MaskFisherParameters.model_validate(MaskFisherParameters().model_dump()).tolerance is None


def test_the_curve_leaves_out_what_is_not_known() -> None:
    sums = statistics(squares(40, 256))
    one = NodeStatistics()
    one.add({site: torch.ones(1, nodes) for site, nodes in SITES.items()})
    model = Scored(1.0, {256: sums}, 1000)
    assert point(MaskFisherParameters(), [model, Scored(1.0, {1: one}, 1000)], 256, OWNED) is None
    exhausted = point(MaskFisherParameters(), [model, Scored(1.0, {1: one}, 1)], 256, OWNED)
    assert exhausted is not None
    assert exhausted.error > 0
