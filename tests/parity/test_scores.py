"""Scores against masks that are really there: one row at a time, no padding, float64, autograd for every label."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoTokenizer

from tests.score_names import named
from tests.tiny import (
    LAYERS,
    Tensors,
    dataset_spec,
    edit_json,
    edit_tensors,
    float64_model,
    insert_masks,
    silent,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import Row, RowFile, sample
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import Place
from worker.engine.catalog.tasks import Classification, LabelMap, Regression
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime.device import Precision
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.scorer import score
from worker.engine.scoring.statistics import NodeStatistics
from worker.engine.tasks.drawing import uniform

ROWS = 70
ENGINE_TOLERANCE = 1e-4  # of a score, float32 against float64
INVARIANCE = 1e-5  # relative in norm per layer and kind: what METHOD promises of float32


@dataclass(frozen=True)
class Case:
    """A tiny model with its rows, tokenised by the engine."""

    checkpoint: Path
    loaded: LoadedModel
    rows: list[Row]
    examples: list[Example]

    def score(
        self,
        estimator: Estimator | None = None,
        *,
        examples: list[Example] | None = None,
        batch: int | None = None,
        precision: Precision = "float32",
    ) -> NodeStatistics:
        """The engine's sums, in batches of `batch` rows in the given order, or as it plans them."""
        chosen = self.examples if examples is None else examples
        batches = None if batch is None else [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
        estimator = estimator or estimator_for("expected", self.loaded.task, seed=0)
        return score(self.loaded, chosen, estimator, precision, "rows", silent, batches)


def make_case(root: Path, *, labels: int, count: int = ROWS) -> Case:
    checkpoint = tiny_checkpoint(root / f"labels-{labels}", labels=labels, seed=labels)
    spec = dataset_spec(write_rows(root / f"labels-{labels}.jsonl", count=count, labels=labels, seed=labels))
    loaded = load(inspect_checkpoint(checkpoint, "tiny"), torch.device("cpu"))
    rows = sample(RowFile(spec), spec, None)
    tokenized = tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task))
    return Case(checkpoint, loaded, rows, tokenized.examples)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Case]:
    """By number of labels; one label is regression."""
    root = tmp_path_factory.mktemp("scores")
    return {labels: make_case(root, labels=labels) for labels in (1, 2, 3, 5)}


@pytest.fixture(scope="module")
def one_by_one(cases: dict[int, Case]) -> dict[int, dict[ScoreName, Tensor]]:
    """The engine's scores from batches of one row, by number of labels."""
    return {labels: case.score(batch=1).scores() for labels, case in cases.items()}


def squares(case: Case, rule: Literal["expected", "empirical"]) -> dict[ScoreName, Tensor]:
    """Each row's squared mask gradient, (rows, nodes) by score name.

    `expected`: the sum over labels of `p(y|x) (d log p(y|x) / dm)^2`; of a regression the squared derivative of the
    prediction. `empirical`: `(d log p(y|x) / dm)^2` for the row's own label.
    """
    model = float64_model(case.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(case.checkpoint)
    masks = insert_masks(model)
    found = []
    for row in case.rows:
        logits = model(**tokenizer(row.text, return_tensors="pt")).logits[0]
        if len(logits) == 1:
            weighted = [(torch.ones(()), logits[0])]
        else:
            likelihoods = logits.log_softmax(-1)
            labels = range(len(logits)) if rule == "expected" else [row.label]
            weights = likelihoods.detach().exp() if rule == "expected" else torch.ones(len(logits))
            weighted = [(weights[y], likelihoods[y]) for y in labels]
        total = [torch.zeros_like(mask) for mask in masks]
        for weight, output in weighted:
            for sum_, gradient in zip(total, torch.autograd.grad(output, masks, retain_graph=True), strict=True):
                sum_ += weight * gradient**2
        found.append(total)
    heads, neurons = (torch.stack(of_kind) for of_kind in zip(*found, strict=True))  # (rows, layers, nodes)
    return {
        named(f"layers.{i}.{kind}"): of_kind[:, i]
        for kind, of_kind in (("heads", heads), ("neurons", neurons))
        for i in range(LAYERS)
    }


def assert_same_in_norm(
    found: dict[ScoreName, Tensor], expected: dict[ScoreName, Tensor], tolerance: float = INVARIANCE
) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert float((found[name] - scores).norm() / scores.norm()) <= tolerance, name


def assert_each_score_close(found: dict[ScoreName, Tensor], expected: dict[ScoreName, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name].numpy(), scores.numpy(), rtol=ENGINE_TOLERANCE, atol=0, err_msg=name)


@pytest.mark.parametrize("labels", [1, 2, 3, 5])
def test_expected_scores_are_the_expectation_over_the_models_own_labels(cases: dict[int, Case], labels: int) -> None:
    case = cases[labels]
    expected = {name: q.mean(0) for name, q in squares(case, "expected").items()}
    assert_each_score_close(case.score().scores(), expected)


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_empirical_scores_are_squared_gradients_of_the_rows_own_labels(cases: dict[int, Case], labels: int) -> None:
    case = cases[labels]
    expected = {name: q.mean(0) for name, q in squares(case, "empirical").items()}
    assert_each_score_close(case.score(Estimator("empirical")).scores(), expected)


@pytest.mark.parametrize("gap", [0, 12, 35])
def test_expected_scores_do_not_depend_on_the_order_of_the_labels(tmp_path: Path, gap: float) -> None:
    """Whichever id the label has that the model is certain of, by `gap` in the logits."""
    found = []
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        case = make_case(tmp_path / str(order[0]), labels=3, count=20)

        def permute(tensors: Tensors, order: list[int] = order) -> None:
            tensors["classifier.bias"][0] += gap
            for part in ("weight", "bias"):
                tensors[f"classifier.{part}"] = tensors[f"classifier.{part}"][order].clone()

        edit_tensors(case.checkpoint, permute)
        loaded = load(inspect_checkpoint(case.checkpoint, "tiny"), torch.device("cpu"))
        found.append(replace(case, loaded=loaded).score().scores())
    assert_same_in_norm(found[1], found[0])
    assert_same_in_norm(found[2], found[0])


@pytest.mark.parametrize("labels", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [7, 64, None])
def test_scores_do_not_depend_on_batch_size(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], labels: int, batch: int | None
) -> None:
    assert_same_in_norm(cases[labels].score(batch=batch).scores(), one_by_one[labels])


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_do_not_depend_on_the_order_of_the_rows(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], labels: int
) -> None:
    case = cases[labels]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [case.examples[i] for i in order]
    assert_same_in_norm(case.score(examples=shuffled, batch=7).scores(), one_by_one[labels])


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_do_not_depend_on_padding(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], labels: int
) -> None:
    case = cases[labels]
    longest = case.loaded.max_length

    def padded(example: Example) -> Example:
        encoding = {n: [*v, *[0] * (longest - len(v))] for n, v in example.encoding.items()}
        return replace(example, encoding=encoding)

    fully_padded = [padded(example) for example in case.examples]
    assert_same_in_norm(case.score(examples=fully_padded, batch=7).scores(), one_by_one[labels])


