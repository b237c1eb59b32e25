"""Tells which class of transformers loads a checkpoint's tokenizer, and whether it can, from the table of its classes.

Its rules are those of `AutoTokenizer.from_pretrained` (transformers, models/auto/tokenization_auto.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.library import tokenizer_table

PLAIN = "TokenizersBackend"
"""The class that takes tokenizer.json as it is; it loads whatever no other class does."""
ABSTRACT = "PythonBackend"
PLAIN_TOO = (ABSTRACT, "PreTrainedTokenizerFast", "PreTrainedTokenizer", PLAIN)
MISTRAL = "MistralCommonBackend"
LLAMA = "LlamaTokenizer"
NAMES_TOKENIZER = "Tokenizer"
"""Part of the name of every class of tokenizers; other names in transformers are of something else."""


@dataclass(frozen=True)
class TokenizerClass:
    """A class of transformers that loads tokenizers."""

    name: str
    takes: tuple[str, ...] | None
    """Types of the model in tokenizer.json by which it can cut text; None where it is not known, or does not matter."""
    files: tuple[str, ...]
    """Other files that it needs."""
    rebuilds: bool
    """Whether it builds another tokenizer from the tokens of tokenizer.json."""
    inputs: tuple[str, ...]
    """Names of what it gives to models, if a configuration does not say otherwise."""

    def problem(self, kind: str | None, folder: Path) -> str | None:
        """Say what it cannot load; None if it can, as far as is known.

        Args:
            kind: type of the model in tokenizer.json; None without the file.
            folder: place of the tokenizer's files.
        """
        if self.takes == ():
            return "by which transformers loads no tokenizer that cuts plain text"
        if kind is not None and self.takes is not None and kind not in self.takes:
            return f"which takes a tokenizer.json with a {' or '.join(self.takes)} model, and this one has {kind}"
        missing = [file for file in self.files if not (folder / file).exists()]
        return f"which needs {' and '.join(missing)}, and that is not there" if missing else None


def tokenizer_class(
    config: Mapping[str, Any], said: Mapping[str, Any], tokenizer_json: bytes | None
) -> TokenizerClass | None:
    """Return the class that loads a tokenizer; None where that depends on a library.

    Args:
        config: content of config.json.
        said: content of tokenizer_config.json.
        tokenizer_json: content of tokenizer.json; None without the file.
    """
    table = tokenizer_table()
    model_type = config.get("model_type")
    own = str(table["of_models"].get(model_type, "")).removesuffix("Fast")
    named, of_config = said.get("tokenizer_class"), config.get("tokenizer_class")
    declared = str(named or of_config or "")
    is_ignored = model_type in table["ignoring"]
    is_byte_level = tokenizer_json is not None and b'"ByteLevel"' in tokenizer_json
    if declared.removesuffix("Fast") == LLAMA and own != MISTRAL and not is_ignored and is_byte_level:
        return _class(PLAIN)
    if declared and own and own != declared.removesuffix("Fast"):
        if own == MISTRAL:
            return None
        found = None if own in PLAIN_TOO else _class(own if is_ignored else declared)
        return _class(PLAIN) if found is None or found.name in PLAIN_TOO else found
    if named:
        return _class(declared.removesuffix("Fast")) or _class(PLAIN)
    if of_config:  # the library takes no plain class then
        is_abstract = table["classes"].get(declared, {}).get("class") == ABSTRACT
        found = None if is_abstract else _class(declared)
        return _no_tokenizer(declared) if found is None else found
    if config.get("model_type") == "encoder-decoder" and isinstance(config.get("encoder"), Mapping):
        own = str(table["of_models"].get(config["encoder"].get("model_type"), ""))
    return None if own == MISTRAL else _class(own or PLAIN)


def _class(name: str) -> TokenizerClass | None:
    """Return the class of this name; None if transformers does not have it, and takes the plain one."""
    classes = tokenizer_table()["classes"]
    entry = classes.get(name) or classes.get(name.removesuffix("Fast"))
    if entry is None:
        return None if NAMES_TOKENIZER in name else _no_tokenizer(name)
    if entry["class"] in PLAIN_TOO:
        entry = classes[PLAIN]
    takes = None if entry["takes"] is None or entry["files"] else tuple(entry["takes"])
    return TokenizerClass(entry["class"], takes, tuple(entry["files"]), entry["rebuilds"], tuple(entry["inputs"]))


def _no_tokenizer(name: str) -> TokenizerClass:
    return TokenizerClass(name, (), (), rebuilds=False, inputs=())
