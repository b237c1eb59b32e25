"""Finds what transformers' classes of tokenizers load, for the table that `library_table` writes."""

import inspect
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from worker.engine.catalog.checkpoints.companion_checks import TEXT
from worker.engine.checkpoints.library_variations import Config
from worker.engine.runtime.libraries import import_utils, tokenization_auto, transformers

SPECIAL = (
    "<s>", "<pad>", "</s>", "<unk>", "<mask>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|endoftext|>",
)  # fmt: skip
"""Special tokens of most classes; some refuse a vocabulary without theirs."""


def tokenizers_of_library() -> Config:
    """Return what the table says of tokenizers.

    `of_models` has the class of each kind of model. `ignoring` lists the kinds of model for which the class that a
    checkpoint names does not count. `classes` has the entry of each class, see `class_entry`.
    """
    of_models = {kind: name for kind, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items() if name}
    names = {*of_models.values(), *(name for name in dir(sys.modules["transformers"]) if "Tokenizer" in name)}
    return {
        "of_models": dict(sorted(of_models.items())),
        "ignoring": sorted(tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS),
        "classes": {name: class_entry(name) for name in sorted(names)},
    }


def class_entry(name: str) -> Config:
    """Return what a class of this name loads.

    The keys: `class`, its own name; `takes`, the types of the model in a tokenizer.json that it loads, null where that
    is not known, because it reads other files, or needs tokens of its own or a library that is not here; `files`, files
    that it needs instead; `rebuilds`, whether it builds another tokenizer from the tokens; `inputs`, what it gives to
    models. What is no tokenizer takes nothing.
    """
    found = tokenization_auto.tokenizer_class_from_name(name)
    is_class = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
    if not is_class or found is transformers.PreTrainedTokenizerBase:
        is_missing = isinstance(found, import_utils.DummyObject)
        return {"class": name, "takes": None if is_missing else [], "files": [], "rebuilds": False, "inputs": []}
    reads_json = issubclass(found, transformers.TokenizersBackend)
    taken = [model["type"] for model in models() if reads_json and loads(found, model)]
    return {
        "class": found.__name__,
        "takes": taken or None,
        "files": [] if reads_json else needed_files(found),
        "rebuilds": reads_json and found is not transformers.TokenizersBackend and "__init__" in vars(found),
        "inputs": list(found.model_input_names),
    }


def needed_files(tokenizer_class: Any) -> list[str]:
    """Return the names of the files for which a class's parameters have no default."""
    parameters = inspect.signature(tokenizer_class.__init__).parameters
    return [
        file
        for parameter, file in tokenizer_class.vocab_files_names.items()
        if parameter in parameters and parameters[parameter].default is inspect.Parameter.empty
    ]


def models() -> list[Config]:
    """Return a model of each type that a tokenizer.json may have, of the same tokens."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*SPECIAL, *characters, *(f"##{one}" for one in characters), "▁", "Ġ"]
    ids = {token: index for index, token in enumerate(tokens)}
    return [
        {"type": "BPE", "vocab": {**ids, "te": len(ids)}, "merges": [["t", "e"]]},
        {"type": "Unigram", "vocab": [[token, -float(index)] for token, index in ids.items()], "unk_id": ids["<unk>"]},
        {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
        {"type": "WordPiece", "vocab": ids, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
    ]  # fmt: skip


def loads(tokenizer_class: Any, model: Config) -> bool:
    """Return whether a class loads a tokenizer.json with this model, and cuts a text by it."""
    content: Config = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    with TemporaryDirectory() as name:
        for file, one in (("tokenizer.json", content), ("tokenizer_config.json", {}), ("config.json", {})):
            Path(name, file).write_text(json.dumps(one), encoding="utf-8")
        try:
            return bool(tokenizer_class.from_pretrained(name, local_files_only=True)(TEXT)["input_ids"])
        except Exception:  # classes raise anything for a file that is none of theirs
            return False
