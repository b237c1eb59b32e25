"""Masked language models of every encoder: scores, merges and metrics against independent computations."""

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as CLASSES

from tests.score_names import assert_same_in_norm
from tests.siblings import (
    TOLERANCE,
    Siblings,
    assert_batches_do_not_matter,
    assert_same_model,
    examples_of,
    merged_with_itself,
    scores_by_masks,
    searched,
    write_objects,
)
from tests.tiny import (
    dataset_spec,
    edit_json,
    insert_masks,
    merge_spec,
    silent,
    tiny_checkpoint,
    tiny_texts,
)
from tests.tiny_families import TINY_FAMILIES, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, InvalidDataset
from worker.engine.catalog.tasks import task_of
from worker.engine.jobs.engine import Engine
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.scorer import score
from worker.engine.tasks import next_tokens
from worker.engine.tasks.drawing import uniform

WITH_HEAD = [name for name, family in TINY_FAMILIES.items() if family.model_type in CLASSES and not family.decoder]
"""The families of which the library has such a class."""
ROWS = 12


def spec_of(file: Path) -> DatasetSpec:
    return dataset_spec(file, label=None)


def made(root: Path, tiny: TinyFamily) -> Siblings:
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, task="MaskedLM")
        write_objects(root / f"{name}.jsonl", [{"text": text} for text in tiny_texts(ROWS, seed, longest=12)])
    return Siblings(tiny, root, AutoModelForMaskedLM, spec_of)


@pytest.fixture(scope="module", params=WITH_HEAD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp(request.param), TINY_FAMILIES[request.param])


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens at a time, so that every batch is cut."""
    monkeypatch.setitem(next_tokens.CHUNK_LOGITS, "cpu", 700)


def hidden_of(tokens: list[int], special: list[int]) -> list[int]:
    """The positions that are hidden: 15 % by draws that follow from the tokens, and one at least."""
    digest = hashlib.blake2b(struct.pack(f"<{len(tokens)}I", *tokens), digest_size=8).digest()
    draws = {p: uniform(int.from_bytes(digest, "little"), p) for p in range(len(tokens)) if tokens[p] not in special}
    return [p for p, draw in draws.items() if draw < 0.15] or [min(draws, key=lambda p: draws[p])]


def masked(case: Siblings, text: str) -> tuple[Tensor, list[int], list[int]]:
    """Tokens with masks, (1, tokens), the hidden positions, and what was there."""
    tokenizer = AutoTokenizer.from_pretrained(case.models["one"])
    tokens = tokenizer(text)["input_ids"]
    hidden = hidden_of(tokens, [tokenizer.cls_token_id, tokenizer.sep_token_id])
    found = [tokenizer.mask_token_id if place in hidden else token for place, token in enumerate(tokens)]
    return torch.tensor([found]), hidden, [tokens[place] for place in hidden]


def texts_of(case: Siblings, name: str = "one") -> list[str]:
    return [row["text"] for row in case.rows(name)]


def likelihood(model: Any, tokens: Tensor, hidden: list[int], labels: list[int]) -> Tensor:
    logp = model(input_ids=tokens).logits[0, hidden].log_softmax(-1)
    total: Tensor = logp.gather(1, torch.tensor(labels)[:, None]).sum()
    return total


def test_tokens_are_hidden_by_the_mask_alone(case: Siblings) -> None:
    loaded = case.loaded()
    for example, text in zip(examples_of(loaded, case.spec(), labelled=False), texts_of(case), strict=True):
        tokens, hidden, labels = masked(case, text)
        assert example.encoding["input_ids"] == tokens[0].tolist()
        assert (example.positions, example.label) == (tuple(hidden), tuple(labels))


def scores_one_by_one(case: Siblings, estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row at a time, no padding, float64."""
    free, model = case.exact(), case.exact()
    blocks = f"{model.base_model_prefix}.{case.tiny.layers.partition('.')[2]}"
    masks = insert_masks(model, replace(case.tiny, layers=blocks))

    def likelihoods() -> Iterator[list[tuple[float, Tensor]]]:
        for index, text in enumerate(texts_of(case)):
            tokens, hidden, labels = masked(case, text)
            if estimator.name == "sampled":
                with torch.no_grad():
                    p = free(input_ids=tokens).logits[0, hidden].softmax(-1)
                draws = [uniform(estimator.seed, index, place) for place in hidden]
                labels = [min(int((of.cumsum(0) <= d).sum()), len(of) - 1) for of, d in zip(p, draws, strict=True)]
            yield [(1.0, likelihood(model, tokens, hidden, labels))]

    return scores_by_masks(case.tiny, masks, likelihoods())


