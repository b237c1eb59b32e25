"""Answers to single rows: against what transformers gives with the models' own folders."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts
from tests.tiny_families import DECODERS, ENCODER_DECODERS, TINY_BERT, TinyFamily
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.contracts.prediction import PredictionSpec, RowPrediction
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, InvalidDataset, InvalidRequest
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel

TEXTS = tiny_texts(3, 4, longest=12)
NEW = 6
CHAT = "{% for one in messages %}{{ one['role'] ~ ' ' ~ one['content'] ~ ' ' }}{% endfor %}"
Answer = dict[str, Any]


class Merge:
    """Two models and their merge, as its job leaves it."""

    def __init__(self, engine: Engine, root: Path, family: TinyFamily = TINY_BERT, **made: Any) -> None:
        self.engine, self.root = engine, root
        self.experts = [
            tiny_checkpoint(root / name, family=family, seed=seed, **made) for seed, name in enumerate("ab")
        ]
        self.spec = merge_spec(
            root / "artifact", [model_spec(one) for one in self.experts], {"name": "slerp", "t": 0.3}
        )
        engine.merge(self.spec, silent)
        heads = "models/a" if (root / "artifact" / "models").exists() else "model"
        self.merged = root / "artifact" / heads

    def asked(self, rows: Sequence[Any], **changed: Any) -> PredictionSpec:
        fields = self.spec.model_dump(include={"name", "recipe", "models", "method", "output"})
        merged = CheckpointSpec(source="the merge", path=self.merged)
        return PredictionSpec.model_validate(
            {
                **fields,
                "folder": self.root,
                "model": "a",
                "merged": merged,
                "rows": list(rows),
                "new_tokens": NEW,
                **changed,
            }
        )

    def answers(self, rows: Sequence[Any]) -> list[RowPrediction]:
        return self.engine.predict(self.asked(rows), silent).rows

    def average(self, auto_class: Any, head: str) -> Any:
        """The plain average with the head of the first model, by transformers alone."""
        first, second = (auto_class.from_pretrained(folder).eval() for folder in self.experts)
        others = second.state_dict()
        with torch.no_grad():
            for name, tensor in first.state_dict().items():
                if not (head and name.startswith(head)):
                    tensor.copy_((tensor.double() + others[name].double()) / 2)
        return first


def assert_side_by_side(
    merge: Merge, auto_class: Any, head: str, rows: Sequence[Any], answer: Callable[..., Answer]
) -> None:
    """Each answer is that of the same model as transformers loads it; with all rows in a batch or one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(merge.merged)
    models = {
        "expert": auto_class.from_pretrained(merge.experts[0]).eval(),
        "average": merge.average(auto_class, head),
        "merged": auto_class.from_pretrained(merge.merged).eval(),
    }
    found = merge.answers(rows)
    assert len(found) == len(rows)
    seen = set()
    for row, answers in zip(rows, found, strict=True):
        for version, model in models.items():
            with torch.no_grad():
                wanted = answer(model, tokenizer, row)
            given = getattr(answers, version).model_dump()
            texts, numbers = parts(wanted)
            told, values = parts(given)
            assert told == texts, version
            assert values == pytest.approx(numbers, rel=1e-4, abs=1e-5), version
            seen.add(json.dumps(given))
    assert len(seen) > len(rows), "the models answer differently, or nothing was compared"


def parts(answer: Answer) -> tuple[dict[str, str], dict[str, float]]:
    """The texts of an answer and its numbers, by their paths."""
    found = flat(answer)
    texts = {path: value for path, value in found.items() if isinstance(value, str)}
    return texts, {path: value for path, value in found.items() if path not in texts}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {path: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: one for part, below in inner for name, one in flat(below, f"{path}.{part}").items()}


def chosen(model: Any, probabilities: torch.Tensor) -> Answer:
    """The likeliest label of a vector, and the probabilities of all."""
    names = model.config.id2label
    return {
        "label": names[int(probabilities.argmax())],
        "probabilities": {names[index]: float(value) for index, value in enumerate(probabilities)},
    }


def test_classes_have_their_names_and_probabilities(engine: Engine, tmp_path: Path) -> None:
    def answer(model: Any, tokenizer: Any, row: Any) -> Answer:
        texts = (row,) if isinstance(row, str) else tuple(row.values())
        return chosen(model, model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(0))

    merge = Merge(engine, tmp_path, labels=3)
    rows = [*TEXTS, {"text": TEXTS[0], "text_pair": TEXTS[1]}]
    assert_side_by_side(merge, AutoModelForSequenceClassification, "classifier", rows, answer)
    [first] = merge.answers(rows[:1])
    likeliest = list(first.merged.model_dump()["probabilities"].values())
    assert likeliest == sorted(likeliest, reverse=True)


@pytest.mark.long
def test_labels_that_are_independent_and_numbers(engine: Engine, tmp_path: Path) -> None:
    def labels(model: Any, tokenizer: Any, row: str) -> Answer:
        found = model(**tokenizer(row, return_tensors="pt")).logits[0].sigmoid()
        names = model.config.id2label
        applying = [names[index] for index, value in enumerate(found.tolist()) if value > 0.5]
        return {"labels": applying, "probabilities": chosen(model, found)["probabilities"]}

    def number(model: Any, tokenizer: Any, row: str) -> Answer:
        return {"value": float(model(**tokenizer(row, return_tensors="pt")).logits)}

    auto_class = AutoModelForSequenceClassification
    several = Merge(engine, tmp_path / "several", labels=3, problem_type="multi_label_classification")
    assert_side_by_side(several, auto_class, "classifier", TEXTS, labels)
    assert_side_by_side(Merge(engine, tmp_path / "one", labels=1), auto_class, "classifier", TEXTS, number)


