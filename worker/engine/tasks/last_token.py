"""Heads that read one token of a row, as transformers' classes do: the last that is no padding, or the last end token.

transformers finds the former, of decoders, by the configuration's `pad_token_id`, and refuses batches without one.
Models with an encoder and a decoder have the latter; of these it refuses batches whose rows differ in their number.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HEAD_MODULE = "score"
"""Name of the linear layer in all classes of transformers that classify rows by their last token."""


def pad_token_of(model: Any) -> int | None:
    """Return the token that the model takes for padding; None if its configuration names none of its vocabulary."""
    config = model.config.get_text_config()
    token = config.pad_token_id
    return token if token is not None and 0 <= token < config.vocab_size else None


def reads_last_token(model: nn.Module) -> bool:
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return classifies and isinstance(getattr(model, HEAD_MODULE, None), nn.Linear)


def reads_end_token(model: Any) -> bool:
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    return classifies and bool(model.config.is_encoder_decoder)


def end_token_problem(model: Any, encoding: Any) -> str | None:
    """Return why a row's end tokens do not show where the head reads, from its tokens as `tokenizers` gives them."""
    end = model.config.eos_token_id
    marks = [is_mark for token, is_mark in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if token == end]
    if not marks:
        return f"it has no end token ({end}), at which the head reads; the checkpoint's tokenizer adds none"
    return None if all(marks) else "its text spells the end token, at which the head reads; leave it out"


def logits_of_last_token(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run the model, and return the logits of each row's last token that is no padding, (batch, labels).

    The head reads no other token. Without a token of padding, the attention mask says which tokens are padding.
    """
    hidden = model.base_model(**inputs).last_hidden_state
    padding = pad_token_of(model)
    mask = inputs["attention_mask"].bool() if padding is None else inputs["input_ids"] != padding
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(-1)
    logits: Tensor = getattr(model, HEAD_MODULE)(hidden[torch.arange(len(hidden), device=hidden.device), last])
    return logits
