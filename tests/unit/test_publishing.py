"""What a plan says of the files that are published beside the weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import edit_json
from tests.tiny_language_models import LLAMA, tiny_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import OutputSpec
from worker.engine.catalog.methods import AverageParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_job

TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [tiny_model(tmp_path / name, LLAMA, seed=seed) for seed, name in enumerate("ab", 1)]


def planned(folders: Sequence[Path], **more: Any) -> MergePlan:
    checkpoints = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    return plan_job(AverageParameters(), [folder.name for folder in folders], checkpoints, OutputSpec(**more))


def write(folder: Path, name: str, content: str) -> int:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    return len(content)


def test_every_file_that_is_copied_counts_in_the_bytes_to_write(pair: list[Path]) -> None:
    before = planned(pair)
    weights = sum(tensor.nbytes for tensor in before.backbone)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert before.bytes_to_write == weights + sum((pair[0] / name).stat().st_size for name in names)
    further = ("vocab.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "preprocessor_config.json")
    more = sum(write(pair[0], name, "{}" * 50_000) for name in further)
    write(pair[1], "merges.txt", "not the first model's" * 1000)
    assert planned(pair).bytes_to_write == before.bytes_to_write + more


def set_templates(folder: Path, name: str) -> None:
    if name == "in the tokenizer's configuration":
        edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    elif name == "listed there by name":
        listed = [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "{{ documents }}"}]
        edit_json(folder / "tokenizer_config.json", chat_template=listed)
    else:
        write(folder, "chat_template.jinja", TEMPLATE)


def test_special_tokens_and_lengths_that_differ_are_noted_with_all_values(pair: list[Path]) -> None:
    edit_json(pair[1] / "config.json", eos_token_id=[1, 5], max_position_embeddings=128)
    assert planned(pair).notes == (
        "eos_token_id differs: 1 in local:a, [1, 5] in local:b; published is 1",
        "max_position_embeddings differs: 64 in local:a, 128 in local:b; published is 64",
    )
    assert planned(pair, config_from="b").notes == (
        "eos_token_id differs: 1 in local:a, [1, 5] in local:b; published is [1, 5]",
        "max_position_embeddings differs: 64 in local:a, 128 in local:b; published is 128",
    )


def test_a_model_that_counts_and_has_no_tokenizer_leaves_the_first_ones(pair: list[Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair[1] / name).unlink()
    edit_json(pair[1] / "config.json", eos_token_id=5)
    plan = planned(pair, config_from="b")
    assert plan.published[0].config["eos_token_id"] == 5
    assert plan.tokens_of(plan.published[0]).path == plan.checkpoints[0].path


def test_a_chat_template_is_the_same_wherever_it_is_stored(pair: list[Path]) -> None:
    set_templates(pair[0], "in the tokenizer's configuration")
    set_templates(pair[1], "in a file")
    assert planned(pair).notes == ()


@pytest.mark.parametrize(
    ("name", "content", "different"),
    [
        ("chat_template.jinja", "{{ other }}", "chat template"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}", "chat template 'tool_use'"),
        ("chat_template.json", json.dumps({"chat_template": "{{ images }}"}), "chat_template.json"),
        ("preprocessor_config.json", '{"size": 7}', "preprocessor_config.json"),
        ("audio_tokenizer_config.json", '{"rate": 7}', "audio_tokenizer_config.json"),
        ("generation_config.json", '{"top_k": 7}', "generation_config.json"),
    ],
)
def test_templates_and_settings_of_models_that_are_not_published_are_noted(
    pair: list[Path], name: str, content: str, different: str
) -> None:
    write(pair[1], name, content)
    wanted = f"published with the merge are local:a's own; those of local:b differ: {different}"
    assert planned(pair).notes == (wanted,)
    assert planned(pair[:1]).notes == ()


@pytest.mark.parametrize("asked", ["auto", "{{ messages }}"])
def test_a_template_that_is_asked_for_differs_from_none_that_is_published(pair: list[Path], asked: str) -> None:
    for folder, template in zip(pair, (TEMPLATE, "{{ other }}"), strict=True):
        write(folder, "chat_template.jinja", template)
        write(folder, "chat_template.json", json.dumps({"chat_template": template}))
    assert len(planned(pair).notes) == 1
    assert planned(pair, chat_template=asked).notes == ()


def test_templates_that_are_listed_by_name_are_compared_one_by_one(pair: list[Path]) -> None:
    set_templates(pair[0], "listed there by name")
    set_templates(pair[1], "in a file")
    [note] = planned(pair).notes
    assert note.endswith("those of local:b differ: chat template 'rag'")
