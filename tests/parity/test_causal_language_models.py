"""What every language model must do: scores, statistics, merges and metrics against independent computations."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.score_names import assert_same_in_norm
from tests.siblings import (
    TOLERANCE,
    Siblings,
    assert_batches_do_not_matter,
    assert_grams,
    assert_same_model,
    examples_of,
    scores_by_masks,
    write_objects,
)
from tests.tiny import (
    POSITIONS,
    insert_masks,
    merge_spec,
    model_spec,
    silent,
    tiny_base,
    tiny_checkpoint,
    tiny_texts,
)
from tests.tiny_adapters import merged_by_peft, save_adapter
from tests.tiny_families import DECODERS, TINY_LLAMA
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec, ModelSpec
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.jobs.engine import Engine
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import score
from worker.engine.tasks import next_tokens
from worker.engine.tasks.drawing import uniform

ROWS = 12
MEASURED = ("mask_fisher", "fisher", "regmean", "mask_regmean", "aligned_regmean")


def spec_of(file: Path) -> DatasetSpec:
    return DatasetSpec(source=file.stem, path=file)


@pytest.fixture(scope="module", params=DECODERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    """With matrices by themselves, and with fused ones that are stored as (inputs, outputs)."""
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def make_case(name: str, root: Path) -> Siblings:
    tiny = DECODERS[name]
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, task="CausalLM")
        write_objects(root / f"{name}.jsonl", [{"text": text} for text in tiny_texts(ROWS, seed)])
    return Siblings(tiny, root, AutoModelForCausalLM, spec_of)


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens at a time, so that every row is cut."""
    monkeypatch.setitem(next_tokens.CHUNK_LOGITS, "cpu", 700)


def drawn(p: Tensor, draw: float) -> int:
    """By the inverse of the whole distribution function."""
    return min(int((p.cumsum(0) <= draw).sum()), len(p) - 1)


def labels_of(model: Any, example: Example, estimator: Estimator) -> Tensor:
    """The labels of a row: its own next tokens, or tokens drawn from the model's own distributions."""
    tokens = example.encoding["input_ids"]
    if estimator.name == "empirical":
        return torch.tensor(tokens[1:])
    with torch.no_grad():
        p = model(input_ids=torch.tensor([tokens])).logits[0].softmax(-1)
    draws = [uniform(estimator.seed, example.index, position) for position in range(len(tokens) - 1)]
    return torch.tensor([drawn(p[position], draw) for position, draw in enumerate(draws)])


def likelihood(model: Any, example: Example, labels: Tensor) -> Tensor:
    tokens = torch.tensor([example.encoding["input_ids"]])
    logp = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    total: Tensor = logp.gather(1, labels[:, None]).sum()
    return total


