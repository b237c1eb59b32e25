"""Merges of models whose tokenizers differ, against a computation by token, dense and in float64."""

import json
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import (
    Tensors,
    edit_json,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_base,
    tiny_checkpoint,
    write_rows,
)
from tests.tiny_families import TINY_BERT, TINY_FAMILIES, WORDS, numbered
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.token_rows import TokenRows
from worker.engine.catalog.contracts.spec import CheckpointSpec, MergeSpec
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.planning.plan import PlannedTensor
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.jobs.engine import Engine
from worker.engine.merging.token_rows import read_by_token

Array = NDArray[np.float64]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MATRIX = "bert.embeddings.word_embeddings.weight"
COMMON = tuple(WORDS[:40])
VOCABULARIES = {
    "x": (*SPECIAL, *COMMON, "red", "##ish", "green"),
    "y": (*COMMON[::-1], "blue", *SPECIAL, "green"),  # other ids, and [PAD] is not 0
    "z": (*SPECIAL, *COMMON[:30], "violet", "blue"),
    "base": (*SPECIAL, *COMMON, "violet"),
}
WEIGHTS = {"x": 1.0, "y": 3.0, "z": 0.5}
PADDING = {"x": 3, "base": 2}  # rows of no token


def checkpoint(root: Path, name: str, seed: int, tokens: Sequence[str], padding: int = 0) -> Path:
    """A tiny BERT with these WordPiece tokens."""
    from transformers import BertTokenizer

    folder = root / name
    family = replace(TINY_BERT, tokenizer=lambda: BertTokenizer(vocab=numbered(*tokens), model_max_length=48))
    if name == "base":
        tiny_base(folder, family=family)
        family.tokenizer().save_pretrained(folder)
    else:
        tiny_checkpoint(folder, family=family, seed=seed)
    ids = {"pad_token_id": tokens.index("[PAD]")}
    edit_json(folder / "config.json", vocab_size=len(tokens) + padding, **ids)
    edit_tensors(folder, lambda tensors: {name: padded(name, t, padding, seed) for name, t in tensors.items()})
    return folder


