"""Which rows of models whose tokenizers differ are the same token, and what is refused, from headers alone."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from app.contracts.requests import MergeRequest
from tests.tiny import edit_json, edit_tensors, tiny_base, tiny_checkpoint
from worker.engine.catalog import vocabulary as catalog
from worker.engine.catalog.errors import EngineError, IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.headers import CheckpointInfo, inspect_checkpoint, read_tokenizer
from worker.engine.catalog.planning import plan_merge
from worker.engine.catalog.vocabulary import Vocabulary, align_vocabularies, is_token_indexed, runs

ROWS = 12
MATRIX = "bert.embeddings.word_embeddings.weight"
Policy = Literal["union", "base"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 12 rows, to be given a tokenizer."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("vocabulary") / "m")
    edit_tensors(folder, lambda tensors: {**tensors, MATRIX: tensors[MATRIX][:ROWS].clone()})
    edit_json(folder / "config.json", vocab_size=ROWS)
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


Make = Callable[..., CheckpointInfo]


@pytest.fixture
def make(original: Path, tmp_path: Path) -> Make:
    def with_tokenizer(name: str, **files: Any) -> CheckpointInfo:
        """`tokenizer_json={}` is a file of that content."""
        folder = Path(shutil.copytree(original, tmp_path / name))
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            *stem, suffix = file.split("_")
            (folder / f"{'_'.join(stem)}.{suffix}").write_text(text)
        return inspect_checkpoint(folder, f"local:{name}")

    return with_tokenizer


def fast(vocab: Any, added: Sequence[Mapping[str, Any]] = (), **model: Any) -> dict[str, Any]:
    return {"tokenizer_json": {"model": {"vocab": vocab, **model}, "added_tokens": list(added)}}


def words(*tokens: str, **model: Any) -> dict[str, Any]:
    return fast({token: i for i, token in enumerate(tokens)}, type="WordPiece", **model)


def places(found: Vocabulary) -> list[list[int]]:
    return [list(rows) for rows in found.token_rows.models]


def test_rows_of_the_first_model_stay_and_others_are_found_by_token(make: Make) -> None:
    models = [make("a", **words("x", "y", "z")), make("b", **words("w", "z", "x")), make("c", **words("v", "w"))]
    padding = range(3, ROWS)
    found = align_vocabularies("base", models, None)
    assert (found.rows, found.tokens, found.new, found.token_rows.base) == (ROWS, 3, (), None)
    assert places(found) == [
        [0, 1, 2, *padding],
        [2, -1, 1, *[-1 for _ in padding]],
        [-1] * ROWS,
    ]
    found = align_vocabularies("union", models, None)
    assert (found.rows, found.tokens) == (ROWS + 2, 5)
    assert [(token.content, token.id) for token in found.new] == [("w", ROWS), ("v", ROWS + 1)]
    assert places(found) == [
        [0, 1, 2, *padding, -1, -1],
        [2, -1, 1, *[-1 for _ in padding], 0, -1],
        [*[-1] * ROWS, 1, 0],
    ]
    assert (found.shared, found.introduced) == ((3, 3, 2), (0, 1, 1))


def test_the_bases_vocabulary_comes_first(make: Make) -> None:
    base = make("base", **words("z", "u"))
    found = align_vocabularies("union", [make("a", **words("x", "z"))], base)
    assert found.owner is base
    assert found.token_rows.base is not None
    assert list(found.token_rows.base) == [*range(ROWS), -1]
    assert places(found) == [[1, *[-1] * (ROWS - 1), 0]]
    assert (found.shared, found.introduced) == ((2,), (1,))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([-1, -1], []),
        ([4, 5, 6], [(0, 4, 3)]),
        ([2, -1, 0, 1, 1, -1, -1, 7], [(0, 2, 1), (2, 0, 2), (4, 1, 1), (7, 7, 1)]),
        ([-1, 0], [(1, 0, 1)]),
    ],
)
def test_runs_are_contiguous_on_both_sides(rows: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(rows)) == expected


@pytest.mark.parametrize(
    ("name", "indexed"),
    [
        (MATRIX, True),
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("lm_head.weight", True),
        ("shared.weight", True),
        ("bert.embeddings.position_embeddings.weight", False),
        ("transformer.notwte.weight", False),
        ("classifier.weight", False),
    ],
)
def test_token_indexed_tensors_are_known_by_name(name: str, indexed: bool) -> None:
    assert is_token_indexed(name) is indexed


BPE = {"a": 0, "b": 1, "c": 2, "ab": 3}


def test_the_same_tokens_are_read_from_every_form(make: Make) -> None:
    added = {"id": 4, "content": "<new>", "special": True}
    forms = [
        make("json", **fast(BPE, [added], type="BPE", merges=[["a", "b"]])),
        make("older", **fast(BPE, [added], merges=["a b"])),
        make("files", vocab_json=BPE, merges_txt="#version: 0.2\na b\n", added_tokens_json={"<new>": 4}),
    ]
    for info in forms:
        found = read_tokenizer(info)
        assert found is not None
        assert (found.kind, found.ids, found.merges) == ("BPE", {**BPE, "<new>": 4}, (("a", "b"),)), info.source
        assert found.added.keys() == {"<new>"}
    pieces = read_tokenizer(make("unigram", **fast([["<unk>", 0.0], ["▁a", -1.5]])))
    assert pieces is not None
    assert (pieces.kind, pieces.ids, pieces.scores) == ("Unigram", {"<unk>": 0, "▁a": 1}, {"<unk>": 0.0, "▁a": -1.5})
    lines = make("lines", vocab_txt="x\n[UNK]\n", special_tokens_map_json={"unk_token": {"content": "[UNK]"}})
    plain = read_tokenizer(lines)
    assert plain is not None
    assert (plain.kind, plain.ids, plain.special) == ("WordPiece", {"x": 0, "[UNK]": 1}, {"unk_token": "[UNK]"})


def test_a_bpe_whose_merges_begin_as_the_others_lends_it_the_rest(make: Make) -> None:
    shorter = make("shorter", **fast(BPE, type="BPE", merges=["a b"]))
    longer = make("longer", **fast({**BPE, "abc": 4}, type="BPE", merges=["a b", "ab c"]))
    found = align_vocabularies("union", [shorter, longer], None)
    assert found.merges == (("ab", "c"),)
    assert [token.content for token in found.new] == ["abc"]
    assert align_vocabularies("union", [longer, shorter], None).merges == ()
    assert align_vocabularies("base", [shorter, longer], None).merges == ()


Files = dict[str, Any]
SPECIAL = {"tokenizer_config_json": {"pad_token": "[PAD]"}}
UNLIKE: dict[str, tuple[Policy, Files, Files, list[str]]] = {
    "of different kinds": (
        "base", words("x"), fast({"x": 0}, type="BPE", merges=[]), ["different kinds: WordPiece, BPE"],
    ),
    "merges of another order": (
        "base",
        fast(BPE, type="BPE", merges=["a b", "b c"]),
        fast(BPE, type="BPE", merges=["b c", "a b"]),
        ["merge characters in different orders"],
    ),
    "another special token": (
        "union",
        words("x") | SPECIAL,
        words("x") | {"tokenizer_config_json": {"pad_token": {"content": "<pad>"}}},
        ["pad_token differs: '[PAD]', '<pad>'"],
    ),
    "another unknown token": (
        "base", words("x", unk_token="[UNK]"), words("x", unk_token="<unk>"), ["unk_token differs"],
    ),
    "another mark of pieces": (
        "base", words("x", continuing_subword_prefix="##"), words("x", continuing_subword_prefix="@@"), ["mark pieces"],
    ),
    "other scores": (
        "base",
        fast([["a", -1.0], ["b", -2.0]], type="Unigram"),
        fast([["b", -2.5], ["a", -1.0]], type="Unigram"),
        ["'b' different scores"],
    ),
    "further pieces of a Unigram": (
        "union",
        fast([["a", -1.0]], type="Unigram"),
        fast([["a", -1.0], ["b", -2.0]], type="Unigram"),
        ["'b'", "use output.vocabulary 'base'"],
    ),
    "a Unigram that cannot number tokens after padding": (
        "union",
        fast([["a", -1.0]], type="Unigram"),
        fast([["a", -1.0]], [{"id": 1, "content": "<new>"}], type="Unigram"),
        ["1 tokens and 12 rows", "use output.vocabulary 'base'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_tokenizers_whose_tokens_are_not_the_same_are_refused_by_both_names(make: Make, case: str) -> None:
    policy, first, second, problem = UNLIKE[case]
    models = [make("first", **first), make("second", **second)]
    with pytest.raises(IncompatibleCheckpoints) as caught:
        align_vocabularies(policy, models, None)
    assert all(word in caught.value.message for word in ["local:first", "local:second", *problem]), caught.value.message


BAD: dict[str, tuple[Files, list[str]]] = {
    "sentencepiece alone": ({"spiece_model": "pieces"}, ["neither tokenizer.json", "save_pretrained"]),
    "no tokenizer": ({}, ["neither tokenizer.json"]),
    "of an unknown kind": (fast({"x": 0}, type="Unheard"), ["kind 'Unheard'", "BPE, WordPiece"]),
    "an id beyond the matrix": (fast({"x": ROWS}, type="WordPiece"), [f"ids up to {ROWS}", f"{ROWS} rows"]),
    "a negative id": (fast({"x": -1}, type="WordPiece"), ["'x' has the id -1"]),
    "an id that is text": (fast({"x": "0"}, type="WordPiece"), ["'x' has the id '0'"]),
    "a merge of three": (fast(BPE, type="BPE", merges=["a b c"]), ["no pair"]),
    "half a surrogate pair": (fast({"\ud800": 0}, type="WordPiece"), ["surrogates"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("position", [0, 1])
def test_a_tokenizer_without_usable_ids_is_refused_by_name(make: Make, case: str, position: int) -> None:
    files, problem = BAD[case]
    models = [make("good", **words("x"))]
    models.insert(position, make("bad", **files))
    with pytest.raises(InvalidCheckpoint) as caught:
        align_vocabularies("base", models, None)
    assert all(word in caught.value.message for word in ["local:bad", *problem]), caught.value.message


def test_union_adds_to_a_tokenizer_json_alone(make: Make) -> None:
    models = [make("lines", vocab_txt="x\n"), make("json", **words("x", "y"))]
    assert align_vocabularies("base", models, None).tokens == 1
    with pytest.raises(InvalidCheckpoint, match=r"local:lines.*tokenizer\.json"):
        align_vocabularies("union", models, None)


def test_a_matrix_of_other_rows_than_the_configuration_says_is_refused(make: Make) -> None:
    info = make("m", **words("x"))
    edit_json(info.path / "config.json", vocab_size=ROWS + 1)
    with pytest.raises(InvalidCheckpoint, match=rf"{MATRIX} has shape \[12, 16\].*vocab_size 13"):
        plan_merge([inspect_checkpoint(info.path, "local:m")], vocabulary="base")


def test_vocabularies_of_any_size_cost_a_bounded_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_ROWS", ROWS)
    models = [make("a", **words("x")), make("b", **words("y"))]
    assert align_vocabularies("base", models, None).rows == ROWS
    with pytest.raises(IncompatibleCheckpoints, match=f"more than {ROWS} rows"):
        align_vocabularies("union", models, None)
    monkeypatch.setattr(catalog, "MAX_ROWS", ROWS - 1)
    with pytest.raises(InvalidCheckpoint, match=f"local:a.*{ROWS} rows; {ROWS - 1} are allowed"):
        align_vocabularies("base", models, None)


def test_a_plan_has_the_outputs_rows_and_says_where_the_vocabularies_differ(make: Make) -> None:
    models = [make("a", **words("x", "y")), make("b", **words("y", "w"))]
    with pytest.raises(IncompatibleCheckpoints, match=r"different vocabularies; output\.vocabulary"):
        plan_merge(models)
    assert plan_merge(models[:1]).vocabulary is None
    found = plan_merge(models, vocabulary="union")
    assert found.vocabulary is not None
    by_name = {tensor.slot.name: tensor for tensor in found.backbone}
    assert by_name[MATRIX].shape == (ROWS + 1, 16)
    assert [tensor.slot.name for tensor in found.backbone if tensor.token_rows is not None] == [MATRIX]
    assert found.bytes_to_write - plan_merge(models, vocabulary="base").bytes_to_write == 16 * 4


def test_another_width_is_refused_whatever_the_vocabulary(make: Make) -> None:
    models = [make("a", **words("x")), make("b", **words("y"))]
    edit_tensors(models[1].path, lambda tensors: {**tensors, MATRIX: torch.zeros(ROWS, 8)})
    models[1] = inspect_checkpoint(models[1].path, "local:b")
    with pytest.raises(IncompatibleCheckpoints, match=rf"{MATRIX} has shape \[12, 16\].*\[12, 8\]"):
        plan_merge(models, vocabulary="base")


def test_a_base_without_tokenizer_cannot_be_aligned(make: Make, tmp_path: Path) -> None:
    base = inspect_checkpoint(tiny_base(tmp_path / "base"), "local:base")
    with pytest.raises(EngineError, match=r"local:base.*tokenizer"):
        plan_merge([make("a", **words("x"))], base=base, vocabulary="base")


def test_layers_are_not_refitted_where_tokens_differ() -> None:
    model = {"name": "a", "checkpoint": "local:a", "dataset": {"source": "local:rows"}}
    request = {"method": {"name": "aligned_regmean"}, "models": [model], "output": {"vocabulary": "base"}}
    with pytest.raises(ValidationError, match=r"token by token.*output\.vocabulary"):
        MergeRequest.model_validate(request)