@pytest.mark.parametrize("name", ["sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Siblings, name: Any) -> None:
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    found = score(
        loaded, examples_of(loaded, case.spec(), labelled=False), estimator, "float32", "rows", silent
    ).scores()
    assert_same_in_norm(found, scores_one_by_one(case, estimator), TOLERANCE)


def test_scores_do_not_depend_on_batch_order_and_padding(case: Siblings) -> None:
    loaded = case.loaded()
    examples = examples_of(loaded, case.spec(), labelled=False)
    assert_batches_do_not_matter(loaded, examples, Estimator("sampled", 3))


def test_fisher_information_is_that_of_autograd(case: Siblings) -> None:
    """Of the head's tensors too; a matrix that is tied has the sum of both its uses."""
    loaded = case.loaded()
    found = fisher(
        loaded, examples_of(loaded, case.spec(), labelled=False)[:4], Estimator("empirical"), "float32", "rows", silent
    )
    model = case.exact()
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for text in texts_of(case)[:4]:
        gradients = torch.autograd.grad(
            likelihood(model, *masked(case, text)), list(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2 / 4
    assert set(found) == set(load_file(case.models["one"] / "model.safetensors"))
    for name in found.keys() & total.keys():
        expected = total[name]
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()) + 1e-9)


def test_a_model_merged_with_itself_is_itself(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    """By the method that measures masks and matrices of inputs."""
    folder = merged_with_itself(engine, tmp_path / "out", case, "mask_regmean")
    assert_same_model(folder / "model", case.models["one"])


@pytest.mark.parametrize("method", ["mask_fisher", "fisher", "regmean", "aligned_regmean"])
def test_by_another_method_it_is_itself_too(engine: Engine, tmp_path: Path, method: str) -> None:
    case = made(tmp_path, TINY_FAMILIES["bert"])
    folder = merged_with_itself(engine, tmp_path / "out", case, method)
    assert_same_model(folder / "model", case.models["one"])


def test_siblings_merge_with_their_heads_and_losses_are_those_of_transformers(
    case: Siblings, engine: Engine, tmp_path: Path
) -> None:
    assert_metric(case, engine, tmp_path, "perplexity")


def test_accuracy_is_that_of_transformers(engine: Engine, tmp_path: Path) -> None:
    assert_metric(made(tmp_path, TINY_FAMILIES["bert"]), engine, tmp_path, "token_accuracy")


def assert_metric(case: Siblings, engine: Engine, folder: Path, metric: str) -> None:
    specs = case.evaluated(metric, rows="")
    result = engine.merge(merge_spec(folder / "out", specs, evaluate=True), silent)
    _, report = AutoModelForMaskedLM.from_pretrained(folder / "out" / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert result.metrics is not None
    for name in case.models:
        for version, path in case.versions(name, folder / "out" / "model").items():
            model = case.exact(path)
            total, hits, count = 0.0, 0, 0
            for text in texts_of(case, name):
                tokens, hidden, labels = masked(case, text)
                with torch.no_grad():
                    logits = model(input_ids=tokens).logits[0, hidden]
                total -= float(logits.log_softmax(-1)[range(len(hidden)), labels].sum())
                hits += int((logits.argmax(-1) == torch.tensor(labels)).sum())
                count += len(hidden)
            wanted = math.exp(total / count) if metric == "perplexity" else hits / count
            assert getattr(result.metrics[name], version) == pytest.approx(wanted, rel=1e-4)


def test_auto_searches_on_hidden_tokens(engine: Engine, tmp_path: Path) -> None:
    case = made(tmp_path, TINY_FAMILIES["bert"])
    result = searched(engine, tmp_path / "out", case.evaluated("loss", rows=""))
    assert result.metrics is not None
    assert set(result.metrics) == set(case.models)


def test_the_default_draws_labels(tmp_path: Path) -> None:
    case = made(tmp_path, TINY_FAMILIES["bert"])
    assert estimator_for("auto", case.loaded().task, 0) == Estimator("sampled", 0)


def test_rows_and_tokenizers_without_anything_to_hide_are_refused(tmp_path: Path) -> None:
    case = made(tmp_path, TINY_FAMILIES["bert"])
    write_objects(tmp_path / "one.jsonl", [{"text": "one"}, {"text": " "}])
    with pytest.raises(InvalidDataset, match="line 2: it has no token that could be hidden"):
        examples_of(case.loaded(), case.spec(), labelled=False)
    write_objects(tmp_path / "one.jsonl", [{"text": "one"}])
    loaded = case.loaded()
    loaded.tokenizer.mask_token = None
    with pytest.raises(InvalidDataset, match="has no mask token"):
        examples_of(loaded, case.spec(), labelled=False)


def test_a_head_that_is_not_the_librarys_default_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", family=TINY_FAMILIES["deberta-v3"], task="MaskedLM")
    edit_json(folder / "config.json", legacy=False)
    error: type[EngineError] = InvalidCheckpoint
    with pytest.raises(error, match="legacy: false is not available yet"):
        task_of(inspect_checkpoint(folder, "m"))
