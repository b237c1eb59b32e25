"""A first inspection, of a merge that the inspector itself writes, so that its copies find everything at hand.

Modules that are imported late, compiled patterns and validators are made by the first inspection of a process. Every
request is inspected in a fresh copy, which would make them again. And what a copy first writes to, the count of an
object's users included, the kernel copies then, page by page. Each of the two doubled the time of an inspection.
"""

import json
from pathlib import Path
from typing import Any

from app.contracts.requests import MergeRequest
from app.services.checks import Checker
from app.storage.artifacts import open_artifacts
from app.storage.sources import Sources
from app.storage.sources.source import SourceContext

CONFIG: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 2,
    "intermediate_size": 2,
    "max_position_embeddings": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "type_vocab_size": 1,
    "vocab_size": 4,
    "pad_token_id": 0,
}
WORDS = ("[PAD]", "[UNK]", "yes", "no")
NORM = ("weight", [2]), ("bias", [2])
LINEAR = ("weight", [2, 2]), ("bias", [2])
LAYER = "encoder.layer.0"
MODULES: dict[str, tuple[tuple[str, list[int]], ...]] = {
    "bert.embeddings.word_embeddings": (("weight", [4, 2]),),
    "bert.embeddings.position_embeddings": (("weight", [8, 2]),),
    "bert.embeddings.token_type_embeddings": (("weight", [1, 2]),),
    "bert.embeddings.LayerNorm": NORM,
    **{f"bert.{LAYER}.attention.self.{name}": LINEAR for name in ("query", "key", "value")},
    f"bert.{LAYER}.attention.output.dense": LINEAR,
    f"bert.{LAYER}.attention.output.LayerNorm": NORM,
    f"bert.{LAYER}.intermediate.dense": LINEAR,
    f"bert.{LAYER}.output.dense": LINEAR,
    f"bert.{LAYER}.output.LayerNorm": NORM,
    "bert.pooler.dense": LINEAR,
    "classifier": LINEAR,
}
"""Shapes of the parameters of each module."""


class OwnMerge:
    """A merge of two models of 2 by 2 numbers, whose files are written into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models = []
        for model in ("a", "b"):
            _write_model(folder / model)
            (folder / f"{model}.jsonl").write_text('{"text": "yes", "label": 0}\n{"text": "no", "label": 1}\n')
            rows = {"source": f"local:{model}.jsonl", "label": "label"}
            self._models.append({"name": model, "checkpoint": f"local:{model}", "dataset": rows, "evaluation": rows})

    def inspect(self) -> None:
        """Inspect it as a request for it would be."""
        request = MergeRequest.model_validate({"method": {"name": "mask_fisher"}, "models": self._models})
        artifacts = open_artifacts("folder", self._folder / "data")
        context = SourceContext((self._folder,), self._folder / "data", artifacts, lambda _: None)
        Checker(Sources(context), lambda _: None).check(request).model_dump_json()


def _write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    header, end = dict[str, Any](), 0
    for module, parameters in MODULES.items():
        for parameter, shape in parameters:
            size = 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
            header[f"{module}.{parameter}"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
