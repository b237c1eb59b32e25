"""What a recipe says of the output's tokens: the vocabulary that is kept, single rows, padding, chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.tiny import edit_json, merge_spec, model_spec, read_model, silent
from tests.tiny_families import WORDS
from tests.tiny_language_models import LLAMA, tiny_model, word_level_tokenizer
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.jobs.engine import Engine

MARKS = ("<s>", "</s>", "<unk>")
WORDS_OF = {"base": WORDS[:20], "a": [*WORDS[5:20], "red"], "b": [*WORDS[24::-1]]}
TOKENS = {name: [*MARKS, *words] for name, words in WORDS_OF.items()}
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("tokens"), {}
    for seed, name in enumerate(WORDS_OF):
        found[name] = tiny_model(root / name, LLAMA, seed=seed, layers=1, vocab_size=len(TOKENS[name]))
        word_level_tokenizer(WORDS_OF[name]).save_pretrained(found[name])
    return found


def merged(folder: Path, folders: dict[str, Path], method: dict[str, Any] | None = None, **output: Any) -> Path:
    """`a` and half of `b` away from the base."""
    models = [model_spec(folders["a"]), model_spec(folders["b"], weight=0.5)]
    method = {"precision": "auto", "name": "task_arithmetic", "scale": 1.0, **(method or {})}
    spec = merge_spec(folder, models, method, **{"vocabulary": "base", **output})
    base = CheckpointSpec(source="local:base", path=folders["base"])
    Engine(torch.device("cpu")).merge(spec.model_copy(update={"base": base}), silent)
    return folder / "model"


def row(folders: dict[str, Path], model: str, matrix: str, token: str) -> Tensor:
    return read_model(folders[model])[matrix][TOKENS[model].index(token)].double()


def together(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return base + (a - base) + 0.5 * (b - base)


def test_the_vocabulary_of_a_model_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    model = merged(tmp_path, folders, vocabulary_of="b")
    assert Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab() == {t: i for i, t in enumerate(TOKENS["b"])}
    assert json.loads((model / "config.json").read_text())["vocab_size"] == len(TOKENS["b"])
    state = read_model(model)
    for matrix in MATRICES:
        assert len(state[matrix]) == len(TOKENS["b"])
        for place, token in enumerate(TOKENS["b"]):
            having = [row(folders, name, matrix, token) for name in ("a", "b") if token in TOKENS[name]]
            instead = row(folders, "base", matrix, token) if token in TOKENS["base"] else torch.stack(having).mean(0)
            own = [row(folders, n, matrix, token) if token in TOKENS[n] else instead for n in ("a", "b")]
            torch.testing.assert_close(state[matrix][place].double(), together(instead, *own), rtol=0, atol=1e-6)


def test_tokens_have_the_rows_that_are_asked_for_and_padding_has_the_mean(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokens = {
        "red": {"source": "model", "model": "a"},
        "<new>": {"source": "model", "model": "b", "id": 4},
        "<like>": {"source": "base", "token": WORDS[0]},
        "<zero>": {"source": "zero"},
        WORDS[7]: {"source": "model", "model": "b", "force": True},
        WORDS[3]: {"source": "model", "model": "b"},  # which a lacks
        WORDS[22]: {},  # of b alone
    }
    model = merged(tmp_path, folders, tokens=tokens, pad_to_multiple_of=32)
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
    assert vocabulary.keys() == {*TOKENS["base"], "red", "<new>", "<like>", "<zero>", WORDS[22]}
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 32
    state = read_model(model)
    for matrix in MATRICES:
        b4 = read_model(folders["b"])[matrix][4].double()
        red, like = row(folders, "a", matrix, "red"), row(folders, "base", matrix, WORDS[0])
        base3, b3 = (row(folders, name, matrix, WORDS[3]) for name in ("base", "b"))
        expected = {
            "red": red, "<new>": b4, "<like>": like, "<zero>": torch.zeros_like(red),
            WORDS[7]: row(folders, "b", matrix, WORDS[7]), WORDS[3]: together(base3, b3, b3),
            WORDS[22]: row(folders, "b", matrix, WORDS[22]),
        }  # fmt: skip
        found = state[matrix].double()
        assert len(found) == 32
        for token, wanted in expected.items():
            torch.testing.assert_close(found[vocabulary[token]], wanted, rtol=0, atol=1e-6, msg=token)
        for padding in found[len(vocabulary) :]:
            torch.testing.assert_close(padding, found[: len(vocabulary)].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ({"vocabulary_of": "c"}, "there is no model 'c'"),
        ({"tokens": {"<x>": {}}}, "no model has a row for the token '<x>'"),
        ({"tokens": {"<x>": {"source": "model", "model": "a"}}}, "local:a has no token '<x>'"),
        ({"tokens": {"<x>": {"source": "model", "model": "a", "id": 99}}}, "local:a has no row 99"),
        ({"tokens": {"<x>": {"source": "model", "model": "c"}}}, "there is no model 'c'"),
        ({"pad_to_multiple_of": 65_536, "vocabulary": "base", "tokens": None}, None),
    ],
)
def test_tokens_that_are_not_there_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, output: dict[str, Any], says: str | None
) -> None:
    if says is None:
        assert len(read_model(merged(tmp_path, folders, **output))[MATRICES[0]]) == 65_536
        return
    with pytest.raises(EngineError) as refused:
        merged(tmp_path, folders, **output)
    assert says in refused.value.message


def test_a_chat_template_is_published(folders: dict[str, Path], tmp_path: Path) -> None:
    named = {"base": "{{ 1 }}", "a": "{{ 2 }}", "b": "{{ 2 }}\n"}
    try:
        for name, template in named.items():
            edit_json(folders[name] / "tokenizer_config.json", chat_template=template)
        model = merged(tmp_path / "auto", folders, chat_template="auto")
        assert (model / "chat_template.jinja").read_text() == "{{ 2 }}"
        assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())
        model = merged(tmp_path / "given", folders, chat_template="{{ 3 }}")
        assert (model / "chat_template.jinja").read_text() == "{{ 3 }}"
        with pytest.raises(EngineError, match=r"it is no Jinja: .*broken") as refused:
            merged(tmp_path / "broken", folders, chat_template="{% broken")
        assert refused.value.detail["field"] == "output.chat_template"
    finally:
        for name in named:
            edit_json(folders[name] / "tokenizer_config.json", chat_template=None)
