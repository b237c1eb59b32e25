"""Models whose tokenizers differ, on the running service."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.conftest import Service, assert_problem, tiny_recipe
from tests.tiny import read_model, tiny_checkpoint, write_rows
from tests.tiny_families import TINY_BERT, WORDS, numbered
from tests.tiny_language_models import tiny_model, word_level_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARIES = {"vocabulary-x": (*SPECIAL, *WORDS[:50], "red"), "vocabulary-y": (*WORDS[40:], *SPECIAL)}
LANGUAGE_MODELS = {"speaks-base": WORDS[:40], "speaks-x": (*WORDS[:40], "red"), "speaks-y": WORDS[45::-1]}
MODELS = tuple(LANGUAGE_MODELS)
MARKS = ("<s>", "</s>", "<unk>")
TOKENS = len(SPECIAL) + len(WORDS) + 1


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """`vocabulary-x` and `vocabulary-y`, of which 10 words are common, and language models."""
    from transformers import BertTokenizer

    for seed, (name, tokens) in enumerate(VOCABULARIES.items()):

        def tokenizer(tokens: tuple[str, ...] = tokens) -> Any:
            return BertTokenizer(vocab=numbered(*tokens), model_max_length=48)

        tiny_checkpoint(tiny_inputs / "checkpoints" / name, family=replace(TINY_BERT, tokenizer=tokenizer), seed=seed)
        write_rows(tiny_inputs / "rows" / f"{name}.jsonl", count=100, seed=seed)
    for seed, (name, words) in enumerate(LANGUAGE_MODELS.items()):
        folder = tiny_model(tiny_inputs / "checkpoints" / name, seed=seed, vocab_size=3 + len(words))
        word_level_tokenizer(words).save_pretrained(folder)
    return tiny_inputs


def recipe(vocabulary: str) -> dict[str, Any]:
    return {**tiny_recipe(*VOCABULARIES), "output": {"vocabulary": vocabulary}}


def test_a_union_is_planned_merged_measured_and_evaluated(service: Service, inputs: Path) -> None:
    plan = service.post("/merge/validate", json=recipe("union")).json()
    assert plan["tokens"] == TOKENS
    of_x, of_y = (len(tokens) for tokens in VOCABULARIES.values())
    assert [(m["tokens"], m["new_tokens"]) for m in plan["models"]] == [(of_x, 0), (of_y, TOKENS - of_x)]
    job = service.finished(service.submit(recipe("union")))
    assert job["status"] == "succeeded", job["error"]
    result = job["result"]
    assert set(result["metrics"]) == set(VOCABULARIES)
    assert all(model["aligned_examples"] > 0 for model in result["models"])
    assert any("local:checkpoints/vocabulary-x" in note and "further tokens" in note for note in result["notes"])
    for name in VOCABULARIES:
        config = service.get(f"{job['links']['artifacts']}/models/{name}/config.json").json()
        tokenizer = service.get(f"{job['links']['artifacts']}/models/{name}/tokenizer.json").json()
        assert config["vocab_size"] == TOKENS == len(tokenizer["model"]["vocab"])


def test_by_default_they_are_refused_and_what_to_do_is_said(service: Service, inputs: Path) -> None:
    refused = service.post("/merge", json=recipe("error"))
    assert_problem(refused, 422, "incompatible_checkpoints")
    assert "vocab_size differs: 56, 60; output.vocabulary 'base' or 'union'" in refused.json()["detail"]


def test_tokenizers_that_cannot_be_aligned_are_refused_at_once(service: Service, inputs: Path) -> None:
    tokens = inputs / "checkpoints" / "vocabulary-other" / "tokenizer_config.json"
    tiny_checkpoint(tokens.parent)
    tokens.write_text(tokens.read_text().replace("[PAD]", "<pad>"))
    posted = {**tiny_recipe("vocabulary-x"), "output": {"vocabulary": "base"}}
    posted["models"].append({"name": "other", "checkpoint": "local:checkpoints/vocabulary-other"})
    posted["method"] = {"name": "average"}
    refused = service.post("/merge", json=posted)
    assert_problem(refused, 422, "incompatible_checkpoints")
    assert "pad_token differs: '[PAD]', '<pad>'" in refused.json()["detail"]


def speaking(**more: Any) -> dict[str, Any]:
    models = [{"name": name, "checkpoint": f"local:checkpoints/{name}"} for name in ("speaks-x", "speaks-y")]
    return {"method": {"name": "average"}, "models": models, "output": {"vocabulary": "union"}, **more}


def test_language_models_are_planned_and_merged_by_token(service: Service, inputs: Path) -> None:
    posted = speaking(method={"name": "task_arithmetic", "scale": 0.5}, base="local:checkpoints/speaks-base")
    plan = service.post("/merge/validate", json=posted).json()
    tokens = 3 + 46 + 1
    assert plan["tokens"] == tokens
    assert [(m["tokens"], m["new_tokens"]) for m in plan["models"]] == [(3 + 41, 1), (3 + 46, 6)]
    job = service.finished(service.submit(posted))
    assert job["status"] == "succeeded", job["error"]
    assert any("speaks-base and 7 further tokens" in note for note in job["result"]["notes"])
    of_job = f"{job['links']['artifacts']}/model"
    assert service.get(f"{of_job}/config.json").json()["vocab_size"] == tokens
    vocabulary = service.get(f"{of_job}/tokenizer.json").json()["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tokens))
    merged = load(service.get(f"{of_job}/model.safetensors").content)["model.embed_tokens.weight"].double()
    own = {name: read_model(inputs / "checkpoints" / name)["model.embed_tokens.weight"].double() for name in MODELS}
    places = {name: [*MARKS, *words] for name, words in LANGUAGE_MODELS.items()}
    for token, place in vocabulary.items():
        rows = {name: own[name][places[name].index(token)] for name in MODELS if token in places[name]}
        known = torch.stack([row for name, row in rows.items() if name != "speaks-base"])
        base = rows.get("speaks-base", known.mean(0))
        wanted = base + 0.5 * (known - base).sum(0)
        torch.testing.assert_close(merged[place], wanted, rtol=1e-5, atol=1e-6)


def test_stacking_refuses_other_vocabularies(service: Service, inputs: Path) -> None:
    slices = [{"model": name, "layers": [0, 2]} for name in ("speaks-x", "speaks-y")]
    refused = service.post("/merge", json=speaking(method={"name": "passthrough", "slices": slices}, output={}))
    assert_problem(refused, 422, "incompatible_checkpoints")
    assert "output.vocabulary" in refused.json()["detail"]
