"""A model of each form, from scratch, with rows: neither speed nor memory depends on what weights and tokens are."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from worker.engine.catalog.primitives.errors import Place
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel

WIDTH, LAYERS, HEADS = 512, 6, 8
MARKS = ("<s>", "</s>", "<unk>", "<pad>")


@dataclass(frozen=True)
class Form:
    """One architecture of transformers with its settings."""

    architecture: str
    settings: Mapping[str, Any]
    marks: Mapping[str, int] = field(default_factory=lambda: {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3})


USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 32_000}
GATED = {**USUAL, "intermediate_size": 1_408, "num_key_value_heads": 4, "head_dim": WIDTH // HEADS}
FORMS = {
    "llama": Form("LlamaForCausalLM", GATED),
    "gpt2": Form("GPT2LMHeadModel", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": 32_000}),
    "gemma3": Form("Gemma3ForCausalLM", {**GATED, "vocab_size": 262_144, "sliding_window": 128}),
    "modernbert": Form("ModernBertForSequenceClassification", {**USUAL, "intermediate_size": 768}),
    "albert": Form("AlbertForSequenceClassification", {**USUAL, "intermediate_size": 4 * WIDTH}),
    "vit": Form("ViTForImageClassification", {**USUAL, "intermediate_size": 4 * WIDTH}, {}),
}
"""Decoders with a gated feed-forward layer, with transposed matrices, and with a large vocabulary; encoders with fused
matrices, and with one layer that is run several times; images."""


def write(name: str, folder: Path) -> Path:
    """Write a checkpoint with random weights."""
    form = FORMS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, form.architecture)
    config = model_class.config_class(**form.settings, **form.marks)
    model_class(config).save_pretrained(folder)
    if name == "vit":
        transformers.ViTImageProcessor().save_pretrained(folder)
        return folder
    tokenizer = Tokenizer(models.WordLevel({mark: place for place, mark in enumerate(MARKS)}, unk_token=MARKS[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), MARKS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def rows(loaded: LoadedModel, count: int, lengths: tuple[int, int]) -> list[Example]:
    """Rows of random tokens, their numbers between these; of images, which all have as many."""
    drawn = random.Random(0)
    vocabulary = loaded.info.config.get("vocab_size", 0)
    found = []
    for index in range(count):
        place = Place("line", index + 1)
        if loaded.task.reads_images:
            pixels = torch.zeros(3, loaded.info.config["image_size"], loaded.info.config["image_size"])
            found.append(Example(index, place, {"pixel_values": pixels}, index % 2, tokens=loaded.max_length))
            continue
        tokens = [drawn.randrange(len(MARKS), vocabulary) for _ in range(drawn.randint(*lengths))]
        encoding = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        if loaded.family.head.merges:
            positions = tuple(range(len(tokens) - 1))
            found.append(Example(index, place, encoding, tuple(tokens[1:]), positions))
        else:
            found.append(Example(index, place, encoding, index % 2))
    return found
