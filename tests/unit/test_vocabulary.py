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
from tests.tiny_families import WORDS
from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, QWEN2, T5, TinyModel, tiny_model, word_level_tokenizer
from worker.engine.catalog.checkpoints import vocabulary_checks
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.token_rows import runs
from worker.engine.catalog.checkpoints.token_tensors import is_token_indexed, vocabulary_size
from worker.engine.catalog.checkpoints.tokenizer_files import read_tokenizer
from worker.engine.catalog.checkpoints.vocabulary import Vocabulary, align_vocabularies
from worker.engine.catalog.contracts.spec import OutputSpec, VocabularyPolicy
from worker.engine.catalog.methods import PassthroughParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_job, plan_merge
from worker.engine.catalog.primitives.errors import EngineError, IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.primitives.slices import Slice

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
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", True),
        ("cls.predictions.bias", True),
        ("lm_head.bias", True),
        ("model.layers.0.mlp.shared.weight", False),
        ("bert.embeddings.position_embeddings.weight", False),
        ("transformer.notwte.weight", False),
        ("classifier.weight", False),
        ("cls.predictions.decoder.weight", True),
        ("embeddings.weight", True),
    ],
)
def test_token_indexed_tensors_are_known_by_name(name: str, indexed: bool) -> None:
    assert is_token_indexed(name, (20, 8), 20) is indexed


@pytest.mark.parametrize("name", ["vae.decoder.weight", "box.embeddings.weight", "proj_out.bias"])
def test_a_name_that_others_have_too_is_of_tokens_where_there_is_a_row_for_each(name: str) -> None:
    assert is_token_indexed(name, (20, 8), 20)
    assert not is_token_indexed(name, (16, 8), 20)
    assert not is_token_indexed(name, (), 20)
    assert is_token_indexed("lm_head.weight", (16, 8), 20), "it is refused for its rows"


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
    monkeypatch.setattr(vocabulary_checks, "MAX_ROWS", ROWS)
    models = [make("a", **words("x")), make("b", **words("y"))]
    assert align_vocabularies("base", models, None).rows == ROWS
    with pytest.raises(IncompatibleCheckpoints, match=f"more than {ROWS} rows"):
        align_vocabularies("union", models, None)
    monkeypatch.setattr(vocabulary_checks, "MAX_ROWS", ROWS - 1)
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


Edit = Callable[[Path], None]


def language_models(root: Path, model: TinyModel, second: Edit, both: Edit = lambda folder: None) -> list[Path]:
    """Two models, the second with 12 rows and 3 words less."""
    folders = [tiny_model(root / "a", model, seed=1), tiny_model(root / "b", model, seed=2, vocab_size=116)]
    word_level_tokenizer(WORDS[:-3]).save_pretrained(folders[1])
    for folder in folders:
        both(folder)
    second(folders[1])
    return folders


def planned(folders: Sequence[Path], policy: VocabularyPolicy) -> MergePlan:
    return plan_merge([inspect_checkpoint(path, f"local:{path.name}") for path in folders], vocabulary=policy)


def config(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **changes)


def special(**tokens: str) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **tokens)


def with_tensor(name: str, *shape: int) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: {**tensors, name: torch.zeros(shape)})


