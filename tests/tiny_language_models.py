"""Models of architectures without a table at tiny size: language models, and others that transformers loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.tiny_families import WORDS, numbered

SPREAD = 0.2  # of the ancestor's weights
STEP = 0.05  # of a fine-tuning
VOCABULARY = 128  # rows of the embedding matrices, more than the tokenizer has tokens
ROTARY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MARKS = {"bos_token_id": 0, "eos_token_id": 1}


@dataclass(frozen=True)
class TinyModel:
    """One architecture of transformers. `layers` is the configuration's key of their number."""

    architecture: str
    model_type: str
    settings: Mapping[str, Any]
    layers: str = "num_hidden_layers"
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are others, with the others' names."""


LLAMA = TinyModel("LlamaForCausalLM", "llama", {**ROTARY, **MARKS})
QWEN2 = TinyModel(
    "Qwen2ForCausalLM",
    "qwen2",
    {**ROTARY, **MARKS, "tie_word_embeddings": True},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
)
GPT2 = TinyModel(
    "GPT2LMHeadModel",
    "gpt2",
    {"n_embd": 16, "n_head": 4, "n_positions": 64, **MARKS},
    layers="n_layer",
    tied={"lm_head.weight": "transformer.wte.weight"},
)
NEOX = TinyModel(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64, **MARKS},
)
T5 = TinyModel(
    "T5ForConditionalGeneration",
    "t5",
    {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0},
    layers="num_layers",
    tied={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
)
MASKED_BERT = TinyModel(
    "BertForMaskedLM",
    "bert",
    {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64},
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
TINY_MODELS = {model.model_type: model for model in (LLAMA, QWEN2, GPT2, T5, MASKED_BERT)}


def tiny_model(
    folder: Path,
    model: TinyModel = LLAMA,
    *,
    seed: int = 0,
    base_seed: int = 1000,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """A checkpoint as `save_pretrained` writes it, with a tokenizer; seed 0 is the ancestor of all others."""
    import transformers
    from transformers import AutoConfig

    settings = {**model.settings, model.layers: layers, "vocab_size": VOCABULARY, **settings}
    config = AutoConfig.for_model(model.model_type, **settings)
    built = getattr(transformers, model.architecture)(config)
    ancestor, fine_tuning = torch.Generator().manual_seed(base_seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + SPREAD * torch.randn(parameter.shape, generator=ancestor))
            if seed:
                parameter.add_(STEP * torch.randn(parameter.shape, generator=fine_tuning))
    built.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    word_level_tokenizer().save_pretrained(folder)
    return folder


def word_level_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(numbered("<s>", "</s>", "<unk>", *words), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def loaded_model(folder: Path, architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    """As the Auto class of the architecture loads it."""
    import transformers

    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: Any) -> torch.Tensor:
    """On fixed tokens, (2, tokens, vocabulary)."""
    tokens = torch.arange(3, 3 + 2 * 12).view(2, 12)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :7]
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits
