"""Models whose tokenizers differ, on the running service."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, assert_problem, tiny_recipe
from tests.tiny import tiny_checkpoint, write_rows
from tests.tiny_families import TINY_BERT, WORDS, numbered

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARIES = {"vocabulary-x": (*SPECIAL, *WORDS[:50], "red"), "vocabulary-y": (*WORDS[40:], *SPECIAL)}
TOKENS = len(SPECIAL) + len(WORDS) + 1


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """`vocabulary-x` and `vocabulary-y`, of which 10 words are common, beside the service's other inputs."""
    from transformers import BertTokenizer

    for seed, (name, tokens) in enumerate(VOCABULARIES.items()):

        def tokenizer(tokens: tuple[str, ...] = tokens) -> Any:
            return BertTokenizer(vocab=numbered(*tokens), model_max_length=48)

        tiny_checkpoint(tiny_inputs / "checkpoints" / name, family=replace(TINY_BERT, tokenizer=tokenizer), seed=seed)
        write_rows(tiny_inputs / "rows" / f"{name}.jsonl", count=100, seed=seed)
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
