"""What names, keys and texts from outside are matched with takes a time that grows with their length alone."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from app.services.json_text import NotJson, parse_json
from app.services.mergekit.recipe import HUB_NAME
from app.storage.sources.hf import HUB
from app.storage.sources.job import JOB
from tests.conftest import keeps_within
from worker.engine.catalog.checkpoints import (
    config_differences,
    files,
    inspection,
    modules,
    tensor_names,
    tied,
    token_tensors,
)
from worker.engine.catalog.checkpoints.adapters import peft, targets
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.patterns import ModulePatterns
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.tasks import names as labels

LENGTH = 160_000
PROMISE_S = 0.1
PIECES = (
    "a", "0", "_", "-", " ", ".", "/", "@", "(", "[", "\\", "*", "|", "\n", "\u0663", "\u0301\u0316", "\ufdfa", "a_",
    "a.", "..", "1.", "h.0.", "layers.", "layers.1.", "layers.1.layers", "encoder.layer.1.", "dropout", "pdrop",
    "embed", "conv1", ".base_layer", ".modules_to_save.", ".qweight", "[a", "(a", "a*", "1e", "1.0e1", "LABEL_",
    "sentence_transformers.", "torch.nn.modules.a.", "1_A/", "pre_", "position",
)  # fmt: skip
ENDS = ("\n", "!layers.1.x")


def _family_slots(text: str) -> None:
    for family in FAMILIES.values():
        for name in (
            text,
            f"{text}.weight",
            f"{family.prefix}{text}.bias",
            f"{family.prefix}encoder.layer.1.{text}.bias",
        ):
            family.slot(name)


def _packed(text: str) -> None:
    inspection.is_packed(tensor_of("local:x", text))


def _patterns(text: str) -> None:
    for pattern, name in ((text, "a.b"), ("a.*b", text), ("(a|b)x", text)):
        with suppress(ValueError):
            ModulePatterns({pattern: 1.0}).value(name, 2.0)


def _targets(text: str) -> None:
    for settings, module in (({"layers_pattern": text}, "a.b"), ({"exclude_modules": text}, "a.b"), ({}, f"{text}.b")):
        config = targets.TargetConfig.model_validate({"target_modules": ["b"], "layers_to_transform": [1], **settings})
        with suppress(ValueError):
            targets.Targets(config).left_out_by(module, is_embedding=False)


READERS: Mapping[str, Callable[[str], object]] = {
    "layers": tensor_names.layer_of,
    "places": tensor_names.is_before_layers,
    "harmless keys": config_differences.is_of_training,
    "spellings": tensor_names.spellings,
    "packed weights": _packed,
    "families": _family_slots,
    "wrappers of adapters": lambda text: peft.WRAPPERS.sub("", text),
    "embeddings of adapters": lambda text: [one.search(text) for one in (peft.EMBEDDING, peft.MAY_BE_EMBEDDING)],
    "layers of adapters": _targets,
    "positions": token_tensors.POSITIONS.search,
    "tokens": lambda text: token_tensors.is_token_indexed(text, (2, 2), 2),
    "labels": labels.normal,
    "label numbers": lambda text: (
        labels.NUMBER.fullmatch(text),
        labels.BARE.fullmatch(text),
        labels.DIGITS.findall(text),
    ),
    "files": lambda text: files.described_files({text, f"1_A/{text}", f"additional_chat_templates/{text}.jinja"}),
    "modules": lambda text: [part.fullmatch(text) for part in (modules.FOLDER, modules.TYPE, modules.ACTIVATION)],
    "references": lambda text: [part.fullmatch(text) for part in (HUB, JOB, HUB_NAME)],
    "hints": lambda text: did_you_mean(text, [text, f"{text}x"]),
}


@pytest.mark.parametrize("reader", READERS)
def test_long_texts_are_matched_at_once(reader: str) -> None:
    read = READERS[reader]
    for piece in PIECES:
        for end in ENDS:
            text = piece * (LENGTH // len(piece)) + end

            def attempt(text: str = text) -> float:
                tensor_names.layer_of.cache_clear()
                begun = time.process_time()
                read(text)
                return time.process_time() - begun

            keeps_within(PROMISE_S, attempt)


def test_patterns_of_adapters_are_matched_in_bounded_time() -> None:
    for piece in PIECES:
        for end in ENDS:
            text = piece * (1000 // len(piece)) + end

            def attempt(text: str = text) -> float:
                begun = time.process_time()
                _patterns(text)
                return time.process_time() - begun

            keeps_within(PROMISE_S, attempt)


def test_many_keys_of_which_the_last_is_there_twice_are_told_at_once() -> None:
    body = "{" + ",".join(f'"k{index}":0' for index in range(90_000)) + ',"k89999":1}'

    def attempt() -> float:
        begun = time.process_time()
        with pytest.raises(NotJson, match="'k89999' is there twice"):
            parse_json(body.encode())
        return time.process_time() - begun

    keeps_within(0.5, attempt)


def test_a_hint_among_very_many_names_is_found_at_once() -> None:
    names = [f"column number {index}" for index in range(200_000)]

    def attempt() -> float:
        begun = time.process_time()
        assert "known are column number 0" in did_you_mean("text", names)
        assert did_you_mean("text", []) == "; there are none"
        return time.process_time() - begun

    keeps_within(0.5, attempt)


MANY = 10_000
NAMES = {
    "a list of layers for each tensor": ([f"a{i}.h.0.x" for i in range(MANY)], [f"h.{i}.x" for i in range(MANY)]),
    "copies and originals of very many": (
        [f"a{i}.{end}" for i in range(MANY // 2) for end in ("lm_head.weight", "wte.weight")],
    ) * 2,
    "norms of two spellings": (
        [f"a{i}.LayerNorm.gamma" for i in range(MANY)],
        [f"b.a{i}.LayerNorm.weight" for i in range(MANY)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_plan_takes_a_time_that_grows_with_the_number_of_tensors_alone(case: str) -> None:
    ours, theirs = NAMES[case]
    config = {"model_type": "mystery", "architectures": ["MysteryForCausalLM"], "tie_word_embeddings": True}
    models = [
        CheckpointInfo(source, Path(), config, {name: tensor_of(source, name) for name in names}, {}, Path())
        for source, names in (("local:a", ours), ("local:b", theirs))
    ]

    def attempt() -> float:
        tensor_names.layer_of.cache_clear()
        begun = time.process_time()
        states = [tensor_names.tensors_by_name(info, models[0]) for info in models]
        tied._copies_by_name(config, states)
        with suppress(EngineError):
            plan_merge(models)
        return time.process_time() - begun

    keeps_within(8, attempt)  # linear: 0.5 s; the square of their number: a minute


def tensor_of(source: str, name: str) -> TensorInfo:
    return TensorInfo(source, name, Path(f"{source}.safetensors"), 0, "F32", (2, 2))
