"""Gradients by mask nodes, one example at a time, from one batched backward pass.

No mask exists. A node's mask multiplies its activation `c`, so the derivative of an example's output by it, at mask 1,
is the sum of `c * dL/dc` over the example's tokens (and, for a head, over its width). The examples of a batch do not
see each other, so keeping the batch axis gives exact per-example gradients, and no parameter gradient is computed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from worker.engine.catalog.families import Site


class MaskGradients:
    """Hooks on a model's mask sites, while in context.

    Args:
        model: in eval mode; its parameters' requires_grad is switched off for good.
        embeddings: module whose output the graph starts at; nothing below it is differentiated.
        sites: where the nodes are seen, see `Family.sites`.
    """

    def __init__(self, model: nn.Module, embeddings: str, sites: Sequence[Site]) -> None:
        model.requires_grad_(False)
        self._root: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(embeddings).register_forward_hook(self._start_graph)]
        for site in sites:
            hook = self._watch(site)
            self._handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))

    def __enter__(self) -> "MaskGradients":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._root = None
        self._gradients.clear()

    def of(self, outputs: Tensor, *, last: bool) -> dict[str, Tensor]:
        """Derivatives of each example's output by every mask node.

        Args:
            outputs: (batch,), of the latest forward pass; `outputs[b]` depends on example b alone.
            last: whether the graph may be freed.

        Returns:
            By score name, (batch, nodes), float64.
        """
        if self._root is None:
            raise RuntimeError("no forward pass ran inside the context")
        self._gradients = {}
        # The derivative by the embeddings themselves is not wanted, but asking for it runs every hook on the way.
        torch.autograd.grad(outputs.sum(), self._root, retain_graph=not last)
        return self._gradients

    def _start_graph(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        self._root = output.detach().requires_grad_()
        return self._root

    def _watch(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activation = inputs[0]  # (batch, tokens, nodes * width)
            if not activation.requires_grad:
                return
            held = activation.detach()

            def contract(gradient: Tensor) -> None:
                product = held.float() * gradient.float() if held.dtype.itemsize < 4 else held * gradient
                by_node = product.sum(1, dtype=torch.float64)  # (batch, nodes * width)
                self._gradients[site.score] = by_node.view(len(by_node), site.nodes, -1).sum(-1)

            activation.register_hook(contract)  # type: ignore[no-untyped-call]

        return before
