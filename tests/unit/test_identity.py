"""What a checkpoint is: its class by its configuration and its tensors, and what is refused as not sure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Tensors, edit_json, edit_tensors, tiny_base, tiny_checkpoint
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, T5, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.identity import check_tensors, identify
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

CLS = {
    "cls.predictions.bias": torch.zeros(100),
    "cls.predictions.transform.LayerNorm.gamma": torch.ones(16),
    "cls.seq_relationship.weight": torch.zeros(2, 16),
}
DECODING_CLASSIFIER = TinyModel("StableLmForSequenceClassification", "stablelm", {**LLAMA.settings, "pad_token_id": 2})


def without_architectures(folder: Path, **changes: Any) -> Path:
    edit_json(folder / "config.json", **{"architectures": None, **changes})
    return folder


def add(folder: Path, tensors: Tensors) -> Path:
    edit_tensors(folder, lambda own: {**own, **{name: tensor.clone() for name, tensor in tensors.items()}})
    return folder


def remove(folder: Path, start: str) -> Path:
    edit_tensors(folder, lambda own: {name: tensor for name, tensor in own.items() if not name.startswith(start)})
    return folder


def identified(folder: Path) -> str:
    return identify(inspect_checkpoint(folder, "local:x")).info.architecture


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_classifier_of_every_family_is_known_by_its_tensors(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", family=TINY_FAMILIES[family], labels=3)
    stated = identified(folder)
    assert stated.endswith("ForSequenceClassification")
    if family == "modernbert":  # whose classes for other tasks have the same tensors
        with pytest.raises(
            InvalidCheckpoint, match="ForTokenClassification and of ModernBertForSequenceClassification"
        ):
            identified(without_architectures(folder))
        return
    assert identified(without_architectures(folder)) == stated
    assert identified(without_architectures(folder, architectures=[])) == stated


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("start", ["TF", "Flax", "My"])
def test_a_classifier_of_an_unknown_class_is_the_one_that_has_its_tensors(
    tmp_path: Path, family: str, start: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "m", family=TINY_FAMILIES[family], labels=3)
    stated = identified(folder)
    found = identify(inspect_checkpoint(without_architectures(folder, architectures=[start + stated]), "local:x"))
    assert found.info.architecture == stated
    said = f"names {start}{stated}, whose tensors are not known here; by its tensors it is a {stated}"
    assert found.notes == (f"config.json of local:x {said}",)


def test_an_unknown_class_of_another_task_is_no_class_with_the_same_tensors(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", labels=2)
    assert identified(without_architectures(folder, architectures=["MyForTokenClassification"])).startswith("My")


def test_two_tasks_of_an_unknown_class_keep_their_heads(tmp_path: Path) -> None:
    infos = []
    for name, labels in (("a", ["bad", "good"]), ("b", ["spam", "ham"])):
        folder = tiny_checkpoint(tmp_path / name, labels=2)
        names = {str(index): label for index, label in enumerate(labels)}
        without_architectures(folder, architectures=["TFBertForSequenceClassification"], id2label=names, label2id=None)
        infos.append(inspect_checkpoint(folder, f"local:{name}"))
    plan = plan_merge(infos)
    assert not plan.merges_heads
    assert [info.architecture for info in plan.published] == ["BertForSequenceClassification"] * 2


def test_heads_of_different_labels_are_not_merged_if_no_class_is_known(tmp_path: Path) -> None:
    infos = []
    for name, labels in (("a", ["bad", "good"]), ("b", ["spam", "ham"])):
        folder = add(tiny_checkpoint(tmp_path / name, labels=2), {"extra.weight": torch.zeros(2, 2)})
        names = {str(index): label for index, label in enumerate(labels)}
        without_architectures(folder, architectures=["MyModel"], id2label=names, label2id=None)
        infos.append(inspect_checkpoint(folder, f"local:{name}"))
    with pytest.raises(IncompatibleCheckpoints, match="their heads have different labels"):
        plan_merge(infos)


@pytest.mark.parametrize("model", [LLAMA, GPT2, T5, MASKED_BERT, DECODING_CLASSIFIER], ids=lambda m: m.architecture)
def test_a_language_model_is_known_by_its_tensors(tmp_path: Path, model: TinyModel) -> None:
    assert identified(without_architectures(tiny_model(tmp_path / "m", model))) == model.architecture


def test_a_model_without_a_head_is_known_by_its_tensors(tmp_path: Path) -> None:
    assert identified(without_architectures(tiny_base(tmp_path / "m"))) == "BertModel"


def test_two_tasks_without_architectures_keep_their_heads_and_the_published_configurations_say_the_class(
    tmp_path: Path,
) -> None:
    infos = []
    for seed, labels in ((1, 2), (2, 3)):
        folder = without_architectures(tiny_checkpoint(tmp_path / f"m{seed}", labels=labels, seed=seed))
        infos.append(inspect_checkpoint(folder, f"local:m{seed}"))
    plan = plan_merge(infos)
    assert not plan.merges_heads
    assert [head[0].shape[0] for head in plan.heads] == [2, 3]
    assert [info.config["architectures"] for info in plan.published] == [["BertForSequenceClassification"]] * 2
    assert plan.notes[0] == (
        "config.json of local:m1 names no architectures; by its tensors it is a BertForSequenceClassification"
    )


def test_of_several_architectures_the_one_that_the_tensors_are_of_is_taken(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    several = ["BertForMaskedLM", "BertForSequenceClassification"]
    assert identified(without_architectures(folder, architectures=several)) == several[1]


def classifier(folder: Path) -> Path:
    return tiny_checkpoint(folder, labels=1)


REFUSED: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "two classes with the same tensors": (
        lambda f: without_architectures(
            classifier(f), architectures=["BertForMultipleChoice", "BertForSequenceClassification"], id2label=None,
            num_labels=1,
        ),
        ["several architectures", "BertForMultipleChoice", "and of", "name the one class"],
    ),
    "a kind of model that transformers has not": (
        lambda f: without_architectures(tiny_model(f), model_type="own"), ["has no architectures", "'own'"],
    ),
    "tensors of no class": (
        lambda f: without_architectures(add(classifier(f), {"own.weight": torch.zeros(2)})),
        ["has no architectures", "no class of bert"],
    ),
    "a name instead of a list": (
        lambda f: without_architectures(classifier(f), architectures="BertForSequenceClassification"),
        ["architectures in config.json is 'BertForSequenceClassification'", "list"],
    ),
    "a list of something else": (
        lambda f: without_architectures(classifier(f), architectures=[1]), ["architectures in config.json is '[1]'"],
    ),
    "several classes, none of which has the tensors": (
        lambda f: without_architectures(classifier(f), architectures=["BertModel", "BertForMaskedLM"]),
        ["several architectures (BertModel, BertForMaskedLM)", "no class"],
    ),
    "a head that the class has not": (
        lambda f: without_architectures(classifier(f), architectures=["BertModel"]),
        ["BertModel, which has no tensor classifier.bias"],
    ),
    "a classifier called a masked language model": (
        lambda f: without_architectures(classifier(f), architectures=["BertForMaskedLM"]),
        ["BertForMaskedLM, which has no tensor classifier.bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sure_is_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    folder = spoil(tmp_path / "m")
    with pytest.raises(InvalidCheckpoint) as caught:
        plan_merge([inspect_checkpoint(folder, "local:m")])
    assert all(word in caught.value.message for word in ["local:m", *words]), caught.value.message


def test_a_class_whose_tensors_are_not_known_is_noted(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", architectures=["LlamaForMyTask"])
    [note] = plan_merge([inspect_checkpoint(folder, "local:m")]).notes
    assert "the tensors of LlamaForMyTask" in note
    assert "local:m" in note


def test_heads_that_pre_training_left_in_a_classifier_are_left_out_with_a_note(tmp_path: Path) -> None:
    clean = tiny_checkpoint(tmp_path / "clean", seed=1)
    left = add(tiny_checkpoint(tmp_path / "left", seed=2), CLS)
    plan = plan_merge([inspect_checkpoint(clean, "local:clean"), inspect_checkpoint(left, "local:left")])
    assert not [t.slot.name for t in plan.backbone if t.slot.name.startswith("cls")]
    [note] = plan.notes
    assert note == (
        "tensor cls.predictions.bias (like 2 more) of local:left was left out: BertForSequenceClassification does not "
        "read it"
    )


def test_heads_of_older_versions_of_a_class_are_left_out_too(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", family=TINY_FAMILIES["deberta-v3"])
    add(folder, {"lm_predictions.lm_head.bias": torch.zeros(4), "mask_predictions.classifier.bias": torch.zeros(1)})
    plan = plan_merge([inspect_checkpoint(folder, "local:m")])
    assert not [t for t in (*plan.backbone, *plan.heads[0]) if "predictions" in t.slot.name]
    assert ["lm_predictions.lm_head.bias (like 1 more) of local:m was left out" in note for note in plan.notes] == [
        True
    ]


def test_a_language_models_head_in_a_decoders_classifier_is_left_out_with_a_note(tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / f"m{seed}", DECODING_CLASSIFIER, seed=seed) for seed in (1, 2)]
    add(folders[1], {"lm_head.weight": torch.zeros(128, 16)})
    plan = plan_merge([inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders])
    names = {tensor.slot.name for tensor in plan.backbone}
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    assert ["lm_head.weight of local:m2 was left out" in note for note in plan.notes].count(True) == 1


LACKING: dict[str, tuple[TinyModel, Callable[[Path], object], str]] = {
    "no norm": (LLAMA, lambda f: remove(f, "model.norm"), "no tensor model.norm.weight, which LlamaForCausalLM needs"),
    "a layer without a matrix": (
        LLAMA, lambda f: remove(f, "model.layers.1.mlp.up_proj"), "no tensor model.layers.1.mlp.up_proj.weight",
    ),
    "no matrix of tokens": (GPT2, lambda f: remove(f, "transformer.wte"), "no tensor transformer.wte.weight"),
    "no head though nothing is tied": (LLAMA, lambda f: remove(f, "lm_head"), "no tensor lm_head.weight"),
    "another width": (
        LLAMA, lambda f: add(f, {"model.norm.weight": torch.ones(8)}),
        "tensor model.norm.weight has shape [8], by its configuration it would have [16]",
    ),
    "other feed-forward layers": (
        LLAMA, lambda f: edit_json(f / "config.json", intermediate_size=20),
        "by its configuration it would have [16, 20]",
    ),
    "a head of other labels": (
        DECODING_CLASSIFIER, lambda f: edit_json(f / "config.json", id2label={"0": "a", "1": "b", "2": "c"}),
        "tensor score.weight has shape [2, 16], by its configuration it would have [3, 16]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_what_all_models_lack_of_their_class_is_refused_before_a_job_is_accepted(tmp_path: Path, case: str) -> None:
    model, spoil, words = LACKING[case]
    infos = []
    for seed in (1, 2):
        folder = tiny_model(tmp_path / f"m{seed}", model, seed=seed)
        spoil(folder)
        infos.append(inspect_checkpoint(folder, f"local:m{seed}"))
    with pytest.raises(InvalidCheckpoint) as caught:
        plan_merge(infos)
    assert words in caught.value.message


@pytest.mark.parametrize("model", [LLAMA, GPT2, T5, MASKED_BERT], ids=lambda model: model.model_type)
def test_names_without_the_heads_prefix_are_those_of_the_class(tmp_path: Path, model: TinyModel) -> None:
    folder = tiny_model(tmp_path / "m", model)
    edit_tensors(folder, lambda own: {n.removeprefix("transformer.").removeprefix("bert."): t for n, t in own.items()})
    found = identify(inspect_checkpoint(folder, "local:m"))
    assert not found.unread
    check_tensors(found)
