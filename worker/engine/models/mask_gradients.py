"""Gradients by mask nodes, for each example by itself, from one batched backward pass.

No mask is inserted. A node's mask would multiply its activation `c`, so the derivative of an example's output by it, at
mask 1, is the sum of `c * dL/dc` over the example's tokens. For an attention head the sum is also over its width; for
heads that share a key and a value it is over all of them, because their mask multiplies all their contexts; and where
layers share their weights, over all uses of a layer. The examples of a batch do not see each other, so keeping the
batch axis gives exact gradients of each example, and no gradient by a parameter is computed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot

from worker.engine.catalog.families import ScoreName, Site
from worker.engine.models.experts import RoutedLinear
from worker.engine.models.weights import IS_COMPUTED_AGAIN

CHUNK_VALUES = 1 << 17  # values of a product that are summed at once, 512 kB in float32: they stay in a core's cache


class MaskGradients:
    """Hooks on a model's mask sites, while in context.

    The graph starts at the first sites that a forward pass reaches: nothing before them is differentiated. Where it is
    known which tokens the head does not read, nothing is computed for them. Without gradients, hooks do nothing.

    Args:
        model: a model in eval mode; its parameters' requires_grad is switched off for good.
        sites: the modules at whose inputs the nodes are seen, see `Family.sites`.
        narrowing: modules from whose input on only the first token is needed, see `Family.narrowing`.
        uses: how many times a pass runs the modules in `narrowing`; the last one alone is narrowed.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], narrowing: Sequence[str] = (), uses: int = 1) -> None:
        model.requires_grad_(False)
        self._gradients: dict[ScoreName, Tensor] = {}
        self._token_sums = TokenSums()
        self._tokens: tuple[int, ...] = ()  # (batch, tokens), as the sites before show
        self._calls: Counter[nn.Module] = Counter()
        self._handles = [model.register_forward_pre_hook(self._forget)]
        for module in narrowing:  # before the sites' own hooks, which then see one token
            self._handles.append(model.get_submodule(module).register_forward_pre_hook(self._narrower(uses)))
        for site in sites:
            hook = self._watch(site)
            self._handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))

    def __enter__(self) -> "MaskGradients":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._gradients = {}  # a new object, because the caller has the old one

    def of(self, outputs: Tensor, *, last: bool) -> dict[ScoreName, Tensor]:
        """Compute the derivatives of each example's output by every mask node.

        Args:
            outputs: (batch,), from the latest forward pass; `outputs[b]` depends on example b alone.
            last: whether the graph may be freed.

        Returns:
            Derivatives by score name, (batch, nodes), float64.
        """
        if not outputs.requires_grad:
            raise RuntimeError("no forward pass ran inside the context")
        self._gradients = {}
        # The derivatives by the roots themselves are not wanted, but asking for them runs every hook on the way.
        torch.autograd.backward(outputs.sum(), retain_graph=not last)
        if not self._gradients:
            raise RuntimeError("the forward pass did not run inside the context")
        return self._gradients

    def _forget(self, module: nn.Module, inputs: object) -> None:
        self._calls.clear()

    def _narrower(self, uses: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not torch.is_grad_enabled() and not IS_COMPUTED_AGAIN.get():
                return None
            self._calls[module] += 1
            return _first_token(inputs) if self._calls[module] % uses == 0 else None

        return before

    def _watch(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not torch.is_grad_enabled():
                return None
            activation = inputs[0]  # (batch, tokens, values), or (batch * tokens, values) as in OPT
            if activation.dim() == 3:
                self._tokens = activation.shape[:2]
            tokens = module.tokens if isinstance(module, RoutedLinear) else None
            shape = (*self._tokens, activation.shape[-1])
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
            kept = _kept(activation)

            def contract(gradient: Tensor) -> None:
                if tokens is None:
                    sums = self._token_sums(kept().reshape(shape), gradient.reshape(shape))
                else:
                    sums = self._token_sums.routed(kept(), gradient, tokens // shape[1], shape[0])
                by_value = sums.double()  # (batch, values)
                for score, nodes in site.counts.items():
                    of_use = by_value.view(len(by_value), nodes, -1).sum(-1)
                    self._gradients[score] = of_use + self._gradients.get(score, 0.0)

            activation.register_hook(contract)  # type: ignore[no-untyped-call]
            return activation, *inputs[1:]

        return before


def _first_token(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cut (batch, tokens, values) to (batch, 1, values). Added to a residual of all tokens, it is right at the first.

    The result is contiguous, because with a view PyTorch multiplies every example by its own copy of the weights.
    """
    return inputs[0][:, :1].contiguous(), *inputs[1:]


class TokenSums:
    """Computes `sum_t activation * gradient` for each example, from (batch, tokens, values) twice to (batch, values).

    Products and sums are float32, also those of bfloat16 factors, or float64 for float64 factors. A CPU computes a
    chunk at a time, in buffers that stay in the cache and are used again, so that reading both factors once is nearly
    the whole cost.
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
        most = min(tokens, max(1, CHUNK_VALUES // values))  # number of tokens, where an example exceeds a chunk
        for row in range(0, batch, rows):
            for token in range(0, tokens, most):
                chunk = slice(row, row + rows), slice(token, token + most)
                result[row : row + rows] += self._product(activation[chunk], gradient[chunk], wide).sum(1)
        return result

    def routed(self, activation: Tensor, gradient: Tensor, rows: Tensor, batch: int) -> Tensor:
        """Compute the sums of (tokens, values) twice, where `rows`, (tokens,), are the examples of the tokens."""
        wide = torch.promote_types(activation.dtype, torch.float32)
        result = torch.zeros(batch, activation.shape[1], dtype=wide, device=activation.device)
        most = max(1, CHUNK_VALUES // activation.shape[1])
        for start in range(0, len(rows), most):
            chunk = slice(start, start + most)
            product = activation[chunk].to(wide) * gradient[chunk]
            # A product with ones and zeros adds in an order that does not change, unlike `index_add_` on a GPU.
            result += one_hot(rows[chunk], batch).to(wide).T @ product
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
    """Return a function that gives the activation when it is needed.

    That of GELU in float32 is computed again from its input, which autograd keeps anyway. Holding the feed-forward
    activations adds 47 % to the memory of the graph in float32 and 38 % in bfloat16, where computing them again would
    cost more of the time.
    """
    node: Any = activation.grad_fn
    if node is not None and node.name() == "GeluBackward0" and activation.dtype is torch.float32:
        # The hook must not hold the node itself: the node holds its hooks, so that would keep the whole graph alive.
        source, approximate = node._saved_self.detach(), node._saved_approximate
        return lambda: gelu(source, approximate=approximate)
    held = activation.detach()
    return lambda: held