def with_inner_config(folder: Path) -> None:
    """As models of images and text have it."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    inner = {key: content.pop(key) for key in ("vocab_size", "eos_token_id")}
    file.write_text(json.dumps({**content, "model_type": "own", "text_config": inner}))


def with_positions(folder: Path) -> None:
    with_tensor("transformer.wpe.weight", 116, 16)(folder)
    edit_json(folder / "config.json", n_positions=116)


def nothing(folder: Path) -> None:
    pass


def test_a_language_models_vocabulary_is_refused_with_advice_or_planned_by_token(tmp_path: Path) -> None:
    folders = language_models(tmp_path, LLAMA, nothing)
    with pytest.raises(IncompatibleCheckpoints, match=r"vocab_size differs: 128, 116; output\.vocabulary"):
        planned(folders, "error")
    edit_tensors(folders[1], lambda ts: {n: padded(t) if n.endswith(BY_TOKEN) else t for n, t in ts.items()})
    edit_json(folders[1] / "config.json", vocab_size=128)
    with pytest.raises(IncompatibleCheckpoints, match=r"different vocabularies; output\.vocabulary"):
        planned(folders, "error")
    plan = planned(folders[::-1], "union")
    assert plan.merges_heads
    assert plan.vocabulary is not None
    assert [token.content for token in plan.vocabulary.new] == list(WORDS[-3:])
    by_token = {tensor.slot.name: tensor.shape for tensor in plan.backbone if tensor.token_rows is not None}
    assert by_token == {"model.embed_tokens.weight": (131, 16), "lm_head.weight": (131, 16)}


BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")


def padded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, torch.zeros(128 - len(tensor), 16)])


@pytest.mark.parametrize("model", [QWEN2, T5, MASKED_BERT], ids=lambda model: model.model_type)
def test_copies_of_tied_matrices_are_left_out_whichever_rows_they_have(tmp_path: Path, model: TinyModel) -> None:
    def store_copies(folder: Path) -> None:
        edit_tensors(folder, lambda ts: {**ts, **{copy: ts[of].clone() for copy, of in model.tied.items()}})

    plan = planned(language_models(tmp_path, model, store_copies), "base")
    assert not {tensor.slot.name for tensor in plan.backbone} & set(model.tied)
    assert {(copy.name, of.name) for copy, of in plan.tied} == set(model.tied.items())


TAKEN: dict[str, tuple[TinyModel, Edit, Edit]] = {
    "other ends of text and padding of a decoder": (
        LLAMA, config(eos_token_id=4, pad_token_id=5), special(eos_token="two", pad_token="three"),
    ),
    "other ids of tokens": (T5, config(eos_token_id=4, decoder_start_token_id=5), nothing),
    "a configuration of the text within": (GPT2, nothing, with_inner_config),
    "positions as many as tokens": (GPT2, with_positions, nothing),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_follows_from_the_vocabulary_may_differ(tmp_path: Path, case: str) -> None:
    model, second, also = TAKEN[case]
    folders = language_models(tmp_path, model, second, also)
    if "positions" in case:
        with_positions(folders[0])
    found = planned(folders, "base").vocabulary
    assert found is not None
    assert found.rows == 128
    published = found.config(inspect_checkpoint(folders[1], "local:b").config)
    assert vocabulary_size(published) == 128
    of_owner = json.loads((folders[0] / "config.json").read_text())
    part, owner = (c.get("text_config", c) for c in (published, of_owner))
    assert part.get("eos_token_id") == owner.get("eos_token_id")


REFUSED: dict[str, tuple[TinyModel, Edit, list[str]]] = {
    "padding from which positions may be counted": (
        MASKED_BERT, config(pad_token_id=5), ["pad_token_id differs", "0, 5"],
    ),
    "a padding token that a decoder begins with": (
        T5, special(pad_token="two"), ["pad_token differs", "'<s>', 'two'"],
    ),
    "another unknown token": (LLAMA, special(unk_token="two"), ["unk_token differs", "'<unk>', 'two'"]),
    "another setting": (LLAMA, config(hidden_act="gelu"), ["hidden_act differs"]),
    "values by token of an unknown name": (
        GPT2, with_tensor("final_logits_bias", 1, 116), ["local:b", "final_logits_bias", "each of 116 tokens"],
    ),
    "no tokenizer": (LLAMA, lambda folder: (folder / "tokenizer.json").unlink(), ["local:b", "tokenizer.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_of_language_models_is_refused(tmp_path: Path, case: str) -> None:
    model, second, problem = REFUSED[case]
    folders = language_models(tmp_path, model, second)
    if "decoder begins" in case:
        special(pad_token="<s>")(folders[0])
    with pytest.raises(EngineError) as caught:
        planned(folders, "union")
    assert all(word in caught.value.message for word in problem), caught.value.message


def test_stacked_layers_have_one_vocabulary(tmp_path: Path) -> None:
    """Its rows are those of the models that the first and the last slice are of."""
    folders = language_models(tmp_path, LLAMA, nothing)
    infos = [inspect_checkpoint(path, f"local:{path.name}") for path in folders]
    method = PassthroughParameters(slices=[Slice(model=name, layers=(0, 2)) for name in "ab"])
    with pytest.raises(IncompatibleCheckpoints, match=r"output\.vocabulary 'base' or 'union'"):
        plan_job(method, ["a", "b"], infos, OutputSpec())
    found = plan_job(method, ["a", "b"], infos, OutputSpec(vocabulary="union"))
    assert found.vocabulary is not None
    by_name = {tensor.slot.name: tensor for tensor in found.backbone}
    for name, model in (("model.embed_tokens.weight", 0), ("lm_head.weight", 1)):
        rows = by_name[name].token_rows
        assert rows is not None
        assert [tensor.source for tensor in by_name[name].sources] == [infos[model].source]
        assert rows.models == (found.vocabulary.token_rows.models[model],)
        assert not by_name[name].is_copied