def test_scores_do_not_depend_on_how_the_feed_forward_layers_are_chunked(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], tmp_path: Path
) -> None:
    """`chunk_size_feed_forward` saves memory in the forward pass, and calls a layer's second projection often."""
    case = cases[3]
    chunked = tiny_checkpoint(tmp_path / "chunked", labels=3, seed=3)
    edit_json(chunked / "config.json", chunk_size_feed_forward=1)
    loaded = load(inspect_checkpoint(chunked, "tiny"), torch.device("cpu"))
    assert_same_in_norm(replace(case, loaded=loaded).score().scores(), one_by_one[3])


def test_scores_do_not_depend_on_what_else_the_config_asks_the_model_to_return(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], tmp_path: Path
) -> None:
    case = cases[3]
    talkative = tiny_checkpoint(tmp_path / "talkative", labels=3, seed=3)
    edit_json(talkative / "config.json", return_dict=False, output_attentions=True, output_hidden_states=True)
    loaded = load(inspect_checkpoint(talkative, "tiny"), torch.device("cpu"))
    assert_same_in_norm(replace(case, loaded=loaded).score().scores(), one_by_one[3])


def test_the_same_batches_give_the_same_bits(cases: dict[int, Case]) -> None:
    first, again = cases[3].score().scores(), cases[3].score().scores()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("labels", [1, 3])
def test_one_row_of_one_word_has_scores(cases: dict[int, Case], labels: int) -> None:
    case = cases[labels]
    row = Row(Place("line", 1), "one", None, 0)
    spec = dataset_spec(Path("x"), label=None)
    tokenized = tokenize([row], spec, case.loaded.tokenizer, case.loaded.max_length, LabelMap(case.loaded.task))
    found = case.score(examples=tokenized.examples)
    expected = squares(replace(case, rows=[row]), "expected")
    assert found.examples == 1
    assert_each_score_close(found.scores(), {name: q[0] for name, q in expected.items()})


def test_sampled_scores_depend_neither_on_batches_nor_on_shards(cases: dict[int, Case]) -> None:
    case, estimator = cases[5], Estimator("sampled", seed=3)
    whole = case.score(estimator, batch=1)
    assert_same_in_norm(case.score(estimator, batch=7).scores(), whole.scores())
    assert_same_in_norm(case.score(estimator, examples=case.examples[::-1], batch=64).scores(), whole.scores())
    shards = [case.score(estimator, examples=case.examples[i::3]) for i in range(3)]
    shards[0].merge(shards[1])
    shards[0].merge(shards[2])
    assert_same_in_norm(shards[0].scores(), whole.scores())