def scores_one_by_one(case: Siblings, examples: list[Example], estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row at a time, no padding, float64."""
    free, model = case.exact(), case.exact()
    masks = insert_masks(model, case.tiny)
    rows = ([(1.0, likelihood(model, example, labels_of(free, example, estimator)))] for example in examples)
    return scores_by_masks(case.tiny, masks, rows)


@pytest.mark.parametrize("name", ["sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Siblings, name: Any) -> None:
    loaded = case.loaded()
    examples, estimator = examples_of(loaded, case.spec(), labelled=False), Estimator(name, seed=5)
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, scores_one_by_one(case, examples, estimator), TOLERANCE)


def test_the_default_draws_labels(case: Siblings) -> None:
    assert estimator_for("auto", case.loaded().task, 0) == Estimator("sampled", 0)


def test_scores_do_not_depend_on_the_batch(case: Siblings) -> None:
    loaded = case.loaded()
    examples = examples_of(loaded, case.spec(), labelled=False)
    assert_batches_do_not_matter(loaded, examples, Estimator("sampled", 3), TOLERANCE)


def test_fisher_information_is_that_of_autograd(case: Siblings) -> None:
    loaded = case.loaded()
    examples = examples_of(loaded, case.spec(), labelled=False)[:4]
    found = fisher(loaded, examples, Estimator("empirical"), "float32", "rows", silent)
    model = case.exact()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        labels = labels_of(model, example, Estimator("empirical"))
        gradients = torch.autograd.grad(likelihood(model, example, labels), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient**2 / len(examples)
    assert found.keys() == total.keys()
    for name, expected in total.items():
        least = max(1e-6 * float(expected.max()), 1e-10)  # softmax does not see some biases of keys
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-4, atol=least)


def test_only_the_target_of_a_prompt_has_labels(case: Siblings) -> None:
    loaded = case.loaded()
    file = write_objects(case.root / "prompts.jsonl", [{"text": "one two three", "more": " four five"}])
    spec = DatasetSpec(source="prompts", path=file, target="more")
    [example] = examples_of(loaded, spec, labelled=False)
    target = loaded.tokenizer(" four five", add_special_tokens=False)["input_ids"]
    assert example.label == tuple(target)
    last = len(example.encoding["input_ids"]) - 1
    assert example.positions == tuple(range(last - len(target), last))


def test_a_target_without_a_token_is_refused_by_its_row(case: Siblings) -> None:
    file = write_objects(case.root / "nothing.jsonl", [{"text": "one two", "more": ""}])
    with pytest.raises(InvalidDataset, match="nothing, line 1: no token is of its target"):
        examples_of(case.loaded(), DatasetSpec(source="nothing", path=file, target="more"), labelled=False)


def losses(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int, int]:
    """Summed loss, hits and tokens, a row at a time in float64."""
    total, hits, count = 0.0, 0, 0
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=POSITIONS)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        labels = tokens[0, 1:]
        total -= float(logits.log_softmax(-1).gather(1, labels[:, None]).sum())
        hits += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return total, hits, count


def test_losses_are_those_of_transformers(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    assert_metrics(case, engine, tmp_path, "loss")


@pytest.mark.parametrize("metric", ["perplexity", "token_accuracy"])
def test_metrics_are_those_of_transformers(form: Siblings, engine: Engine, tmp_path: Path, metric: str) -> None:
    assert_metrics(form, engine, tmp_path, metric)


def assert_metrics(case: Siblings, engine: Engine, folder: Path, metric: str) -> None:
    specs = []
    for name, model in case.models.items():
        evaluation = EvaluationSpec(**case.spec(name).model_dump(), metric=metric)
        specs.append(model_spec(model, None, evaluation=evaluation))
    result = engine.merge(merge_spec(folder / "out", specs, {"name": "average"}, evaluate=True), silent)
    assert result.metrics is not None
    for name, model in case.models.items():
        texts = [row["text"] for row in case.rows(name)]
        tokenizer = AutoTokenizer.from_pretrained(model)
        found = result.metrics[name]
        assert found.merged_kept_head is None
        values = {}
        for version, path in case.versions(name, folder / "out" / "model").items():
            total, hits, count = losses(case.exact(path), tokenizer, texts)
            loss = total / count
            values[version] = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": hits / count}[metric]
        assert found.expert == pytest.approx(values["expert"], rel=1e-4)
        assert found.merged == pytest.approx(values["merged"], rel=1e-4)
        better, worse = ("merged", "expert") if metric == "token_accuracy" else ("expert", "merged")
        kept = values[better] / values[worse] if values[worse] else None
        assert found.retention == (None if kept is None else pytest.approx(kept, rel=1e-3))


def test_a_model_merged_with_itself_is_itself(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    """By the method that measures masks and matrices of inputs."""
    assert_itself(case, engine, tmp_path, "mask_regmean")


@pytest.mark.parametrize("method", [method for method in MEASURED if method != "mask_regmean"])
def test_a_model_merged_with_itself_by_another_method_is_itself(
    form: Siblings, engine: Engine, tmp_path: Path, method: str
) -> None:
    assert_itself(form, engine, tmp_path, method)


def assert_itself(case: Siblings, engine: Engine, folder: Path, method: str) -> None:
    model = case.models["one"]
    specs = [
        model_spec(model, None, name=name, dataset=case.spec(rows))
        for name, rows in (("first", "one"), ("second", "two"))
    ]
    engine.merge(merge_spec(folder / "out", specs, {"name": method}), silent)
    assert_same_model(folder / "out" / "model", model)


def test_a_measured_merge_is_no_average_and_loads(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    """By the method that also runs each layer by itself."""
    assert_measured(case, engine, tmp_path, "aligned_regmean")


@pytest.mark.parametrize("method", [method for method in MEASURED if method != "aligned_regmean"])
def test_a_merge_measured_by_another_method_is_no_average_and_loads(
    form: Siblings, engine: Engine, tmp_path: Path, method: str
) -> None:
    assert_measured(form, engine, tmp_path, method)


def assert_measured(case: Siblings, engine: Engine, folder: Path, method: str) -> None:
    specs = [model_spec(model, None, dataset=case.spec(name)) for name, model in case.models.items()]
    result = engine.merge(merge_spec(folder / "out", specs, {"name": method}), silent)
    assert [model.examples for model in result.models] == [ROWS, ROWS]
    _, report = AutoModelForCausalLM.from_pretrained(folder / "out" / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    one, two, merged = (
        load_file(model / "model.safetensors") for model in (*case.models.values(), folder / "out" / "model")
    )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    assert any(not torch.allclose(merged[name], (one[name] + two[name]) / 2, atol=1e-4) for name in merged)


def test_the_ancestor_without_a_head_is_the_base(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family=case.tiny)
    specs = [model_spec(folder, None) for folder in case.models.values()]
    spec = merge_spec(tmp_path / "out", specs, {"name": "task_arithmetic", "scale": 0.25})
    of_base = {"source": "local:base", "path": base}
    engine.merge(type(spec).model_validate({**spec.model_dump(), "base": of_base}), silent)
    one, two, merged = (
        load_file(folder / "model.safetensors") for folder in (*case.models.values(), tmp_path / "out" / "model")
    )
    for name, tensor in load_file(base / "model.safetensors").items():
        own = f"{case.tiny.layers.partition('.')[0]}.{name}"
        expected = tensor / 2 + (one[own] + two[own]) / 4
        torch.testing.assert_close(merged[own], expected, rtol=0, atol=1e-5, msg=own)


def test_gram_matrices_are_those_of_the_inputs_of_linear_layers(case: Siblings) -> None:
    loaded = case.loaded()
    examples = examples_of(loaded, case.spec(), labelled=False)
    inputs = plan_merge([loaded.info]).linear_inputs
    found = grams(loaded, inputs, plan_batches(examples), "float32", "rows", silent)
    model = case.exact()
    rows = [torch.tensor([example.encoding["input_ids"]]) for example in examples]
    assert_grams(found, model, inputs, lambda: [model(input_ids=tokens) for tokens in rows])


@pytest.mark.parametrize("method", MEASURED)
def test_adapters_are_measured_as_the_models_that_peft_makes_of_them(
    engine: Engine, tmp_path: Path, method: str
) -> None:
    base = tiny_checkpoint(tmp_path / "base", family=TINY_LLAMA, seed=0, task="CausalLM")
    rows = write_objects(tmp_path / "rows.jsonl", [{"text": text} for text in tiny_texts(ROWS, 9)])
    dataset = DatasetSpec(source="rows", path=rows)
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    specs: dict[str, list[ModelSpec]] = {"adapters": [], "whole": []}
    for seed, name in enumerate(("one", "two"), start=1):
        adapter, whole = tmp_path / "adapters" / name, tmp_path / "whole" / name
        save_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, seed, **lora)
        merged_by_peft(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(whole)
        AutoTokenizer.from_pretrained(base).save_pretrained(whole)
        specs["adapters"].append(model_spec(adapter, dataset=dataset))
        specs["whole"].append(model_spec(whole, dataset=dataset))
    found = {}
    for kind, models in specs.items():
        spec = merge_spec(tmp_path / f"out-{kind}", models, {"name": method})
        engine.merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
        found[kind] = load_file(tmp_path / f"out-{kind}" / "model" / "model.safetensors")
    assert found["adapters"].keys() == found["whole"].keys()
    for name, tensor in found["whole"].items():
        torch.testing.assert_close(found["adapters"][name], tensor, rtol=1e-4, atol=1e-5)
