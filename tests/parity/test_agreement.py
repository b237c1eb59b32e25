"""What `POST /merge/validate` accepts a job accepts, and what it refuses a job refuses with the same message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.contracts.errors import ProblemError
from app.contracts.requests import MergeRequest
from app.services.checks import Checker
from app.storage.artifacts import open_artifacts
from app.storage.sources import Sources
from app.storage.sources.source import SourceContext
from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_language_models import LLAMA, tiny_model
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.jobs.engine import Engine

Change = Callable[[Any], Any]
"""Changes the content of a JSON file in place, or returns another."""
TOKEN = {"__type": "AddedToken", "content": "one", "lstrip": False}


def setting(*path: Any, value: Any) -> Change:
    """Gives the value at a path of keys; the path names the test."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    change.__name__ = f"{'.'.join(map(str, path))}={str(value)[:20]}"
    return change


def without(*path: Any) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    change.__name__ = f"without {'.'.join(map(str, path))}"
    return change


def whole(value: Any) -> Change:
    def change(_: Any) -> Any:
        return value

    change.__name__ = f"whole={value}"
    return change


MISFITS: list[tuple[str, str, Any]] = [
    ("bert", "use_cache", None),
    ("bert", "hidden_dropout_prob", None),
    ("bert", "classifier_dropout", "x"),
    ("bert", "type_vocab_size", 2.5),
    ("bert", "rope_parameters", ["x"]),
    ("llama", "tie_word_embeddings", None),
    ("llama", "mlp_bias", 3),
    ("llama", "attention_bias", []),
    ("llama", "rms_norm_eps", 3),
    ("llama", "hidden_act", None),
    ("llama", "num_attention_heads", None),
    ("llama", "eos_token_id", {}),
    ("llama", "rope_scaling", "linear"),
    ("llama", "rope_parameters", []),
]
"""Values of a configuration of types that its class refuses."""

