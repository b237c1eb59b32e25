"""What every model with an encoder and a decoder must do, against independent computations."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.score_names import assert_same_in_norm, by_name
from tests.tiny import (
    POSITIONS,
    edit_json,
    edit_tensors,
    insert_masks,
    merge_spec,
    model_spec,
    silent,
    tiny_base,
    tiny_checkpoint,
    tiny_texts,
    write_lines,
)
from tests.tiny_adapters import merged_by_peft, save_adapter
from tests.tiny_families import ENCODER_DECODERS, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec, ModelSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidDataset, NumericalError
from worker.engine.evaluation.evaluate import predict
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import score
from worker.engine.tasks import next_tokens
from worker.engine.tasks.drawing import uniform

ROWS = 12
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score in norm, float32 against float64
MEASURED = ("mask_fisher", "fisher", "regmean", "mask_regmean")
UNTIED = ("t5-gated", "mt5")
"""Families whose output layer is a matrix of its own here, as in T5 1.1 and mT5."""


@dataclass(frozen=True)
class Case:
    """Two models of one ancestor, `one` and `two`, with rows beside them."""

    tiny: TinyFamily
    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    def loaded(self, name: str = "one") -> LoadedModel:
        return load(inspect_checkpoint(self.root / name, name), CPU)

    def exact(self, name: str = "one") -> Any:
        """The model in float64, as transformers loads it."""
        return AutoModelForSeq2SeqLM.from_pretrained(self.root / name, dtype=torch.float64).eval()

    def rows(self, name: str = "one") -> DatasetSpec:
        return DatasetSpec(source=name, path=self.root / f"{name}.jsonl")

    @property
    def is_untied(self) -> bool:
        return any(self.tiny is ENCODER_DECODERS[name] for name in UNTIED)

    @property
    def masked(self) -> TinyFamily:
        """The family with the names of this class, of which T5's and mT5's have no prefix."""
        return self.tiny.under("") if self.tiny.model_type in ("t5", "mt5") else self.tiny


def made(root: Path, name: str) -> Case:
    for seed, model in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / model, family=ENCODER_DECODERS[name], seed=seed, task="Seq2SeqLM")
        if name in UNTIED:
            edit_json(root / model / "config.json", tie_word_embeddings=False, scale_decoder_outputs=None)
            edit_tensors(root / model, lambda t, s=seed: {**t, "lm_head.weight": untied(t["shared.weight"], s)})  # type: ignore[misc]
        texts, targets = tiny_texts(ROWS, seed, 20), tiny_texts(ROWS, seed + 7, 14)
        lines = [json.dumps({"text": text, "target": target}) for text, target in zip(texts, targets, strict=True)]
        write_lines(root / f"{model}.jsonl", lines)
    return Case(ENCODER_DECODERS[name], root)


def untied(shared: Tensor, seed: int) -> Tensor:
    return shared.flip(0) + 0.1 * torch.randn(shared.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(tmp_path_factory.mktemp("alone"), "bart")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens at a time, so that every row is cut."""
    monkeypatch.setitem(next_tokens.CHUNK_LOGITS, "cpu", 700)


def examples_of(case: Case, loaded: LoadedModel, spec: DatasetSpec | None = None) -> list[Example]:
    spec = spec or case.rows()
    kind = loaded.kind.evaluated(spec) if isinstance(spec, EvaluationSpec) else loaded.kind
    rows = sample(RowFile(spec, loaded.task.reader(getattr(spec, "metric", None))), spec, None, shuffle=False)
    return kind.tokenized(rows, spec, loaded.tokenizer, loaded.max_length, None).examples


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# Rows


def test_labels_are_the_targets_tokens_and_the_decoder_reads_them_as_transformers_shifts_them(case: Case) -> None:
    loaded = case.loaded()
    model: Any = loaded.model
    rows = read_rows(case.root / "one.jsonl")
    for example, row in zip(examples_of(case, loaded), rows, strict=True):
        assert example.encoding["input_ids"] == loaded.tokenizer(row["text"])["input_ids"]
        labels = loaded.tokenizer(text_target=row["target"])["input_ids"]
        assert example.label == tuple(labels)
        shifted = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([labels]))
        assert example.encoding["decoder_input_ids"] == shifted[0].tolist()
        assert example.positions == tuple(range(len(labels)))