def test_each_word_has_a_label_and_those_without_a_token_are_refused(engine: Engine, tmp_path: Path) -> None:
    def answer(model: Any, tokenizer: Any, row: Any) -> Answer:
        words = row.split() if isinstance(row, str) else row["tokens"]
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        logits, of_words = model(**encoded).logits[0], encoded.word_ids()
        first = [of_words.index(word) for word in range(len(words))]
        return {"words": [chosen(model, logits[place].softmax(0)) for place in first]}

    merge = Merge(engine, tmp_path, labels=3, task="TokenClassification")
    rows = [*TEXTS, {"tokens": TEXTS[0].split()}]
    assert_side_by_side(merge, AutoModelForTokenClassification, "classifier", rows, answer)
    with pytest.raises(InvalidDataset, match="row 2: 1 of its words have no token"):
        merge.answers([TEXTS[0], {"tokens": [TEXTS[1].split()[0], "\u200b"]}])


def written(model: Any, tokenizer: Any, encoded: Any, before: int) -> Answer:
    [tokens] = model.generate(**encoded, do_sample=False, max_new_tokens=NEW)[:, before:].tolist()
    ends = model.generation_config.eos_token_id
    new = tokens[: tokens.index(ends)] if ends in tokens else tokens
    return {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)}


def test_language_models_write_after_texts_and_conversations(engine: Engine, tmp_path: Path) -> None:
    def answer(model: Any, tokenizer: Any, row: Any) -> Answer:
        is_text = isinstance(row, str)
        text = row if is_text else f"user {row['messages'][0]['content']} "
        encoded = tokenizer(text, add_special_tokens=is_text, return_tensors="pt", return_token_type_ids=False)
        return written(model, tokenizer, encoded, encoded["input_ids"].shape[1])

    merge = Merge(engine, tmp_path, family=DECODERS["llama"], task="CausalLM")
    for folder in (*merge.experts, merge.merged):
        (folder / "chat_template.jinja").write_text(CHAT)
    rows = [*TEXTS, {"messages": [{"role": "user", "content": TEXTS[0]}]}]
    assert_side_by_side(merge, AutoModelForCausalLM, "", rows, answer)
    with pytest.raises(InvalidDataset, match=r"row 1: its .* tokens leave no room for 6 more"):
        merge.answers(["w1 " * 60])


@pytest.mark.long
def test_models_that_read_and_write_do_so(engine: Engine, tmp_path: Path) -> None:
    def answer(model: Any, tokenizer: Any, row: str) -> Answer:
        return written(model, tokenizer, tokenizer(row, return_tensors="pt", return_token_type_ids=False), 1)

    merge = Merge(engine, tmp_path, family=ENCODER_DECODERS["bart"], task="Seq2SeqLM")
    assert_side_by_side(merge, AutoModelForSeq2SeqLM, "", TEXTS, answer)


def test_what_does_not_fit_is_refused_by_name_and_never_quoted(engine: Engine, tmp_path: Path) -> None:
    merge = Merge(engine, tmp_path)
    secret = "w7 w7 w7"
    refused: list[tuple[list[Any], type[EngineError], str]] = [
        ([secret, "w1 " * 60], InvalidDataset, "data set rows, row 2: it has more than the 48 tokens"),
        ([{"text": secret, "txt": secret}], InvalidDataset, "row 1: 'txt' is not read; did you mean 'text'?"),
        ([{"text": secret, "target": secret}], InvalidDataset, "row 1: 'target' is not read"),
        ([{"text": [secret]}], InvalidDataset, "row 1: column 'text' is not text"),
        ([{}], InvalidDataset, "row 1: no column 'text'"),
    ]
    for rows, kind, message in refused:
        with pytest.raises(kind, match=message) as raised:
            merge.answers(rows)
        assert secret not in raised.value.message
    masked = Merge(engine, tmp_path / "masked", task="MaskedLM")
    with pytest.raises(
        InvalidRequest, match="answers of a masked language model to single rows are not available"
    ) as no:
        masked.answers(TEXTS)
    assert no.value.detail == {"field": "model", "available": False}
    slices = [{"sources": [{"model": name, "layers": [0, 1]}]} for name in ("a", "b")]
    with pytest.raises(InvalidRequest, match="a merge of slices has layers of several models"):
        engine.predict(merge.asked(TEXTS, slices=slices), silent)


def test_models_stay_warm_and_are_made_anew_when_an_input_changes(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(engine, tmp_path)
    before = merge.answers(TEXTS)
    loaded: list[str] = []
    fresh = engine._lasting.models.fresh

    def seen(info: CheckpointInfo) -> LoadedModel:
        loaded.append(info.source)
        return fresh(info)

    monkeypatch.setattr(engine._lasting.models, "fresh", seen)
    assert merge.answers(TEXTS) == before
    assert loaded == [], "nothing is loaded again"
    tiny_checkpoint(merge.experts[1], seed=9)
    after = merge.answers(TEXTS)
    assert loaded == ["the merge"], "of three models, the average is another one"
    assert [row.merged for row in after] == [row.merged for row in before]
    assert [row.average for row in after] != [row.average for row in before]
    models = [model.model_dump() for model in merge.spec.models]
    with pytest.raises(InvalidCheckpoint, match="local:b: its files were changed"):
        engine.predict(merge.asked(TEXTS, models=[models[0], {**models[1], "state": "another"}]), silent)
