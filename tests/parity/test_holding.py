"""Models that are not held whole in float32 give the numbers of those that are, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_families import DECODERS, TINY_FAMILIES, TINY_LLAMA, TINY_MIXTURES, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.reader import digest_file
from worker.engine.evaluation.evaluate import predict
from worker.engine.inputs.examples import Example, plan_batches, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.models.weights import held
from worker.engine.runtime.device import Precision
from worker.engine.runtime.placeholders import is_placeholder
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import score
from worker.engine.tasks import EstimatorName

CPU = torch.device("cpu")
LESS = [Holding.STORED, Holding.STREAMED]
FORMS: dict[str, tuple[TinyFamily, str]] = {
    **{name: (TINY_FAMILIES[name], "SequenceClassification") for name in ("bert", "deberta-v2", "llama")},
    "bert with a masked head": (TINY_FAMILIES["bert"], "MaskedLM"),
    **{
        f"{name}, a language model": ({**DECODERS, **TINY_MIXTURES}[name], "CausalLM")
        for name in ("llama", "gpt2", "gemma3", "qwen3_moe")
    },
}
"""Norms before and after, relative positions, scaled embeddings, two tables of rotary positions, tied matrices."""


@dataclass(frozen=True)
class Case:
    folder: Path
    spec: EvaluationSpec

    def loaded(self, holding: Holding = Holding.WHOLE) -> LoadedModel:
        return load(inspect_checkpoint(self.folder, "local:model"), CPU, holding)

    def measured(self, loaded: LoadedModel, precision: Precision = "float32") -> dict[str, Tensor]:
        examples = self.examples(loaded)
        estimators: list[EstimatorName] = ["sampled"] if loaded.family.head.merges else ["expected", "sampled"]
        found = {}
        for name in estimators:
            estimator = estimator_for(name, loaded.task, seed=1)
            sums = score(loaded, examples, estimator, precision, "rows", lambda _: None).named()
            found.update({f"{name} {key}": value for key, value in sums.items()})
        inputs = plan_merge([loaded.info]).linear_inputs
        found |= grams(loaded, inputs, plan_batches(examples), precision, "rows", lambda _: None)
        predictions = predict(loaded, examples, precision, lambda _: None, self.spec)
        return {**found, "predictions": torch.from_numpy(predictions)}

    def examples(self, loaded: LoadedModel) -> list[Example]:
        rows = sample(RowFile(self.spec), self.spec, None, shuffle=False)
        return tokenize(rows, self.spec, loaded.tokenizer, loaded.max_length, None, reading=loaded.kind).examples


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("holding")
    tiny, task = FORMS[request.param]
    tiny_checkpoint(root / "model", family=tiny, labels=3, task=task, dtype=torch.bfloat16)
    text = "[MASK] {}" if task == "MaskedLM" else "{}"
    rows = write_lines(root / "rows.jsonl", [json.dumps({"text": text.format(one)}) for one in tiny_texts(9, 1)])
    metric: Any = "accuracy" if task == "SequenceClassification" else "loss"
    return Case(root / "model", EvaluationSpec(source="rows", path=rows, metric=metric))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_number_has_the_bits_that_it_has_where_the_model_is_held_whole(case: Case, precision: Precision) -> None:
    expected = case.measured(case.loaded(), precision)
    assert all(values.isfinite().all() for values in expected.values())
    for holding in LESS:
        found = case.measured(case.loaded(holding), precision)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == [], holding.name


def test_a_model_gives_its_memory_up_where_it_is(case: Case) -> None:
    loaded = case.loaded()
    expected, whole = case.measured(loaded), loaded.nbytes
    stored = loaded.held_as(Holding.STORED)
    layer = stored.model.get_submodule(loaded.family.layer_path(0).rstrip("."))
    assert all(map(is_placeholder, layer.parameters()))
    in_files = stored.nbytes
    assert in_files < 0.75 * whole
    streamed = stored.held_as(Holding.STREAMED)
    assert streamed.nbytes < 0.5 * in_files
    found = case.measured(streamed)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert all(map(is_placeholder, layer.parameters()))


@pytest.mark.parametrize("holding", Holding)
def test_other_weights_take_the_place_of_all_or_some(case: Case, holding: Holding, tmp_path: Path) -> None:
    loaded, doubled = case.loaded(holding), case.loaded()
    with torch.no_grad():
        for parameter in doubled.model.parameters():
            parameter.mul_(0.5)
    loaded.take({name: held(tensor.detach()) for name, tensor in doubled.model.named_parameters()})
    found, expected = case.measured(loaded), case.measured(doubled)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("task", ["SequenceClassification", "CausalLM"])
def test_a_job_has_the_same_result_however_its_models_are_held(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept heads are aligned and evaluated, language models are judged beside the base; and so is the plain average.

    One engine does all jobs, so that later ones find models that are held otherwise.
    """
    of_text = task == "CausalLM"
    for seed, name in enumerate(("base", "one", "two")):
        tiny_checkpoint(tmp_path / name, family=TINY_LLAMA, seed=seed, task=task, dtype=torch.bfloat16)
        rows = [{"text": text, "label": place % 2} for place, text in enumerate(tiny_texts(40, seed))]
        write_lines(tmp_path / f"{name}.jsonl", [json.dumps(row) for row in rows])
    columns = {} if of_text else {"label": "label"}
    metric: Any = "loss" if of_text else "accuracy"
    models = []
    for name in ("one", "two"):
        rows_of = {"source": name, "path": tmp_path / f"{name}.jsonl", **columns}
        held_out = EvaluationSpec(**{**rows_of, "path": tmp_path / "base.jsonl"}, metric=metric)
        model = model_spec(tmp_path / name, evaluation=held_out)
        models.append(model.model_copy(update={"dataset": DatasetSpec(**rows_of)}))
    found = []
    engine = Engine(CPU)
    for holding in Holding:
        monkeypatch.setattr("worker.engine.jobs.memory.holdings", lambda plan, method, one=holding: [one])
        spec = merge_spec(
            tmp_path / holding.name, models, {"name": "mask_regmean"}, evaluate=True, align_heads=not of_text
        )
        if of_text:
            spec = spec.model_copy(update={"base": CheckpointSpec(source="base", path=tmp_path / "base")})
        result = engine.merge(spec, silent)
        assert any("holding models in float32" in note for note in result.notes) is (holding is not Holding.WHOLE)
        weights = sorted(spec.folder.rglob("*.safetensors"))
        found.append((result.metrics, [(file.name, digest_file(file)) for file in weights]))
    assert found[0][1]
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("lm_head.weight", lambda table: table.clone(), None),
        ("lm_head.weight", lambda table: table + 1, "should be one matrix, and differ"),
        ("transformer.wte.weight", lambda table: table / 0, "wte.weight has values that are NaN or infinite"),
        ("transformer.wte.weight", lambda table: table[1:], "wte.weight has shape"),
        ("transformer.ln_f.weight", lambda table: None, "no tensor transformer.ln_f.weight"),
    ],
)
def test_what_cannot_be_held_in_parts_is_refused_by_name(
    tmp_path: Path, name: str, values: Callable[[Tensor], Tensor | None], problem: str | None
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family=DECODERS["gpt2"], task="CausalLM")
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors")}
    table = tensors["transformer.wte.weight"]
    assert table is not None
    tensors[name] = values(table)
    kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    info = inspect_checkpoint(folder, "local:model")
    if problem is None:
        assert load(info, CPU, Holding.STREAMED).holding is Holding.STREAMED
        return
    with pytest.raises(InvalidCheckpoint, match=problem):
        load(info, CPU, Holding.STREAMED)
