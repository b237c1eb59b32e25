"""Names of a checkpoint's files, and which of them are read."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from worker.engine.catalog.checkpoints.limits import (
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_MODULE_BYTES,
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_WEIGHT_FILES,
)

SAFETENSORS = ".safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
SENTENCEPIECE = (
    "sentencepiece.bpe.model",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
    "spm_char.model",
    "sentencepiece.model",
)
OLDER_VOCABULARIES = (
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    *SENTENCEPIECE,
    # Only single kinds of models have these: Marian, FSMT, Whisper, LUKE, RoCBert, GPT-NeoX Japanese, BARTpho,
    # ProphetNet.
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "normalizer.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "emoji.json",
    "dict.txt",
    "byte_maps.json",
    "prophetnet.tokenizer",
    "tekken.json",
)
"""Files with tokens that are read beside tokenizer.json, or instead of it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *OLDER_VOCABULARIES)
VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", *SENTENCEPIECE)
"""Files that `vocabulary_of` reads."""
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSORS = (
    IMAGE_PROCESSOR,
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
"""Files that say how images and sound become a model's inputs."""
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Chat templates of the tokenizer and, in older folders, of the processor."""
MORE_CHAT_TEMPLATES = re.compile(r"additional_chat_templates/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.jinja")
COMPANIONS = (*CHAT_TEMPLATES, "generation_config.json", *PROCESSORS)
"""Files that are published beside the tokenizer, as further chat templates are, and not read here."""
MODULES = "modules.json"
ENCODER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that sentence-transformers has used for the settings of the transformer itself; it takes the first one."""
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", *ENCODER_CONFIGS)
"""Files of a sentence-transformers folder, besides the folders of its modules."""
MODULE_FILE = re.compile(r"[0-9]{1,2}_[A-Za-z0-9_]{1,64}/(config\.json|model\.safetensors)")
INNER_FOLDER = re.compile(r"additional_chat_templates|[0-9]{1,2}_[A-Za-z0-9_]{1,64}")
"""Names of sub-folders that may hold files of a checkpoint."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")  # files of whole models


def size_limit(name: str) -> int:
    """Return the number of bytes that a file beside the weights may have."""
    if name in ("tokenizer.json", *OLDER_VOCABULARIES):
        return MAX_TOKENIZER_BYTES
    if name.endswith(WEIGHTS):
        return MAX_MODULE_BYTES
    if name.endswith(".jinja"):
        return MAX_TEMPLATE_BYTES
    return MAX_HEADER_BYTES if name == INDEX else MAX_CONFIG_BYTES


def described_files(names: Collection[str]) -> list[str]:
    """Return the files of a checkpoint beside its weights: configurations, tokenizer, templates, index.

    Args:
        names: names of files, relative to the checkpoint's folder, with `/` after a folder.
    """
    wanted = ("config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, *COMPANIONS, *SENTENCE_FILES, INDEX)
    inner = (MORE_CHAT_TEMPLATES, MODULE_FILE) if MODULES in names else (MORE_CHAT_TEMPLATES,)
    return [
        *(name for name in wanted if name in names),
        *sorted(name for name in names if any(pattern.fullmatch(name) for pattern in inner)),
    ]


def file_names(folder: Path) -> Iterator[str]:
    """Yield the names in a checkpoint's folder; sub-folders that may hold its files are followed by their contents."""
    for entry in folder.iterdir():
        yield entry.name
        if INNER_FOLDER.fullmatch(entry.name) and entry.is_dir():
            yield from (f"{entry.name}/{inner.name}" for inner in entry.iterdir())


def weights_among(names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Return the weight files of a checkpoint whose files are `names`.

    The rule is that of transformers' `from_pretrained`: a single file takes precedence over an index and its shards.

    Args:
        read: returns the content of a file.
    """
    found = [name for name in (WEIGHTS, ADAPTER_WEIGHTS) if name in names]
    if WEIGHTS in found or INDEX not in names:
        return found
    try:
        files = sorted({str(file) for file in json.loads(read(INDEX))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return found  # `inspect_checkpoint` says what is wrong with it
    own = {*names} - {*found}
    return [*found, *(file for file in files[:MAX_WEIGHT_FILES] if is_shard(file) and file in own)]


def is_shard(file: str) -> bool:
    """Return whether an index may name this file: one in its own folder that libraries read as safetensors.

    They go by the end of a name, and would read any other file as a pickle, whatever it begins with.
    """
    return Path(file).name == file and file.endswith(SAFETENSORS)