REFUSED = {
    "an empty target": ({"text": "one two", "target": ""}, {}, "line 1: no token is of its target"),
    "a long target": ({"text": "one", "target": "one two " * 40}, {}, "line 1: its target has"),
    "a longer target than asked": ({"text": "one", "target": "one two three"}, {"max_length": 3}, "3 are allowed"),
    "no target": ({"text": "one two"}, {}, "no column 'target'"),
    "no text": ({"target": "one two"}, {}, "no column 'text'"),
    "no room": ({"text": "one", "target": "two"}, {"max_length": 2}, "are allowed|no room"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_rows_that_cannot_be_read_are_refused_by_their_place(bart: Case, tmp_path: Path, what: str) -> None:
    row, fields, said = REFUSED[what]
    file = write_lines(tmp_path / "rows.jsonl", [json.dumps(row)])
    with pytest.raises(InvalidDataset, match=said):
        examples_of(bart, bart.loaded(), DatasetSpec(source="rows", path=file, **fields))


def test_a_long_text_is_cut_and_noted(bart: Case, engine: Engine, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": "one " * 99, "target": "two"})] * 2)
    specs = [model_spec(f, None, dataset=DatasetSpec(source="rows", path=file)) for f in bart.models.values()]
    result = engine.merge(merge_spec(tmp_path / "out", specs), silent)
    assert any(f"2 of 2 rows of rows are longer than {POSITIONS} tokens" in note for note in result.notes)


@pytest.mark.parametrize("start", [None, True, 5000])
def test_a_model_without_a_start_token_is_refused_by_its_key(tmp_path: Path, start: int | None) -> None:
    case = made(tmp_path, "t5")
    edit_json(case.root / "one" / "config.json", decoder_start_token_id=start)
    loaded = case.loaded()
    writing = EvaluationSpec(source="rows", path=case.root / "one.jsonl", metric="exact_match", max_new_tokens=6)
    for spec in (None, writing):
        with pytest.raises(InvalidDataset, match="no usable decoder_start_token_id"):
            examples_of(case, loaded, spec)


# Scores and other statistics


def drawn(p: Tensor, draw: float) -> int:
    """By the inverse of the whole distribution function."""
    return min(int((p.cumsum(0) <= draw).sum()), len(p) - 1)


def logp_of(model: Any, example: Example) -> Tensor:
    """Of every token at each of the decoder's positions."""
    inputs = {name: torch.tensor([example.encoding[name]]) for name in ("input_ids", "decoder_input_ids")}
    found: Tensor = model(**inputs).logits[0].log_softmax(-1)
    return found


def labels_of(model: Any, example: Example, estimator: Estimator) -> Tensor:
    if estimator.name == "empirical":
        return torch.tensor(example.label)
    with torch.no_grad():
        p = logp_of(model, example).exp()
    return torch.tensor([drawn(row, uniform(estimator.seed, example.index, at)) for at, row in enumerate(p)])


def likelihood(model: Any, example: Example, labels: Tensor) -> Tensor:
    return logp_of(model, example).gather(1, labels[:, None]).sum()


@pytest.mark.parametrize("name", ["sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Case, name: Any) -> None:
    """A row at a time, no padding, float64."""
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    examples = examples_of(case, loaded)
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    free, model = case.exact(), case.exact()
    masks = insert_masks(model, case.masked)
    total = [torch.zeros_like(mask) for mask in masks]
    for example in examples:
        gradients = torch.autograd.grad(likelihood(model, example, labels_of(free, example, estimator)), masks)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient**2 / len(examples)
    assert "decoder.layers.1.cross_heads" in found
    assert_same_in_norm(found, by_name(case.masked, total), TOLERANCE)


def test_the_default_draws_labels(case: Case) -> None:
    assert estimator_for("auto", case.loaded().task, 0) == Estimator("sampled", 0)


def test_scores_do_not_depend_on_the_batch(case: Case) -> None:
    loaded, estimator = case.loaded(), Estimator("sampled", 3)
    examples = examples_of(case, loaded)

    def scores(batches: list[list[Example]]) -> dict[ScoreName, Tensor]:
        return score(loaded, examples, estimator, "float32", "rows", silent, batches).scores()

    assert_same_in_norm(scores([examples]), scores([[one] for one in reversed(examples)]), TOLERANCE)


def test_fisher_information_is_that_of_autograd(case: Case) -> None:
    loaded = case.loaded()
    examples = examples_of(case, loaded)[:3]
    found = fisher(loaded, examples, Estimator("empirical"), "float32", "rows", silent)
    model = case.exact()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        labels = torch.tensor(example.label)
        gradients = torch.autograd.grad(likelihood(model, example, labels), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient**2 / len(examples)
    assert found.keys() - total.keys() <= {"final_logits_bias"}  # which is no parameter
    assert total.keys() <= found.keys()
    for name, expected in total.items():
        least = max(1e-6 * float(expected.max()), 1e-10)  # softmax does not see the biases of keys
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=least)


def test_gram_matrices_are_those_of_the_inputs_of_linear_layers(case: Case) -> None:
    loaded = case.loaded()
    examples = examples_of(case, loaded)
    inputs = plan_merge([loaded.info]).linear_inputs
    found = grams(loaded, inputs, plan_batches(examples), "float32", "rows", silent)
    model = case.exact()
    seen: dict[str, list[Tensor]] = {one.name: [] for one in inputs}
    for one in inputs:
        see = seen[one.name].append
        model.get_submodule(one.module).register_forward_pre_hook(lambda _, args, see=see: see(args[0].flatten(0, -2)))
    for example in examples:
        with torch.no_grad():
            logp_of(model, example)
    assert found.keys() == seen.keys()
    assert {"decoder.layers.0.encoded", "decoder.layers.0.cross_attention"} <= found.keys()
    for name, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


# Metrics


@pytest.mark.parametrize("metric", ["perplexity", "token_accuracy"])
def test_metrics_are_those_of_transformers(case: Case, engine: Engine, tmp_path: Path, metric: str) -> None:
    specs = []
    for name, folder in case.models.items():
        evaluation = EvaluationSpec(source=name, path=case.root / f"{name}.jsonl", metric=metric)
        specs.append(model_spec(folder, None, evaluation=evaluation))
    result = engine.merge(merge_spec(tmp_path / "out", specs, {"name": "average"}, evaluate=True), silent)
    assert result.metrics is not None
    for name, folder in case.models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for version, at in {"expert": folder, "merged": tmp_path / "out" / "model"}.items():
            model = AutoModelForSeq2SeqLM.from_pretrained(at, dtype=torch.float64).eval()
            loss, hits, count = 0.0, 0, 0
            for row in read_rows(case.root / f"{name}.jsonl"):
                labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    output = model(**tokenizer(row["text"], return_tensors="pt"), labels=labels)
                loss += float(output.loss) * labels.numel()
                hits += int((output.logits.argmax(-1) == labels).sum())
                count += labels.numel()
            expected = math.exp(loss / count) if metric == "perplexity" else hits / count
            assert getattr(result.metrics[name], version) == pytest.approx(expected, rel=1e-4)


def test_exact_match_is_of_what_transformers_writes(case: Case, tmp_path: Path) -> None:
    """Rows of different lengths at once, whatever the checkpoint's settings of generation are."""
    loaded, model = case.loaded(), case.exact()
    rows = read_rows(case.root / "one.jsonl")
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6, "forced_eos_token_id": None}
    written = []
    for row in rows:
        tokens = model.generate(**loaded.tokenizer(row["text"], return_tensors="pt"), **settings)
        written.append(loaded.tokenizer.decode(tokens[0], skip_special_tokens=True))
    targets = [text if place % 2 else f"{text} not" for place, text in enumerate(written)]
    lines = [json.dumps({"text": row["text"], "target": t}) for row, t in zip(rows, targets, strict=True)]
    file = write_lines(tmp_path / "rows.jsonl", lines)
    spec = EvaluationSpec(source="rows", path=file, metric="exact_match", max_new_tokens=6)
    found = predict(loaded, examples_of(case, loaded, spec), "float32", silent, spec)
    assert len({*written}) > 1
    assert found[:, 0].tolist() == [float(place % 2) for place in range(len(rows))]
    too_many = EvaluationSpec(source="rows", path=file, metric="exact_match")
    with pytest.raises(InvalidDataset, match="max_new_tokens is 256"):
        examples_of(case, loaded, too_many)


def test_choices_are_ranked_as_the_harness_ranks_them(case: Case, tmp_path: Path) -> None:
    if case.is_untied:
        pytest.skip("the harness ties both matrices")
    draws = tiny_texts(40, 3, 5)
    rows = [{"text": f"{draws[4 * n]} ", "choices": draws[4 * n + 1 : 4 * n + 4], "label": n % 3} for n in range(10)]
    file = write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    spec = EvaluationSpec(source="rows", path=file, choices="choices", label="label", metric="choice_accuracy")
    loaded = case.loaded()
    found = predict(loaded, examples_of(case, loaded, spec), "float32", silent, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library and those that it needs warn of
        model = AutoModelForSeq2SeqLM.from_pretrained(case.models["one"], dtype=torch.float32)
        harness = HFLM(
            pretrained=model, backend="seq2seq", tokenizer=loaded.tokenizer, batch_size=4, device="cpu", max_length=48
        )
        for row, (is_right, margin, _) in zip(rows, found, strict=True):
            encoded = [harness._encode_pair(str(row["text"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
            requests = [((row["text"], choice), *pair) for choice, pair in zip(row["choices"], encoded, strict=True)]  # type: ignore[call-overload]
            scores = [likelihood_ for likelihood_, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
            right = scores.pop(row["label"])  # type: ignore[arg-type]
            assert margin == pytest.approx(right - max(scores), abs=1e-3)
            assert is_right == (right > max(scores))


# Merging


def merged(engine: Engine, folder: Path, models: list[ModelSpec], method: str, base: Path | None = None) -> Path:
    spec = merge_spec(folder, models, {"name": method})
    if base is not None:
        spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    engine.merge(spec, silent)
    return folder / "model"


def test_a_model_merged_with_itself_is_itself(case: Case, engine: Engine, tmp_path: Path) -> None:
    assert_itself(case, engine, tmp_path, "mask_regmean")


@pytest.mark.parametrize("method", [method for method in MEASURED if method != "mask_regmean"])
def test_by_another_method_it_is_itself_too(bart: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    assert_itself(bart, engine, tmp_path, method)


def assert_itself(case: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    folder = case.models["one"]
    specs = [model_spec(folder, None, name=name, dataset=case.rows(name)) for name in case.models]
    result = merged(engine, tmp_path / "out", specs, method)
    own, found = (load_file(where / "model.safetensors") for where in (folder, result))
    assert own.keys() == found.keys()
    assert [name for name, tensor in own.items() if not torch.equal(tensor, found[name])] == []


def test_a_measured_merge_is_no_average_and_loads(case: Case, engine: Engine, tmp_path: Path) -> None:
    assert_measured(case, engine, tmp_path, "mask_regmean")


@pytest.mark.parametrize("method", [method for method in MEASURED if method != "mask_regmean"])
def test_by_another_method_it_is_no_average_too(bart: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    assert_measured(bart, engine, tmp_path, method)


def assert_measured(case: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    specs = [model_spec(folder, None, dataset=case.rows(name)) for name, folder in case.models.items()]
    result = merged(engine, tmp_path / "out", specs, method)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(result, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    one, two, found = (load_file(folder / "model.safetensors") for folder in (*case.models.values(), result))
    assert ("lm_head.weight" in found) == case.is_untied
    output = found.get("lm_head.weight", found.get("shared.weight", found.get("model.shared.weight")))
    assert torch.equal(model.get_output_embeddings().weight, output)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    for what in ("q", "out_proj", "o"):
        names = [name for name in found if name.endswith(f".{what}.weight")]
        average = {name: (one[name] + two[name]) / 2 for name in names}
        assert not names or any(not torch.allclose(found[name], average[name], atol=1e-4) for name in names)


def test_the_ancestor_without_a_head_is_the_base(case: Case, engine: Engine, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family=case.tiny)
    specs = [model_spec(folder, None) for folder in case.models.values()]
    spec = merge_spec(tmp_path / "out", specs, {"name": "task_arithmetic", "scale": 0.25})
    engine.merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
    folders = (*case.models.values(), tmp_path / "out" / "model")
    one, two, found = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in load_file(base / "model.safetensors").items():
        own = name if name in found else f"model.{name}"
        expected = tensor / 2 + (one[own] + two[own]) / 4
        torch.testing.assert_close(found[own], expected, rtol=0, atol=1e-5, msg=own)


def test_auto_searches_by_a_metric_of_targets(bart: Case, engine: Engine, tmp_path: Path) -> None:
    specs = []
    for seed, (name, folder) in enumerate(bart.models.items()):
        texts, targets = tiny_texts(40, seed + 20, 12), tiny_texts(40, seed + 30, 9)
        lines = [json.dumps({"text": text, "target": target}) for text, target in zip(texts, targets, strict=True)]
        evaluation = EvaluationSpec(source=name, path=write_lines(tmp_path / f"{name}.jsonl", lines), metric="loss")
        specs.append(model_spec(folder, None, dataset=bart.rows(name), evaluation=evaluation))
    candidates = [{"name": "average"}, {"name": "mask_regmean"}]
    method = {"name": "auto", "trials": 3, "candidates": candidates}
    result = engine.merge(merge_spec(tmp_path / "out", specs, method, evaluate=True), silent)
    assert result.candidates is not None
    assert result.metrics is not None
    [chosen] = [candidate for candidate in result.candidates if candidate.chosen]
    for name, metric in result.metrics.items():
        assert chosen.metrics[name].value == metric.merged


def test_a_model_whose_gradients_are_all_0_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    """Its output layer, which is its embeddings, gives every token the same logit."""
    case = made(tmp_path / "made", "bart")
    edit_tensors(case.models["one"], lambda t: {n: 0 * v if n == "model.shared.weight" else v for n, v in t.items()})
    specs = [model_spec(folder, None, dataset=case.rows(name)) for name, folder in case.models.items()]
    with pytest.raises(NumericalError, match=f"all gradients of one are 0 on its {ROWS} rows of one"):
        merged(engine, tmp_path / "no", specs, "mask_fisher")


@pytest.mark.parametrize("name", ["t5", UNTIED[0], "bart"])
def test_adapters_are_measured_as_the_models_that_peft_makes_of_them(engine: Engine, tmp_path: Path, name: str) -> None:
    case = made(tmp_path / "made", name)
    base = case.models["one"]
    targets = ["q_proj", "v_proj", "fc2"] if name == "bart" else ["q", "v", "wo"]
    specs: dict[str, list[ModelSpec]] = {"adapters": [], "whole": []}
    for seed, model in enumerate(("a", "b"), start=1):
        adapter, whole = tmp_path / "adapters" / model, tmp_path / "whole" / model
        lora = {"task_type": "SEQ_2_SEQ_LM", "target_modules": targets}
        save_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), adapter, seed, **lora)
        merged_by_peft(AutoModelForSeq2SeqLM.from_pretrained(base), adapter).save_pretrained(whole)
        AutoTokenizer.from_pretrained(base).save_pretrained(whole)
        specs["adapters"].append(model_spec(adapter, dataset=case.rows()))
        specs["whole"].append(model_spec(whole, dataset=case.rows()))
    found = {
        kind: load_file(merged(engine, tmp_path / f"out-{kind}", models, "mask_fisher", base) / "model.safetensors")
        for kind, models in specs.items()
    }
    assert found["adapters"].keys() == found["whole"].keys()
    for tensor, expected in found["whole"].items():
        torch.testing.assert_close(found["adapters"][tensor], expected, rtol=1e-4, atol=1e-5)