REFUSED: list[tuple[str, str, Change, str]] = [
    *(
        (kind, "tokenizer_config.json", setting(key, value=value), key)
        for kind in ("bert", "llama")
        for key, value in [
            ("tokenizer_class", 3),
            ("tokenizer_class", ["BertTokenizer"]),
            ("model_max_length", "x"),
            ("model_max_length", [512]),
            ("added_tokens_decoder", None),
            ("added_tokens_decoder", [TOKEN]),
            ("added_tokens_decoder", {"x": {"content": "y"}}),
            ("added_tokens_decoder", {"1": "y"}),
            ("added_tokens_decoder", {"1": {"content": 3}}),
            ("pad_token", 3),
            ("pad_token", {"content": "y"}),
            ("unk_token", ["[UNK]"]),
            ("extra_special_tokens", "x"),
            ("extra_special_tokens", [3]),
            ("additional_special_tokens", [{"content": "y"}]),
            ("model_specific_special_tokens", ["x"]),
            ("chat_template", ["x"]),
            ("chat_template", 5),
            ("padding_side", None),
            ("truncation_side", "middle"),
            ("model_input_names", 3),
            ("model_input_names", "x"),
            ("split_special_tokens", None),
            ("do_lower_case", "yes"),
        ]
    ),
    ("bert", "tokenizer_config.json", setting("unk_token", value="[NONE]"), "Missing [UNK] token"),
    ("bert", "special_tokens_map.json", whole([]), "special_tokens_map.json is not a JSON object"),
    ("bert", "special_tokens_map.json", setting("pad_token", value=3), "pad_token"),
    (
        "bert",
        "special_tokens_map.json",
        setting("additional_special_tokens", value=[{"content": "y"}]),
        "are no tokens",
    ),
    ("roberta", "added_tokens.json", whole([]), "added_tokens.json is not a JSON object"),
    ("roberta", "added_tokens.json", whole({"x": "y"}), "no token's id"),
    ("llama", "generation_config.json", whole([]), "generation_config.json is not a JSON object"),
    *(
        ("llama", "generation_config.json", setting(key, value=value), key)
        for key, value in [
            ("max_new_tokens", "x"),
            ("max_new_tokens", 0),
            ("early_stopping", 3),
            ("pad_token_id", [3]),
            ("cache_implementation", "x"),
            ("watermarking_config", {"x": 1}),
            ("suppress_tokens", 3),
            ("eos_token_id", "1"),
            ("eos_token_id", [1, 2.0]),
            ("eos_token_id", [1 << 63]),
            ("num_return_sequences", 3),
        ]
    ),
    *((kind, "config.json", setting(key, value=value), key) for kind, key, value in MISFITS),
    ("bert", "tokenizer.json", without("added_tokens"), "added_tokens"),
    ("bert", "tokenizer.json", without("model", "vocab", "[UNK]"), "Missing [UNK] token"),
    ("bert", "tokenizer.json", setting("added_tokens", 0, "lstrip", value=None), "tokenizer.json cannot be loaded"),
    (
        "bert",
        "tokenizer.json",
        setting("post_processor", "single", 0, "SpecialToken", "id", value=[]),
        "cannot be loaded",
    ),
    ("roberta", "tokenizer.json", setting("pre_tokenizer", "type", value="x"), "tokenizer.json cannot be loaded"),
    (
        "xlm-roberta",
        "tokenizer.json",
        setting("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json cannot be loaded",
    ),
]
ACCEPTED: list[tuple[str, str, Change]] = [
    *(
        (kind, "tokenizer_config.json", setting(key, value=value))
        for kind in ("bert", "llama")
        for key, value in [
            ("tokenizer_class", None),
            ("model_max_length", 10**30),
            ("added_tokens_decoder", {"5": {"content": "one", "special": False}}),
            ("pad_token", TOKEN),
            ("extra_special_tokens", ["one", TOKEN]),
            ("extra_special_tokens", {"image_token": "one"}),
            ("additional_special_tokens", ["one"]),
            ("chat_template", [{"name": "default", "template": "x"}]),
            ("padding_side", "left"),
            ("add_bos_token", True),
        ]
    ),
    ("bert", "config.json", setting("classifier_dropout", value=0.5)),
    ("bert", "config.json", setting("eos_token_id", value=[1, 2])),
    ("llama", "config.json", setting("rope_scaling", value=None)),
    ("llama", "config.json", setting("attention_dropout", value=0)),
    ("llama", "config.json", setting("num_key_value_heads", value=2)),
    ("bert", "special_tokens_map.json", setting("pad_token", value={"content": "[PAD]", "lstrip": False})),
    ("bert", "added_tokens.json", whole({"one": 5})),
    ("llama", "generation_config.json", setting("compile_config", value={"mode": "default"})),
    ("llama", "generation_config.json", setting("cache_implementation", value="static")),
    ("llama", "generation_config.json", setting("eos_token_id", value=[1, 2])),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    classifiers = {
        kind: tiny_checkpoint(root / kind, family=TINY_FAMILIES[kind]) for kind in ("bert", "roberta", "xlm-roberta")
    }
    return {**classifiers, "llama": tiny_model(root / "llama", LLAMA)}


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> Callable[[str, str, Change], Path]:
    """A folder with the same changed checkpoint twice, `a` and `b`."""

    def make(kind: str, file: str, change: Change) -> Path:
        root = tmp_path / "inputs"
        for name in "ab":
            changed = Path(shutil.copytree(models[kind], root / name)) / file
            content = json.loads(changed.read_text()) if changed.exists() else {}
            returned = change(content)
            changed.write_text(json.dumps(content if returned is None else returned))
        return root

    return make


def of_validation(root: Path, data: Path) -> str | None:
    """The message with which validation refuses the merge, without the request's field; None if it accepts it."""
    artifacts = open_artifacts("folder", data)
    artifacts.prepare()
    sources = Sources(SourceContext((root,), data, artifacts, lambda _: None))
    checker = Checker(sources, lambda _: None)
    models = [{"name": name, "checkpoint": f"local:{name}"} for name in "ab"]
    try:
        checker.check(MergeRequest.model_validate({"models": models, "method": {"name": "linear"}}))
    except ProblemError as error:
        [found] = error.errors
        return found.message
    return None


def of_job(engine: Engine, root: Path, out: Path) -> str | None:
    try:
        engine.merge(merge_spec(out, [model_spec(root / name) for name in "ab"], {"name": "linear"}), silent)
    except EngineError as error:
        return error.message
    return None


def named(value: object) -> str:
    return str(getattr(value, "__name__", value))[:80]


@pytest.mark.parametrize(("kind", "file", "change", "says"), REFUSED, ids=named)
def test_what_validation_refuses_a_job_refuses_with_the_same_message(
    engine: Engine,
    tmp_path: Path,
    pair: Callable[[str, str, Change], Path],
    kind: str,
    file: str,
    change: Change,
    says: str,
) -> None:
    root = pair(kind, file, change)
    message = of_validation(root, tmp_path / "data")
    assert message is not None
    assert message.startswith("checkpoint local:a: ")
    assert file in message
    assert says in message
    assert of_job(engine, root, tmp_path / "out") == message


@pytest.mark.parametrize(("kind", "file", "change"), ACCEPTED, ids=named)
def test_what_validation_accepts_a_job_accepts(
    engine: Engine, tmp_path: Path, pair: Callable[[str, str, Change], Path], kind: str, file: str, change: Change
) -> None:
    root = pair(kind, file, change)
    assert of_validation(root, tmp_path / "data") is None
    assert of_job(engine, root, tmp_path / "out") is None
