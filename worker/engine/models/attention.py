"""Computes attention on a CPU in one of two ways, whichever is faster for the number format and the length.

PyTorch's fused kernel has a slow backward pass on CPUs in bfloat16, and for lengths of sentences in float32 too. Plain
products are fast if no intermediate value becomes float32 by accident, as it does with transformers' float32 mask.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.runtime.libraries import masking_utils, transformers

CPU_ATTENTION = "maskmerge_cpu"
SAID_BY_THE_MASK = ("position_ids", "use_cache", "cache_position", "past_key_values", "sliding_window")
ALWAYS_SO = ("deterministic",)  # ModernBERT asks flash attention for it
FUSED_FROM_TOKENS = 256  # number of tokens in float32; measured, see docs/speed.md


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute `softmax(scaling q k^T + mask) v`, in eval mode, as a function for `transformers.AttentionInterface`.

    With a `softcap` c, it is `softmax(c tanh(scaling q k^T / c) + mask) v` (Gemma Team 2024, arXiv 2408.00118).

    Args:
        query, key, value: (batch, heads, tokens, head_dim); key and value may have fewer heads, each of which serves a
            run of the query's heads.
        attention_mask: added to the scores, (batch, 1, tokens, tokens); None where nothing is masked.
        others: settings of other implementations. The mask already contains a model's positions and windows.

    Returns:
        The result, (batch, tokens, heads, head_dim), and None in place of the probabilities, which nobody reads.

    Raises:
        TypeError: a family needs a kind of attention that is not computed here.
    """
    settings = {name: value for name, value in others.items() if name not in (*SAID_BY_THE_MASK, *ALWAYS_SO)}
    wanted = [name for name, value in {"dropout": dropout, "is_causal": is_causal, **settings}.items() if value]
    if wanted:
        raise TypeError(f"attention has no {', '.join(wanted)}; load this family with another implementation")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.shape[1] != query.shape[1]:
        sharing = query.shape[1] // key.shape[1]
        key, value = (of.repeat_interleave(sharing, dim=1) for of in (key, value))
    if query.dtype is not torch.bfloat16 and query.shape[2] >= FUSED_FROM_TOKENS and softcap is None:
        fused = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return fused.transpose(1, 2).contiguous(), None
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is not None:
        scores += attention_mask  # in place, which keeps the format and is safe: a product does not need its result
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous(), None


def mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """Make transformers' mask for plain products in their format: no float32 where they are bfloat16."""
    if dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    made: Tensor | None = masking_utils.eager_mask(dtype=dtype, **kwargs)
    return made


@cache
def cpu_attention() -> str:
    """Register the attention with transformers, and return its name there."""
    transformers.AttentionInterface.register(CPU_ATTENTION, attention)
    transformers.AttentionMaskInterface.register(CPU_ATTENTION, mask)
    return CPU_ATTENTION
