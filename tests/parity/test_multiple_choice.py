"""Choices of which one is right: scores, statistics, merges and metrics against independent computations."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as CLASSES

from tests.score_names import assert_same_in_norm
from tests.siblings import (
    TOLERANCE,
    Siblings,
    assert_batches_do_not_matter,
    assert_grams,
    assert_same_model,
    assert_squares,
    examples_of,
    merged_with_itself,
    scores_by_masks,
    searched,
    write_objects,
)
from tests.tiny import (
    dataset_spec,
    insert_masks,
    merge_spec,
    silent,
    tiny_checkpoint,
)
from tests.tiny_families import OF_EACH_FORM, TINY_FAMILIES, WORDS, TinyFamily
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.evaluation.metrics import bootstrap
from worker.engine.inputs.examples import plan_batches
from worker.engine.jobs.engine import Engine
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import paper_scores, score
from worker.engine.tasks.drawing import uniform

WITH_HEAD = [name for name in OF_EACH_FORM if TINY_FAMILIES[name].model_type in CLASSES]
"""Families of each form of which the library has such a class."""
ROWS = 20
Row = dict[str, Any]


def rows_of(seed: int, count: int = ROWS) -> list[Row]:
    """Of two to four choices each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(rng.randint(2, 4))]
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        rows.append({"text": text, "choices": choices, "label": rng.randrange(len(choices))})
    return rows


def made(root: Path, tiny: TinyFamily) -> Siblings:
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, task="MultipleChoice")
        write_objects(root / f"{name}.jsonl", rows_of(seed))
        write_objects(root / f"{name}-held-out.jsonl", rows_of(10 + seed))
    return Siblings(tiny, root, AutoModelForMultipleChoice)


@pytest.fixture(scope="module", params=WITH_HEAD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp(request.param), TINY_FAMILIES[request.param])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp("bert-alone"), TINY_FAMILIES["bert"])


def logits_of(model: Any, tokenizer: Any, row: Row) -> Tensor:
    """Of a row's choices, each in a pass of its own, without padding."""
    found = []
    for choice in row["choices"]:
        encoded = tokenizer(row["text"], choice, return_tensors="pt")
        taken = {n: encoded[n][None] for n in ("input_ids", "token_type_ids", "attention_mask") if n in encoded}
        if getattr(model.config, "type_vocab_size", 0) < 2:
            taken.pop("token_type_ids", None)
        found.append(model(**taken).logits[0, 0])
    return torch.stack(found)


