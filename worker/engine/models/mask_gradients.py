"""Gradients by mask nodes, one example at a time, from one batched backward pass.

No mask exists. A node's mask multiplies its activation `c`, so the derivative of an example's output by it, at mask 1,
is the sum of `c * dL/dc` over the example's tokens (and, for a head, over its width; for heads that share a key and a
value, over all of them: a mask of theirs multiplies all their contexts). The examples of a batch do not
see each other, so keeping the batch axis gives exact per-example gradients, and no parameter gradient is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from worker.engine.catalog.families import ScoreName, Site

CHUNK_VALUES = 1 << 17  # of a product that is summed at once, in float32 512 kB: it stays in the cache of a core


class MaskGradients:
    """Hooks on a model's mask sites, while in context.

    The graph starts at the first sites that a forward pass reaches: nothing before them is differentiated. Nor is
    anything computed of tokens that the head does not read, where that is known.

    Args:
        model: in eval mode; its parameters' requires_grad is switched off for good.
        sites: where the nodes are seen, see `Family.sites`.
        narrowing: modules from whose input on the first token is enough, see `Family.narrowing`.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], narrowing: Sequence[str] = ()) -> None:
        model.requires_grad_(False)
        self._roots: list[Tensor] = []
        self._gradients: dict[ScoreName, Tensor] = {}
        self._token_sums = TokenSums()
        self._handles = [model.register_forward_pre_hook(self._forget)]
        for module in narrowing:  # before the sites' own hooks, which are then to see one token
            self._handles.append(model.get_submodule(module).register_forward_pre_hook(_first_token))
        for site in sites:
            hook = self._watch(site)
            self._handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))

    def __enter__(self) -> "MaskGradients":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._roots.clear()
        self._gradients = {}  # what was given out stays

    def of(self, outputs: Tensor, *, last: bool) -> dict[ScoreName, Tensor]:
        """Derivatives of each example's output by every mask node.

        Args:
            outputs: (batch,), of the latest forward pass; `outputs[b]` depends on example b alone.
            last: whether the graph may be freed.

        Returns:
            By score name, (batch, nodes), float64.
        """
        if not self._roots:
            raise RuntimeError("no forward pass ran inside the context")
        self._gradients = {}
        # The derivatives by the roots themselves are not wanted, but asking for them runs every hook on the way.
        torch.autograd.grad(outputs.sum(), self._roots, retain_graph=not last)
        return self._gradients

    def _forget(self, module: nn.Module, inputs: object) -> None:
        self._roots.clear()

    def _watch(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not torch.is_grad_enabled():
                return None
            activation = inputs[0]  # (batch, tokens, values)
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
                self._roots.append(activation)
            kept = _kept(activation)

            def contract(gradient: Tensor) -> None:
                by_value = self._token_sums(kept(), gradient).double()  # (batch, values)
                for score, nodes in site.counts.items():
                    self._gradients[score] = by_value.view(len(by_value), nodes, -1).sum(-1)

            activation.register_hook(contract)  # type: ignore[no-untyped-call]
            return activation, *inputs[1:]

        return before


def _first_token(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(batch, tokens, values) to (batch, 1, values); added to a residual of all tokens, it is right at the first.

    In one piece: of a view, PyTorch multiplies every example by a copy of the weights of its own.
    """
    return inputs[0][:, :1].contiguous(), *inputs[1:]


class TokenSums:
    """`sum_t activation * gradient` of each example: (batch, tokens, values) twice to (batch, values).

    Products and sums are float32 (float64 of float64), also of bfloat16 factors. On a CPU a chunk at a time, in buffers
    that stay in the cache and are used again: to read both factors once is then nearly all that it costs.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        wide = torch.promote_types(activation.dtype, torch.float32)
        if activation.device.type != "cpu":
            return torch.mul(activation.to(wide), gradient).sum(1)
        batch, tokens, values = activation.shape
        result = torch.zeros(batch, values, dtype=wide)
        rows = max(1, CHUNK_VALUES // (tokens * values))
        most = min(tokens, max(1, CHUNK_VALUES // values))  # tokens, where one example is more than a chunk
        for row in range(0, batch, rows):
            for token in range(0, tokens, most):
                chunk = slice(row, row + rows), slice(token, token + most)
                result[row : row + rows] += self._product(activation[chunk], gradient[chunk], wide).sum(1)
        return result

    def _product(self, activation: Tensor, gradient: Tensor, wide: torch.dtype) -> Tensor:
        if wide not in self._buffers or self._buffers[wide][0].numel() < activation.numel():
            size = max(CHUNK_VALUES, activation.numel())
            self._buffers[wide] = torch.empty(size, dtype=wide), torch.empty(size, dtype=wide)
        product, other = (buffer[: activation.numel()].view(activation.shape) for buffer in self._buffers[wide])
        if activation.dtype is wide:
            return torch.mul(activation, gradient, out=product)
        return product.copy_(activation).mul_(other.copy_(gradient))


def _kept(activation: Tensor) -> Callable[[], Tensor]:
    """The activation when it is needed: of GELU in float32, computed again from what autograd keeps of it anyway.

    Holding the feed-forward activations adds 47 % to what the graph keeps in float32 and 38 % in bfloat16, where
    computing them again would cost more of the time.
    """
    node: Any = activation.grad_fn
    if node is not None and node.name() == "GeluBackward0" and activation.dtype is torch.float32:
        # Not the node itself: it holds its hooks, so a hook that held it would keep the whole graph alive.
        source, approximate = node._saved_self.detach(), node._saved_approximate
        return lambda: gelu(source, approximate=approximate)
    held = activation.detach()
    return lambda: held