def padded(name: str, tensor: torch.Tensor, padding: int, seed: int) -> torch.Tensor:
    if not name.endswith("word_embeddings.weight"):
        return tensor
    more = torch.randn(padding, tensor.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([tensor, more])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabulary")
    found = {}
    for seed, (name, tokens) in enumerate(VOCABULARIES.items()):
        found[name] = checkpoint(root, name, seed, tokens, PADDING.get(name, 0))
        write_rows(root / f"{name}.jsonl", seed=seed)
    return found


def spec(
    models: Mapping[str, Path], folder: Path, policy: str, method: Mapping[str, Any], based: bool, **fields: Any
) -> MergeSpec:
    experts = [name for name in models if name != "base"]
    rows = {name: models[name].parent / f"{name}.jsonl" for name in experts}
    weights = {**WEIGHTS, **fields.pop("weights", {})}
    chosen = [model_spec(models[name], rows[name], weight=weights[name]) for name in experts]
    made = merge_spec(folder, chosen, method, vocabulary=policy, **fields)
    base = CheckpointSpec(source="local:base", path=models["base"]) if based else None
    return made.model_copy(update={"base": base})


def expected_tokens(policy: str, based: bool) -> list[str | None]:
    """By row of the output; None for rows of no token."""
    owner = "base" if based else "x"
    tokens: list[str | None] = [*VOCABULARIES[owner], *[None] * PADDING[owner]]
    for name in ("x", "y", "z"):
        tokens += [t for t in VOCABULARIES[name] if t not in tokens and policy == "union"]
    return tokens


def versions(
    models: Mapping[str, Path], policy: str, based: bool, taking_part: Sequence[str] = ("x", "y", "z")
) -> tuple[dict[str, Array], list[str | None]]:
    """Each model's rows, and the base's, by the documented rule."""
    own = {name: read_model(path) for name, path in models.items()}
    matrices = {
        name: next(t for key, t in tensors.items() if key.endswith("word_embeddings.weight")).double().numpy()
        for name, tensors in own.items()
    }
    tokens = expected_tokens(policy, based)
    owner = "base" if based else "x"

    def row_of(name: str, place: int, token: str | None) -> Array | None:
        if token is None:
            return matrices[name][place] if name == owner else None
        known = VOCABULARIES[name]
        return matrices[name][known.index(token)] if token in known else None

    found: dict[str, list[Array]] = {name: [] for name in ("x", "y", "z", "base")}
    for place, token in enumerate(tokens):
        rows = {name: row_of(name, place, token) for name in ("x", "y", "z")}
        base = row_of("base", place, token) if based else None
        having = [r for name, r in rows.items() if r is not None and name in taking_part]
        having = having or [r for r in rows.values() if r is not None]
        instead = base if base is not None else np.mean(having, axis=0)
        for name, row in rows.items():
            found[name].append(instead if row is None else row)
        found["base"].append(instead)
    return {name: np.array(rows) for name, rows in found.items()}, tokens


def weighted(found: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    total: Array = sum(weights[n] * found[n] for n in weights) / sum(weights.values())  # type: ignore[assignment]
    return total


@pytest.mark.parametrize("policy", ["base", "union"])
@pytest.mark.parametrize("based", [False, True])
def test_every_row_is_the_average_of_the_models_versions_of_its_token(
    models: dict[str, Path], tmp_path: Path, policy: str, based: bool
) -> None:
    Engine().merge(spec(models, tmp_path, policy, {"name": "average"}, based), silent)
    found, tokens = versions(models, policy, based)
    for name in WEIGHTS:
        folder = tmp_path / "models" / name
        merged = read_model(folder)
        np.testing.assert_allclose(merged[MATRIX].numpy(), weighted(found, WEIGHTS), rtol=1e-5, atol=1e-6)
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens) if token is not None}
        assert len(tokenizer) == sum(token is not None for token in tokens)
        assert model.config.vocab_size == len(tokens)
        assert model.config.pad_token_id == tokenizer.pad_token_id == tokens.index("[PAD]")
        others = {key: t for key, t in merged.items() if key != MATRIX and not key.startswith("classifier")}
        states = {name: read_model(models[name]) for name in WEIGHTS}
        for key, tensor in others.items():
            dense = weighted({name: state[key].double().numpy() for name, state in states.items()}, WEIGHTS)
            np.testing.assert_allclose(tensor.numpy(), dense, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("policy", ["base", "union"])
def test_task_vectors_of_what_a_model_lacks_are_zero(models: dict[str, Path], tmp_path: Path, policy: str) -> None:
    method = {"name": "task_arithmetic", "scale": 0.7}
    Engine().merge(spec(models, tmp_path, policy, method, based=True), silent)
    found, _ = versions(models, policy, based=True)
    deltas = {name: found[name] - found["base"] for name in WEIGHTS}
    dense = found["base"] + 0.7 * sum(WEIGHTS[name] * deltas[name] for name in WEIGHTS)
    merged = read_model(tmp_path / "models" / "x")[MATRIX].numpy()
    np.testing.assert_allclose(merged, dense, rtol=1e-5, atol=1e-6)


def test_a_model_that_takes_no_part_is_asked_only_for_what_no_other_has(
    models: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"x": 0.0}
    Engine().merge(spec(models, tmp_path, "union", {"name": "average"}, based=False, weights=weights), silent)
    found, _ = versions(models, "union", based=False, taking_part=("y", "z"))
    dense = weighted(found, {"y": WEIGHTS["y"], "z": WEIGHTS["z"]})
    merged = read_model(tmp_path / "models" / "x")[MATRIX].numpy()
    np.testing.assert_allclose(merged, dense, rtol=1e-5, atol=1e-6)


def test_tokens_of_another_order_are_merged_by_token(tmp_path: Path) -> None:
    """Under `base` the merge is that of models whose tokens were renumbered before."""
    tokens = VOCABULARIES["x"]
    order = [*range(len(tokens) - 1, -1, -1)]
    plain = [checkpoint(tmp_path / "plain", name, seed, tokens) for seed, name in enumerate("xy")]
    shuffled = checkpoint(tmp_path / "shuffled", "y", 1, [tokens[i] for i in order])

    def renumber(_: Tensors) -> Tensors:
        state = read_model(plain[1])
        return {**state, MATRIX: state[MATRIX][order]}

    edit_tensors(shuffled, renumber)
    for name, pair, policy in (("one", plain, "error"), ("two", [plain[0], shuffled], "base")):
        chosen = [model_spec(path) for path in pair]
        Engine().merge(merge_spec(tmp_path / name, chosen, {"name": "average"}, vocabulary=policy), silent)
    one, two = (read_model(tmp_path / name / "models" / "y") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_heads_are_aligned_and_models_compared_in_the_tokens_of_each(tmp_path: Path) -> None:
    """Renumbered tokens change nothing: not the aligned head, not one metric."""
    tokens = VOCABULARIES["x"]
    order = [*range(len(tokens) - 1, -1, -1)]
    same = {name: checkpoint(tmp_path / "same", name, seed, tokens) for seed, name in enumerate("xy")}
    other = {name: Path(shutil.copytree(path, tmp_path / "other" / name)) for name, path in same.items()}
    shutil.rmtree(other["y"])
    checkpoint(tmp_path / "other", "y", 1, [tokens[i] for i in order])

    def renumber(_: Tensors) -> Tensors:
        state = read_model(same["y"])
        return {**state, MATRIX: state[MATRIX][order]}

    edit_tensors(other["y"], renumber)
    results = {}
    for policy, pair in (("error", same), ("base", other)):
        chosen = []
        for seed, (name, path) in enumerate(pair.items()):
            rows = write_rows(tmp_path / f"{name}.jsonl", seed=seed)
            evaluation = {"source": "local:rows", "path": write_rows(tmp_path / f"{name}-e.jsonl", seed=seed + 9)}
            evaluation |= {"label": "label", "metric": "accuracy"}
            chosen.append(model_spec(path, rows, evaluation=evaluation))
        out, output = tmp_path / f"out-{policy}", {"vocabulary": policy, "align_heads": True}
        results[policy] = Engine().merge(merge_spec(out, chosen, {"name": "average"}, evaluate=True, **output), silent)
    assert results["base"].metrics == results["error"].metrics
    assert all(model.aligned_examples for model in results["base"].models)
    for name in "xy":
        heads = [read_model(tmp_path / f"out-{p}" / "models" / name)["classifier.weight"] for p in ("error", "base")]
        torch.testing.assert_close(heads[0], heads[1])


def test_merged_heads_read_the_tokens_of_the_output(models: dict[str, Path], tmp_path: Path) -> None:
    """Every row is in the tokens of the one model that is published, whichever model it was for."""
    pair = {name: models[name] for name in ("x", "y")}
    chosen = []
    for seed, (name, path) in enumerate(pair.items()):
        evaluation = {"source": "local:rows", "path": write_rows(tmp_path / f"{name}.jsonl", seed=seed)}
        evaluation |= {"label": "label", "metric": "accuracy"}
        chosen.append(model_spec(path, weight=WEIGHTS[name], evaluation=evaluation))
    output = {"vocabulary": "union", "heads": "merged"}
    made = merge_spec(tmp_path / "out", chosen, {"name": "average"}, evaluate=True, **output)
    metrics = Engine().merge(made, silent).metrics
    merged = read_model(tmp_path / "out" / "model")
    states = {name: read_model(path) for name, path in pair.items()}
    for key in ("classifier.weight", "classifier.bias"):
        dense = weighted({name: state[key].double().numpy() for name, state in states.items()}, {"x": 1.0, "y": 3.0})
        np.testing.assert_allclose(merged[key].numpy(), dense, rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    assert len(merged[MATRIX]) == len(tokenizer) + PADDING["x"]
    assert metrics is not None
    for name in pair:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        right = 0
        for row in rows:
            inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=48)
            right += int(model(**inputs).logits.argmax()) == row["label"]
        assert metrics[name].merged == pytest.approx(right / len(rows))


def test_rows_are_the_same_in_blocks_of_any_size(models: dict[str, Path]) -> None:
    infos = {name: inspect_checkpoint(path, name) for name, path in models.items()}
    base = infos.pop("base")
    plan = plan_merge(list(infos.values()), base=base, vocabulary="union")
    [planned] = [tensor for tensor in plan.backbone if tensor.token_rows is not None]
    rows = planned.shape[0]
    with TensorReader() as reader:
        whole = read_by_token(reader, planned, [0, 2], slice(0, rows))
        for step in (1, 7):
            cuts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
            blocks = [read_by_token(reader, planned, [0, 2], cut) for cut in cuts]
            for index, version in enumerate(whole.versions):
                assert torch.equal(torch.cat([block.versions[index] for block in blocks]), version)
            bases = [block.base for block in blocks if block.base is not None]
            assert whole.base is not None
            assert torch.equal(torch.cat(bases), whole.base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_biases_of_a_language_models_head_follow_their_tokens(tmp_path: Path, dtype: torch.dtype) -> None:
    own = [torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([4.0, 6.0])]
    sources: list[TensorInfo] = []
    for index, bias in enumerate(own):
        save_file({"lm_head.bias": bias}, tmp_path / f"{index}.safetensors")
        sources += read_header(tmp_path / f"{index}.safetensors", f"m{index}")
    places = TokenRows((array("i", [0, 1, 2, -1]), array("i", [1, -1, -1, 0])), None)
    slot = Slot("lm_head.bias", Kind.HEAD, None, True)
    planned = PlannedTensor(slot, TensorPlace("lm_head.bias", 1.0), (4,), "F32", tuple(sources), token_rows=places)
    with TensorReader() as reader:
        found = read_by_token(reader, planned, [0, 1], slice(0, 4))
    assert [version.tolist() for version in found.versions] == [[1, 2, 3, 4], [6, 2, 3, 4]]
    assert {version.dtype for version in found.versions} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert found.base is None


def test_fisher_information_is_of_tokens_and_none_of_those_a_model_lacks(
    models: dict[str, Path], tmp_path: Path
) -> None:
    pair = {name: models[name] for name in ("x", "z")}
    method = {"name": "fisher", "examples": 8, "normalize": False, "floor": 0}
    Engine().merge(spec(pair, tmp_path, "union", method, based=False), silent)
    merged = read_model(tmp_path / "models" / "x")[MATRIX]
    own = {name: read_model(path)[MATRIX] for name, path in pair.items()}
    x, z = (VOCABULARIES[name] for name in ("x", "z"))
    red, violet = x.index("red"), len(x) + PADDING["x"]
    torch.testing.assert_close(merged[red], own["x"][red])
    torch.testing.assert_close(merged[violet], own["z"][z.index("violet")])
    word = x.index("one")
    low, high = torch.stack([own["x"][word], own["z"][z.index("one")]]).aminmax(dim=0)
    torch.testing.assert_close(merged[word], merged[word].clamp(low, high))


def test_a_row_that_is_no_number_is_blamed_on_its_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Not on the one before, which would get it as the mean."""
    spoilt = {name: Path(shutil.copytree(path, tmp_path / "in" / name)) for name, path in models.items()}
    for name in "xyz":
        shutil.copy(models[name].parent / f"{name}.jsonl", tmp_path / "in")

    def spoil(tensors: Tensors) -> None:
        tensors[MATRIX][VOCABULARIES["y"].index("blue"), 3] = float("nan")

    edit_tensors(spoilt["y"], spoil)
    with pytest.raises(InvalidCheckpoint, match=f"local:y.*{MATRIX}"):
        Engine().merge(spec(spoilt, tmp_path / "out", "union", {"name": "average"}, based=False), silent)


@pytest.mark.parametrize("older", [False, True])
def test_new_tokens_are_found_in_text_as_in_the_model_that_has_them(
    models: dict[str, Path], tmp_path: Path, older: bool
) -> None:
    """Also where transformers before version 5 wrote the files."""
    pair = {name: Path(shutil.copytree(models[name], tmp_path / "in" / name)) for name in ("x", "y")}
    for name in pair:
        shutil.copy(models[name].parent / f"{name}.jsonl", tmp_path / "in")
    tokenizer = AutoTokenizer.from_pretrained(pair["y"])
    tokenizer.add_tokens(["<Special>"], special_tokens=True)
    tokenizer.add_tokens(["Plain"])
    tokenizer.save_pretrained(pair["y"])
    edit_tensors(pair["y"], lambda tensors: {n: padded(n, t, 2, 5) for n, t in tensors.items()})
    edit_json(pair["y"] / "config.json", vocab_size=len(tokenizer))
    if older:
        for folder in pair.values():
            entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
            edit_json(folder / "tokenizer_config.json", added_tokens_decoder={str(e.pop("id")): e for e in entries})
    Engine().merge(spec(pair, tmp_path / "out", "union", {"name": "average"}, based=False), silent)
    out = tmp_path / "out" / "models" / "x"
    found = AutoTokenizer.from_pretrained(out)
    decoder = json.loads((out / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
    ids = [str(found.convert_tokens_to_ids(token)) for token in ("<Special>", "Plain")]
    assert [decoder[i]["special"] for i in ids if older] == [True, False][: 2 * older]
    text = "one blue<Special>two Plain plain green"
    assert found.tokenize(text) == tokenizer.tokenize(text)
    assert found.tokenize("redish reds") == ["red", "##ish", "[UNK]"]
    assert {str(t) for t in found.added_tokens_decoder.values() if t.special} == {*SPECIAL, "<Special>"}
    matrix = read_model(tmp_path / "out" / "models" / "x")[MATRIX]
    own = read_model(pair["y"])[MATRIX]
    for token in ("<Special>", "Plain", "blue"):
        torch.testing.assert_close(
            matrix[found.convert_tokens_to_ids(token)], own[tokenizer.convert_tokens_to_ids(token)]
        )


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_families_of_other_tokenizers_take_added_tokens(name: str, tmp_path: Path) -> None:
    family = TINY_FAMILIES[name]
    chosen = []
    for seed, added in enumerate((["<extra>"], ["<other>", "<extra>"])):

        def tokenizer(added: Sequence[str] = added) -> Any:
            made = family.tokenizer()
            made.add_tokens(added)
            return made

        folder = tmp_path / f"m{seed}"
        tiny_checkpoint(folder, family=replace(family, tokenizer=tokenizer), seed=seed)
        chosen.append(folder)
    specs = [model_spec(path) for path in chosen]
    Engine().merge(merge_spec(tmp_path / "out", specs, {"name": "average"}, vocabulary="union"), silent)
    folder = tmp_path / "out" / "models" / "m1"
    own = [AutoTokenizer.from_pretrained(path) for path in chosen]
    found = AutoTokenizer.from_pretrained(folder)
    assert len(found) == len(own[0]) + 1 == AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size
    text = "one two<extra>three <other>four"
    assert found.tokenize(text) == own[1].tokenize(text)
    matrices = [read_model(path)["roberta.embeddings.word_embeddings.weight"] for path in (*chosen, folder)]
    extra = [t.convert_tokens_to_ids("<extra>") for t in (*own, found)]
    mean = (matrices[0][extra[0]].double() + matrices[1][extra[1]].double()) / 2
    torch.testing.assert_close(matrices[2][extra[2]].double(), mean, rtol=1e-5, atol=1e-6)


def test_a_union_of_bpe_merges_text_as_the_longer_of_both(tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    family = TINY_FAMILIES["roberta"]
    family.tokenizer().save_pretrained(tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    chosen = []
    for seed, left_out in enumerate((10, 0)):
        kept = merges[: len(merges) - left_out]
        made = {"".join(merge) for merge in merges[len(kept) :]}
        vocabulary = {token: i for token, i in model["vocab"].items() if token not in made}

        def tokenizer(vocabulary: Mapping[str, int] = vocabulary, kept: Sequence[Any] = kept) -> Any:
            return RobertaTokenizer(vocab=dict(vocabulary), merges=list(kept))

        folder = tmp_path / f"m{seed}"
        tiny_checkpoint(folder, family=replace(family, tokenizer=tokenizer), seed=seed)
        chosen.append(folder)
    for policy, like in (("union", 1), ("base", 0)):
        out = tmp_path / policy
        specs = [model_spec(path) for path in chosen]
        Engine().merge(merge_spec(out, specs, {"name": "average"}, vocabulary=policy), silent)
        found = AutoTokenizer.from_pretrained(out / "models" / "m0")
        expected = AutoTokenizer.from_pretrained(chosen[like])
        assert found.get_vocab() == expected.get_vocab()
        text = " ".join(WORDS)
        assert found.tokenize(text) == expected.tokenize(text)
