"""Rows and metrics of language models on the running service: what is judged, and what fails by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, assert_problem
from tests.tiny import Tensors, edit_json, edit_tensors, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_families import DECODERS, ENCODER_DECODERS, words_of_decoders

Recipe = dict[str, Any]
ROWS = 12
NORM = "model.norm.weight"
LARGE = len(words_of_decoders())  # rows of the embedding matrices
STRICT = "{{ raise_exception('no') if messages[0]['content'] == 'w5' else '<s>' + messages[0]['content'] }}"


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """Two language models, one whose output layer is zero, one with a weight so large that logits overflow."""
    folder = tiny_inputs / "checkpoints"
    for seed, name in enumerate(("decoder-0", "decoder-1", "silent", "huge", "large", "small"), start=1):
        tiny_checkpoint(folder / name, family=DECODERS["llama"], seed=seed, task="CausalLM")
        (folder / name / "chat_template.jinja").write_text(STRICT)
    edit_tensors(folder / "silent", lambda tensors: {**tensors, "lm_head.weight": 0 * tensors["lm_head.weight"]})
    edit_tensors(folder / "huge", lambda tensors: {**tensors, NORM: 0 * tensors[NORM] + 3e38})
    edit_tensors(folder / "large", lambda tensors: {**tensors, NORM: 0 * tensors[NORM] + 3e37})
    edit_tensors(folder / "small", shrunk)
    edit_json(folder / "small" / "config.json", vocab_size=20)
    shutil.copytree(folder / "decoder-0", folder / "endless")
    edit_json(folder / "endless" / "generation_config.json", eos_token_id=[1, "2"])
    shutil.copytree(folder / "decoder-0", folder / "unsaid")
    edit_json(folder / "unsaid" / "config.json", max_position_embeddings=None)
    for seed, name in enumerate(("writer-0", "writer-1"), start=1):
        tiny_checkpoint(folder / name, family=ENCODER_DECODERS["bart"], seed=seed, task="Seq2SeqLM")
    shutil.copytree(folder / "writer-0", folder / "half")
    edit_json(folder / "half" / "config.json", is_encoder_decoder=False)
    shutil.copytree(folder / "decoder-0", folder / "mute")
    (folder / "mute" / "chat_template.jinja").unlink()
    for name, template in (("broken", "{% for"), ("greedy", "{{ ('x' * 9999999999)|length }}")):
        shutil.copytree(folder / "decoder-0", folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    rows = tiny_inputs / "rows"
    write_lines(rows / "texts.jsonl", [json.dumps({"text": text}) for text in tiny_texts(ROWS, 1)])
    written = [{"text": "one two", "target": "three"}] * ROWS
    write_lines(rows / "targets.jsonl", [json.dumps(row) for row in written])
    long = [*written[:4], {"text": "one " * 46, "target": "three"}]
    write_lines(rows / "long.jsonl", [json.dumps(row) for row in long])
    write_lines(rows / "far.jsonl", [json.dumps(row) for row in [*written[:4], {"text": "one", "target": "two " * 60}]])
    write_lines(rows / "empty.jsonl", [json.dumps(row) for row in [*written[:4], {"text": "one", "target": ""}]])
    chosen = [{"text": "one ", "choices": ["two", "three"], "label": place % 2} for place in range(ROWS)]
    write_lines(rows / "choices.jsonl", [json.dumps(row) for row in chosen])
    write_lines(rows / "wrong.jsonl", [json.dumps(row) for row in [*chosen, {**chosen[0], "label": 2}]])
    talk = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "one"}]
    write_lines(rows / "talks.jsonl", [json.dumps({"messages": talk})])
    return tiny_inputs


def shrunk(tensors: Tensors) -> Tensors:
    """Fewer rows of the embedding matrices than the tokenizer has tokens."""
    return {name: tensor[:20].clone() if tensor.shape[0] == LARGE else tensor for name, tensor in tensors.items()}


def recipe(rows: str, *names: str, method: str = "average", part: str = "evaluation", **columns: Any) -> Recipe:
    of_rows = {"source": f"local:rows/{rows}.jsonl", **columns}
    models = [
        {"name": name, "checkpoint": f"local:checkpoints/{name}", part: of_rows}
        for name in names or ("decoder-0", "decoder-1")
    ]
    return {"method": {"name": method}, "models": models}


WRITTEN: Recipe = {
    "metric": "exact_match",
    "target": "target",
    "max_new_tokens": 2,
    "stop": ["never"],
    "answer": "three",
}


def test_what_models_write_is_judged_as_asked(service: Service, inputs: Path) -> None:
    job = service.finished(service.submit(recipe("targets", **WRITTEN)))
    assert job["status"] == "succeeded", job["error"]
    kept = job["request"]["models"][0]["evaluation"]
    assert {name: kept[name] for name in WRITTEN} == WRITTEN
    found = job["result"]["metrics"]["decoder-0"]
    assert 0 <= found["answer_tokens"]["merged"] <= 2
    assert found["best_expert"]["value"] >= found["expert"]


def test_text_to_text_is_measured_and_judged_by_both_columns(service: Service, inputs: Path) -> None:
    writing = {**WRITTEN, "target": None, "answer": "four"}
    asked = recipe("targets", "writer-0", "writer-1", method="mask_fisher", **writing)
    for model in asked["models"]:
        model["dataset"] = {"source": "local:rows/targets.jsonl"}
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    for part in ("dataset", "evaluation"):
        kept = job["request"]["models"][0][part]
        assert (kept["text"], kept["target"]) == ("text", "target")
    found = job["result"]["metrics"]["writer-0"]
    assert 0 <= found["answer_tokens"]["merged"] <= 2
    assert (found["expert"], found["retention"]) == (0, None)  # no answer to the pattern is the target
    assert "writer-0 has no row of local:rows/targets.jsonl right itself" in job["result"]["notes"][0]


def test_choices_are_judged(service: Service, inputs: Path) -> None:
    job = service.finished(service.submit(recipe("choices", metric="choice_accuracy", choices="choices")))
    assert job["status"] == "succeeded", job["error"]
    assert job["request"]["models"][0]["evaluation"]["label"] == "label"
    assert job["result"]["metrics"]["decoder-0"]["expert"] == 0.5


REFUSED: dict[str, tuple[Recipe, list[str]]] = {
    "a setting of another metric": (recipe("texts", metric="loss", stop=["a"]), ["models.0.evaluation.stop"]),
    "a pattern that goes back": (recipe("targets", **{**WRITTEN, "answer": r"(a)\1"}), ["models.0.evaluation.answer"]),
    "text to text without a target": (
        recipe("texts", "writer-0", "writer-1"), ["models.0.evaluation", "no column 'target'"],
    ),
    "choices of perplexity": (recipe("choices", choices="choices"), ["models.0.evaluation.choices"]),
    "a label that is no choice": (
        recipe("wrong", metric="choice_accuracy"), ["models.0.evaluation", "line 13", "label 2 is out of range"],
    ),
    "end tokens that are none": (
        recipe("targets", "decoder-0", "endless", **WRITTEN), ["models.1.checkpoint", "eos_token_id [1, '2']"],
    ),
    "a size that nothing says": (
        recipe("texts", "decoder-0", "unsaid"), ["models.1.checkpoint", "no usable max_position_embeddings"],
    ),
    "text beside messages": (
        recipe("talks", part="dataset", method="mask_fisher", messages="messages", text="text"),
        ["models.0.dataset.text"],
    ),
    "messages without a template": (
        recipe("talks", "mute", messages="messages"),
        ["models.0.evaluation.messages", "the checkpoint's tokenizer has none, local:checkpoints/mute"],
    ),
    "messages with a template that is none": (
        recipe("talks", "decoder-0", "broken", part="dataset", method="regmean", messages="messages"),
        ["models.1.dataset.messages", "the chat template of local:checkpoints/broken, which is no Jinja"],
    ),
    "half of an encoder and a decoder": (
        recipe("targets", "half"), ["models.0.evaluation", "is_encoder_decoder False is not available"],
    ),
    "measuring half of them": (
        recipe("targets", "half", method="regmean", part="dataset"),
        ["method.name", "is_encoder_decoder False is not available"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_before_the_job_is_accepted(service: Service, inputs: Path, case: str) -> None:
    asked, words = REFUSED[case]
    response = service.post("/merge", json=asked)
    assert response.status_code == 422
    assert not [word for word in words if word not in response.text], response.text


FAR: Recipe = {"method": {"name": "task_arithmetic", "scale": 10.0}, "base": "local:checkpoints/decoder-0"}
FAILING: dict[str, tuple[Recipe, str, list[str]]] = {
    "no room for the answer": (
        recipe("long", **{**WRITTEN, "max_new_tokens": 8}), "invalid_dataset", ["line 5", "leave no room for 8 more"],
    ),
    "a completion that would be cut": (
        recipe("long", target="target", max_length=20), "invalid_dataset", ["line 5", "longer than the 20 tokens"],
    ),
    "a target over the limit": (
        recipe("far", "writer-0", "writer-1"), "invalid_dataset", ["line 5", "its target has", "48 are allowed"],
    ),
    "a target without a token": (
        recipe("empty", "writer-0", "writer-1"), "invalid_dataset", ["line 5", "no token is of its target"],
    ),
    "a template that fails": (
        recipe("talks", messages="messages"), "invalid_dataset", ["line 1", "the chat template fails on it"],
    ),
    "a template without end": (
        recipe("talks", "greedy", messages="messages"),
        "invalid_dataset", ["line 1", "the chat template takes more than 1024 MiB of memory for it"],
    ),
    "NaN in the merge alone": (
        {**recipe("texts", "large", "decoder-1"), **FAR}, "numerical_error",
        ["the merge gives logits that are NaN or infinite on line ", "of local:rows/texts.jsonl"],
    ),
    "all gradients zero": (
        recipe("texts", "decoder-0", "silent", method="mask_fisher", part="dataset"),
        "numerical_error", ["all gradients of silent are 0 on its 12 rows of local:rows/texts.jsonl"],
    ),
    "NaN in what is judged": (
        recipe("texts", "huge", "decoder-1"), "numerical_error", ["local:checkpoints/huge", "line "],
    ),
    "NaN in what is measured": (
        recipe("texts", "decoder-0", "huge", method="mask_fisher", part="dataset"),
        "numerical_error", ["local:rows/texts.jsonl, line "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_what_fails_is_named_and_the_worker_goes_on(service: Service, inputs: Path, case: str) -> None:
    asked, code, words = FAILING[case]
    before = service.processes()
    job = service.finished(service.submit(asked))
    assert job["status"] == "failed"
    assert job["error"]["code"] == code
    assert not [word for word in words if word not in job["error"]["message"]], job["error"]["message"]
    assert service.processes()["worker"].pid == before["worker"].pid


def test_labels_beyond_the_vocabulary_are_refused(service: Service, inputs: Path) -> None:
    response = service.post("/merge", json=recipe("texts", "small"))
    assert_problem(response, 422, "invalid_checkpoint")
    assert "its embedding matrix 20 rows" in response.text
