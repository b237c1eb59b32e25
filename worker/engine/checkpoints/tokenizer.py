"""Loads the tokenizer of a checkpoint, and writes the tokenizer's files of a merged model."""

import json
import shutil
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.companion_checks import TEXT
from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.files import CHAT_TEMPLATES, OLDER_VOCABULARIES
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.token_rows import NewToken
from worker.engine.catalog.checkpoints.vocabulary import Vocabulary
from worker.engine.checkpoints.configurations import OFFLINE, tokenizer_folder
from worker.engine.runtime.libraries import transformers

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(info: CheckpointInfo, config: Any) -> tuple[Any, int]:
    """Load a checkpoint's tokenizer, and return it with the last id that it gives.

    The rules that put tokens around a text may give other ids than those in the vocabulary.

    Args:
        config: the library's configuration of the model; the tokenizer's class follows from it if no file names one.
    """
    with tokenizer_folder(info) as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, **OFFLINE)
    around = [*tokenizer(TEXT)["input_ids"], *tokenizer(TEXT, TEXT)["input_ids"]]
    return tokenizer, max([*tokenizer.get_vocab().values(), *around], default=0)


def write_tokenizer(owner: CheckpointInfo, vocabulary: Vocabulary | None, folder: Path) -> None:
    """Write the files of the tokenizer's owner, with the new tokens of the vocabulary if it has any.

    New tokens are only in tokenizer.json, which is read first; other files with tokens are left out.
    """
    new = vocabulary is not None and vocabulary.new
    for name, file in companions(owner).items():
        if not (new and name in OLDER_VOCABULARIES):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    if vocabulary is None or not vocabulary.new:
        return
    content = json.loads((owner.tokenizer_path / "tokenizer.json").read_bytes())
    _write(folder / "tokenizer.json", _extended(content, vocabulary))
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
    decoder = config.get("added_tokens_decoder")  # transformers saved it before version 5, and still reads it
    if isinstance(decoder, dict):
        more = {str(token.id): _entry(token) for token in vocabulary.new if token.entry is not None}
        _write(config_file, {**config, "added_tokens_decoder": {**decoder, **more}})


def write_chat_template(template: str, folder: Path) -> None:
    """Publish this template instead of the tokenizer's own main one."""
    (folder / CHAT_TEMPLATES[0]).write_text(template, encoding="utf-8")
    (folder / CHAT_TEMPLATES[1]).unlink(missing_ok=True)
    config_file = folder / "tokenizer_config.json"
    if config_file.exists():
        config = json.loads(config_file.read_bytes())
        if config.pop("chat_template", None) is not None:
            _write(config_file, config)


def _extended(content: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of tokenizer.json with the new tokens at their ids.

    If the model's vocabulary has ids, all added tokens, the owner's too, are put into it: to others the library gives
    ids of its own, by the vocabulary's size.
    """
    model = dict(content["model"])
    before = content.get("added_tokens") or []
    if isinstance(model["vocab"], dict):
        more = {token.content: token.id for token in vocabulary.new}
        model["vocab"] = {**{entry["content"]: entry["id"] for entry in before}, **model["vocab"], **more}
    if vocabulary.merges:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [*pairs, *map(list, vocabulary.merges)]
    added = [{"id": token.id, **_entry(token)} for token in vocabulary.new if token.entry is not None]
    return {**content, "added_tokens": [*before, *added], "model": model}


def _entry(token: NewToken) -> dict[str, Any]:
    entry = token.entry or {}
    return {"content": token.content, **{flag: bool(entry.get(flag)) for flag in FLAGS}}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