def scores_one_by_one(case: Siblings, estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row and a choice at a time, float64."""
    model, tokenizer = case.exact(), AutoTokenizer.from_pretrained(case.models["one"])
    masks = insert_masks(model, case.tiny)

    def likelihoods() -> Iterator[list[tuple[float, Tensor]]]:
        for index, row in enumerate(case.rows()):
            logp = logits_of(model, tokenizer, row).log_softmax(0)
            p = logp.detach().exp()
            drawn = int((p.cumsum(0)[:-1] <= uniform(estimator.seed, index)).sum())
            yield {
                "expected": [(float(p[choice]), logp[choice]) for choice in range(len(p))],
                "sampled": [(1.0, logp[drawn])],
                "empirical": [(1.0, logp[row["label"]])],
            }[estimator.name]

    return scores_by_masks(case.tiny, masks, likelihoods())


@pytest.mark.parametrize("name", ["expected", "sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Siblings, name: Any) -> None:
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    found = score(loaded, examples_of(loaded, case.spec()), estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, scores_one_by_one(case, estimator), TOLERANCE)


@pytest.mark.parametrize("name", ["expected", "sampled"])
def test_scores_do_not_depend_on_batch_order_and_padding(case: Siblings, name: Any) -> None:
    loaded, estimator = case.loaded(), Estimator(name, 3)
    assert_batches_do_not_matter(loaded, examples_of(loaded, case.spec()), estimator)


def test_gram_matrices_are_those_of_every_choice(case: Siblings) -> None:
    loaded = case.loaded()
    inputs = plan_merge([loaded.info]).linear_inputs
    batches = plan_batches(examples_of(loaded, case.spec()))
    found = grams(loaded, inputs, batches, "float32", "rows", silent)
    model, tokenizer = case.exact(), AutoTokenizer.from_pretrained(case.models["one"])
    assert_grams(found, model, inputs, lambda: [logits_of(model, tokenizer, row) for row in case.rows()])


@pytest.mark.parametrize("method", ["mask_fisher", "fisher", "aligned_regmean"])
def test_a_model_merged_with_itself_is_itself(case: Siblings, engine: Engine, tmp_path: Path, method: str) -> None:
    folder = merged_with_itself(engine, tmp_path / "out", case, method)
    for name in ("first", "second"):
        assert_same_model(folder / "models" / name, case.models["one"])


@pytest.mark.parametrize("method", ["mask_fisher", "aligned_regmean"])
def test_siblings_keep_their_heads_and_are_evaluated(
    case: Siblings, engine: Engine, tmp_path: Path, method: str
) -> None:
    """Accuracy of the published models, choice by choice."""
    models = case.evaluated("accuracy")
    spec = merge_spec(tmp_path / "out", models, {"name": method}, evaluate=True, align_heads=True)
    result = engine.merge(spec, silent)
    assert result.metrics is not None
    assert [model.aligned_examples for model in result.models] == [ROWS, ROWS]
    for name in case.models:
        rows = case.rows(f"{name}-held-out")
        for version, path in case.versions(name, tmp_path / "out" / "models" / name).items():
            model, tokenizer = case.exact(path), AutoTokenizer.from_pretrained(path)
            with torch.no_grad():
                hits = [int(logits_of(model, tokenizer, row).argmax()) == row["label"] for row in rows]
            assert getattr(result.metrics[name], version) == pytest.approx(sum(hits) / ROWS, abs=1e-9)


def test_auto_searches_on_choices(bert: Siblings, engine: Engine, tmp_path: Path) -> None:
    result = searched(engine, tmp_path / "out", bert.evaluated("accuracy"))
    assert result.metrics is not None
    assert set(result.metrics) == set(bert.models)


def test_the_published_rule_takes_the_models_own_loss(bert: Siblings) -> None:
    loaded = bert.loaded()
    model, tokenizer = bert.exact(), AutoTokenizer.from_pretrained(bert.models["one"])
    masks = insert_masks(model, bert.tiny)
    losses = []
    for row in bert.rows():
        encoded = tokenizer([row["text"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        inputs = {name: values[None] for name, values in encoded.items()}
        losses.append(model(**inputs, labels=torch.tensor([row["label"]])).loss)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), masks)
    found = paper_scores(loaded, examples_of(loaded, bert.spec()), "rows", silent)
    assert_squares(found, gradients)


def test_intervals_are_those_of_accuracy_on_the_same_resamples(bert: Siblings) -> None:
    rng = np.random.default_rng(1)
    labels, predicted = (rng.integers(0, 4, 40).astype(float) for _ in range(2))
    found = bootstrap("accuracy", bert.loaded().task, labels, [predicted], 7)
    again = np.random.default_rng(7)
    for resample in range(20):
        rows = again.integers(0, 40, 40)
        assert found[0, resample] == pytest.approx((labels[rows] == predicted[rows]).mean(), abs=1e-12)


def test_choices_may_begin_with_the_same_text(bert: Siblings, tmp_path: Path) -> None:
    loaded = bert.loaded()
    apart = {"text": "one", "start": "two", "choices": ["three four", "five"], "label": "five"}
    whole = {"text": "one", "choices": ["two three four", "two five"], "label": 1}
    found = examples_of(loaded, dataset_spec(write_objects(tmp_path / "apart.jsonl", [apart]), text_pair="start"))
    expected = examples_of(loaded, dataset_spec(write_objects(tmp_path / "whole.jsonl", [whole])))
    assert [(e.inputs, e.label) for e in found] == [(e.inputs, e.label) for e in expected]


GOOD = {"text": "one", "choices": ["two", "three"], "label": 1}
REFUSED: dict[str, tuple[Row, list[str]]] = {
    "no choices": ({"text": "one", "label": 1}, ["no column 'choices'"]),
    "one choice": ({**GOOD, "choices": ["two"]}, ["column 'choices' is no list of two or more texts"]),
    "an empty choice": ({**GOOD, "choices": ["two", ""]}, ["column 'choices' has an empty text"]),
    "too many choices": ({**GOOD, "choices": ["two"] * 1001}, ["it has 1001 choices"]),
    "a choice that is none": ({**GOOD, "choices": ["two", None]}, ["column 'choices' is not text"]),
    "a label out of range": ({**GOOD, "label": 2}, ["the choices are 0 to 1"]),
    "a label of no choice": ({**GOOD, "label": "four"}, ["neither the place of a choice"]),
    "no label": ({**GOOD, "label": None}, ["neither the place of a choice"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_are_none_are_refused_by_line(bert: Siblings, tmp_path: Path, fault: str) -> None:
    row, words = REFUSED[fault]
    loaded, spec = bert.loaded(), dataset_spec(write_objects(tmp_path / "rows.jsonl", [GOOD, row]))
    with pytest.raises(InvalidDataset) as caught:
        examples_of(loaded, spec)
    assert all(word in caught.value.message for word in ["line 2", *words]), caught.value.message


def test_the_default_is_the_expectation(bert: Siblings) -> None:
    assert estimator_for("auto", bert.loaded().task, 0) == Estimator("expected", 0)
