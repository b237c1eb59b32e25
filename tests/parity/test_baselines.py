"""What a merge of language models is compared with: the base, and the best single expert."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import edit_json, merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_families import DECODERS
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.jobs.engine import Engine

NAMES = ("one", "two", "three")
ROWS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts and their base. The second is on nobody's side: it is evaluated on texts that `three` writes."""
    root = tmp_path_factory.mktemp("baselines")
    for seed, name in enumerate(("base", *NAMES)):
        tiny_checkpoint(root / name, family=DECODERS["llama"], seed=seed, task="CausalLM")
    for seed, name in enumerate(NAMES):
        texts = tiny_texts(ROWS, seed)
        if name == "two":
            texts = [written(root / "three", " ".join(text.split()[:4])) for text in texts]
        write_lines(root / f"{name}.jsonl", [json.dumps({"text": text}) for text in texts])
    return root


def written(folder: Path, text: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=20, pad_token_id=3)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def perplexity(folder: Path, file: Path) -> float:
    """By transformers, a row at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in file.read_text().splitlines():
        tokens = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    return math.exp(total / count)


def merged(inputs: Path, out: Path, base: Path | None, metric: Any = "perplexity", **method: Any) -> MergeResult:
    specs = []
    for name in NAMES:
        evaluation = EvaluationSpec(source=name, path=inputs / f"{name}.jsonl", metric=metric)
        specs.append(model_spec(inputs / name, None, evaluation=evaluation))
    spec = merge_spec(out, specs, {"name": "average", **method}, evaluate=True)
    if base is not None:
        spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    told: dict[str, tuple[int, int]] = {}
    result = Engine().merge(spec, lambda phase, done, total, *_: told.update({phase: (done, total)}))
    assert told["evaluating"][0] == told["evaluating"][1]
    return result


@pytest.fixture(scope="module")
def result(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeResult, Path]:
    out = tmp_path_factory.mktemp("out") / "out"
    return merged(inputs, out, inputs / "base"), out


def test_base_and_best_expert_are_in_every_models_metrics(inputs: Path, result: tuple[MergeResult, Path]) -> None:
    metrics: Mapping[str, Any] = result[0].metrics or {}
    assert set(metrics) == set(NAMES)
    for name, found in metrics.items():
        file = inputs / f"{name}.jsonl"
        of_experts = {other: perplexity(inputs / other, file) for other in NAMES}
        best = min(of_experts, key=lambda other: of_experts[other])
        assert found.base == pytest.approx(perplexity(inputs / "base", file), rel=1e-4)
        assert found.expert == pytest.approx(of_experts[name], rel=1e-4)
        assert found.best_expert.name == best
        assert found.best_expert.value == pytest.approx(of_experts[best], rel=1e-4)
        for version in ("base", "best_expert", "expert", "average"):
            difference = found.differences[version]
            assert difference.value == pytest.approx(found.merged - found.value_of(version))
            assert difference.interval[0] <= difference.value <= difference.interval[1]
            assert found.intervals[version][0] <= found.value_of(version) <= found.intervals[version][1]
    assert metrics["two"].best_expert.name == "three"


def test_notes_name_the_rows_on_which_the_merge_is_worse(result: tuple[MergeResult, Path]) -> None:
    metrics: Mapping[str, Any] = result[0].metrics or {}
    for version, title in (("base", "the base"), ("best_expert", "the best single expert")):
        worse = [name for name, found in metrics.items() if found.merged > found.value_of(version)]
        notes = [note for note in result[0].notes if note.startswith(f"the merge is worse than {title} on the rows")]
        assert len(notes) == bool(worse)
        assert all(f"{name} (perplexity {metrics[name].merged:.4g}" in notes[0] for name in worse)
    assert any(found.merged > found.best_expert.value for found in metrics.values())


def test_report_and_card_show_them(result: tuple[MergeResult, Path]) -> None:
    metrics: Mapping[str, Any] = result[0].metrics or {}
    page, card = ((result[1] / name).read_text() for name in ("report.html", "README.md"))
    for shown in (page, card):
        for found in metrics.values():
            assert f"{found.base:.4f}" in shown
            assert f"{found.best_expert.value:.4f} ({found.best_expert.name})" in shown
    assert "best expert" in page


def test_without_a_base_there_is_the_best_expert_alone(inputs: Path, tmp_path: Path) -> None:
    found = merged(inputs, tmp_path / "out", None, "token_accuracy")
    metrics: Mapping[str, Any] = found.metrics or {}
    for metric in metrics.values():
        assert metric.base is None
        assert metric.best_expert.value >= metric.expert
        assert set(metric.differences) == {"expert", "best_expert", "average"}


def test_a_base_without_the_head_is_not_evaluated_and_a_note_says_so(inputs: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "bare", family=DECODERS["llama"], seed=0, task="CausalLM")
    edit_json(base / "config.json", architectures=["LlamaModel"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    found = merged(inputs, tmp_path / "out", base)
    assert all(metric.base is None for metric in (found.metrics or {}).values())
    assert any(note.startswith("the base local:base was not evaluated: it lacks ") for note in found.notes)


def test_models_that_keep_their_heads_have_no_such_baselines(tmp_path: Path) -> None:
    from tests.tiny import dataset_spec, write_rows

    specs = []
    for seed, name in enumerate(("a", "b")):
        rows = dataset_spec(write_rows(tmp_path / f"{name}.jsonl", count=20, seed=seed))
        evaluation = EvaluationSpec(**rows.model_dump(), metric="accuracy")
        specs.append(model_spec(tiny_checkpoint(tmp_path / name, seed=seed), None, evaluation=evaluation))
    found = Engine().merge(merge_spec(tmp_path / "out", specs, {"name": "average"}, evaluate=True), silent)
    assert all((metric.base, metric.best_expert) == (None, None) for metric in (found.metrics or {}).values())
