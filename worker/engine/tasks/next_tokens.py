"""Likelihoods of tokens whose logits are never held whole.

The logits of some thousand tokens are gigabytes where the vocabulary has hundreds of thousands of tokens. So they are
computed for a few tokens at a time, and the gradient by the hidden states with them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.runtime.placeholders import opened

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Number of logits that are computed at once; on a CPU they take 32 MiB in float32, and as much twice beside them."""
BLOCK = 256
"""Number of probabilities that are summed first when a token is drawn."""


@dataclass(frozen=True)
class OutputLayer:
    """The layer that gives logits, `cap tanh(z / cap)` with `z = W h + b`, or `z` itself without a cap."""

    linear: nn.Linear
    cap: float | None = None
    offset: Tensor | None = None
    """A constant that is added to `z`, (1, vocabulary)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, (tokens, vocabulary), float32, of hidden states, (tokens, width)."""
        z: Tensor = self.linear(hidden).float()
        if self.offset is not None:
            z += self.offset
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Cut a number of tokens into runs whose logits are held at once."""
        size = max(1, CHUNK_LOGITS[self.linear.weight.device.type] // self.linear.out_features)
        return (slice(start, start + size) for start in range(0, tokens, size))


class _Read(Exception):
    """The rest of the forward pass is not needed."""


def read_by(linear: nn.Module, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run a model up to its output layer, and return what that reads, (batch, tokens, width)."""
    read: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        read.append(given[0])
        raise _Read

    handle = linear.register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Read:
        return read[0]
    finally:
        handle.remove()
    raise TypeError(f"{type(model).__name__} does not run its output layer")


def log_likelihoods(hidden: Tensor, layer: OutputLayer, labels: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Compute `log p` of one label at each position, (tokens,), float32, from hidden states, (tokens, width).

    It can be differentiated once by the hidden states. It can be by the layer's weights too if the derivatives that
    reach it are equal for all positions, as those of a sum are.

    Args:
        labels: gives the labels, (positions,), of the positions in a slice, whose probabilities are the first argument,
            (positions, vocabulary), float32.
    """
    with opened(layer.linear):
        found: Tensor = _LogLikelihoods.apply(  # type: ignore[no-untyped-call]
            hidden, layer.linear.weight, layer.linear.bias, layer, labels
        )
    return found


class _LogLikelihoods(torch.autograd.Function):
    """Computes likelihoods and beside them `d log p_y / dz = onehot(y) - p`, with `z` the logits and `y` the label."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: OutputLayer,
        labels: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for chunk in layer.chunks(len(hidden)):
            z = layer.logits(hidden[chunk])
            slope = None if layer.cap is None else 1 - (z / layer.cap).square()
            log_p = z.log_softmax(-1)  # several times as fast as logsumexp
            likelihoods = log_p.exp()
            chosen = labels(likelihoods, chunk)[:, None]
            found[chunk] = log_p.gather(1, chosen)[:, 0]
            by_logits = likelihoods.neg_().scatter_add_(1, chosen, torch.ones_like(chosen, dtype=z.dtype))
            if slope is not None:
                by_logits *= slope
            by_hidden[chunk] = torch.matmul(by_logits.to(weight.dtype), weight).to(hidden.dtype)
            if by_weight is not None:
                by_weight += by_logits.T @ hidden[chunk].float()
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        ctx.found = by_hidden, by_weight, by_bias
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.found
        if by_weight is not None or by_bias is not None:
            if not bool((gradient == gradient[0]).all()):
                raise RuntimeError("derivatives by the output layer are those of a sum over positions alone")
            by_weight = None if by_weight is None else by_weight * gradient[0]
            by_bias = None if by_bias is None else by_bias * gradient[0]
        return by_hidden * gradient[:, None].to(by_hidden.dtype), by_weight, by_bias, None, None


def drawn(p: Tensor, draws: Tensor) -> Tensor:
    """Draw a label at each position, (positions,), by numbers between 0 and 1, (positions,), float64.

    Sums over runs of `BLOCK` probabilities, (positions, vocabulary), say in which run the label is; so the whole
    distribution is read once, and its cumulative sums are not held.
    """
    padded = nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK)
    through = padded.sum(-1).double().cumsum(1)  # so few float32 numbers that a float64 sum of them says no more
    wanted = draws.to(p.device) * through[:, -1]
    block = (wanted[:, None] >= through[:, :-1]).sum(1)
    rows = torch.arange(len(p), device=p.device)
    before = torch.where(block > 0, through[rows, (block - 1).clamp_min(0)], 0.0)
    within = padded[rows, block].double().cumsum(1)
    inner = ((wanted - before)[:, None] >= within[:, :-1]).sum(1)
    label: Tensor = block * BLOCK + inner
    return label.clamp_max(p.shape[1] - 1)


def judged(hidden: Tensor, layer: OutputLayer, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log p` of each label, and whether no token is likelier: (tokens,) each; no gradient is kept."""
    likelihoods = hidden.new_empty(len(hidden), dtype=torch.float32)
    is_right = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    with opened(layer.linear):
        for chunk in layer.chunks(len(hidden)):
            z = layer.logits(hidden[chunk])
            chosen = labels[chunk, None]
            likelihoods[chunk] = z.log_softmax(-1).gather(1, chosen)[:, 0]
            is_right[chunk] = z.argmax(-1) == chosen[:, 0]
    return likelihoods, is_right


def log_probabilities(hidden: Tensor, layer: OutputLayer, labels: Tensor) -> Tensor:
    """Return `log p` of several labels at each position, (tokens, labels) as `labels`; no gradient is kept."""
    found = hidden.new_empty(labels.shape, dtype=torch.float32)
    for chunk in layer.chunks(len(hidden)):
        found[chunk] = layer.logits(hidden[chunk]).log_softmax(-1).gather(1, labels[chunk])
    return found