def test_the_mean_of_sampled_scores_over_seeds_approaches_the_expected_scores(cases: dict[int, Case]) -> None:
    """Within five standard errors of the mean, at every node, where those are small against the scores."""
    case = cases[3]
    seeds = 100
    expected = case.score().scores()
    drawn = [case.score(Estimator("sampled", seed)).scores() for seed in range(seeds)]
    for name, scores in expected.items():
        of_seeds = torch.stack([of_seed[name] for of_seed in drawn])
        error = of_seeds.std(0) / seeds**0.5
        assert bool(((of_seeds.mean(0) - scores).abs() <= 5 * error).all()), name
        assert float(error.norm() / scores.norm()) < 0.15, name


def test_the_draws_of_sampled_are_uniform_and_differ_between_rows_and_seeds() -> None:
    draws = np.array([[uniform(seed, row) for row in range(1000)] for seed in range(10)])
    assert len(np.unique(draws)) == draws.size
    assert ((draws >= 0) & (draws < 1)).all()
    empirical = np.sort(draws.ravel())
    distance = np.abs(empirical - np.arange(1, draws.size + 1) / draws.size).max()
    assert distance < 1.63 / draws.size**0.5  # Kolmogorov-Smirnov at 1 %


def test_shards_add_up_to_the_whole(cases: dict[int, Case]) -> None:
    case = cases[3]
    whole = case.score(batch=10)
    shards = [case.score(examples=case.examples[i : i + 30], batch=10) for i in (0, 30, 60)]
    total = NodeStatistics()
    for shard in shards:
        total.merge(shard)
    assert total.examples == whole.examples == ROWS
    for found, expected in (
        (total.scores(), whole.scores()),
        (total.standard_errors(2 * ROWS), whole.standard_errors(2 * ROWS)),
    ):
        assert_same_in_norm(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("population", [ROWS, 2 * ROWS, 10**9])
def test_standard_errors_are_of_a_sample_without_replacement(cases: dict[int, Case], population: int) -> None:
    case = cases[3]
    errors = case.score().standard_errors(population)
    for name, q in squares(case, "expected").items():
        variance = np.var(q.numpy(), axis=0, ddof=1) / ROWS * (1 - ROWS / population)
        np.testing.assert_allclose(errors[name].numpy(), np.sqrt(variance), rtol=1e-3, atol=0, err_msg=name)


def test_one_example_has_no_standard_error_to_tell() -> None:
    statistics = NodeStatistics()
    statistics.add({named("layers.0.heads"): torch.tensor([[1.0, 2.0]])})
    assert statistics.standard_errors(10)[named("layers.0.heads")].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("labels", [1, 2, 3, 5])
def test_bfloat16_scores_rank_the_nodes_as_float32_scores_do(cases: dict[int, Case], labels: int) -> None:
    case = cases[labels]
    exact, rough = case.score().scores(), case.score(precision="bfloat16").scores()
    for name in (named(f"layers.{layer}.neurons") for layer in range(LAYERS)):  # four heads are too few to rank
        assert spearmanr(exact[name], rough[name])[0] >= 0.99, name
    assert spearmanr(torch.cat(list(exact.values())), torch.cat(list(rough.values())))[0] >= 0.99


@pytest.mark.parametrize(
    ("name", "labels", "chosen"),
    [
        ("auto", 2, "expected"),
        ("auto", 8, "expected"),
        ("auto", 9, "sampled"),
        ("expected", 9, "expected"),
        ("sampled", 2, "sampled"),
        ("empirical", 2, "empirical"),
        ("auto", 1, "expected"),
        ("expected", 1, "expected"),
        ("sampled", 1, "expected"),
    ],
)
def test_the_estimator_follows_from_its_name_and_the_number_of_labels(name: Any, labels: int, chosen: str) -> None:
    task = Classification(labels, {}) if labels > 1 else Regression(1, {})
    assert estimator_for(name, task, seed=0).name == chosen


def test_scoring_leaves_the_model_as_it_was(cases: dict[int, Case]) -> None:
    case = cases[2]
    before = {name: parameter.clone() for name, parameter in case.loaded.model.state_dict().items()}
    case.score()
    model = case.loaded.model
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("names", [["input_ids"], [], ["nope"]])
def test_scores_do_not_depend_on_what_the_tokenizer_says_the_model_reads(
    cases: dict[int, Case], one_by_one: dict[int, dict[ScoreName, Tensor]], tmp_path: Path, names: list[str]
) -> None:
    """A mask there must be: without one, the padding of a batch would be read as text."""
    silent_tokenizer = tiny_checkpoint(tmp_path / "silent", labels=3, seed=3)
    edit_json(silent_tokenizer / "tokenizer_config.json", model_input_names=names)
    loaded = load(inspect_checkpoint(silent_tokenizer, "tiny"), torch.device("cpu"))
    spec = dataset_spec(Path("rows.jsonl"))
    examples = tokenize(cases[3].rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples
    found = replace(cases[3], loaded=loaded, examples=examples).score()
    assert_same_in_norm(found.scores(), one_by_one[3])
