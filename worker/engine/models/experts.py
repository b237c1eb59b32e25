"""Experts of a model as linear layers of their own, each of which computes the tokens that are routed to it.

transformers keeps the matrices of all experts of a layer in one parameter, and multiplies by slices of it, at which
nothing can be seen. Here every expert has the modules that files have, whose weights are views of that parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.catalog.families import Family


class RoutedLinear(nn.Linear):
    """A linear layer of one expert, whose input is (its tokens, width)."""

    tokens: Tensor
    """Places of the tokens of the latest input among all tokens of the batch, in order: the example's number times the
    padded length, plus the token's place there."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)


class SingleExpert(nn.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, weights: Mapping[str, Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            RoutedLinear(weights[name]) for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.act_fn = activation

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        self.gate_proj.tokens = self.up_proj.tokens = self.down_proj.tokens = tokens
        found: Tensor = self.down_proj(self.neurons(hidden))
        return found

    def neurons(self, hidden: Tensor) -> Tensor:
        """Return what the neurons give, which the last matrix reads."""
        found: Tensor = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return found


class Experts(nn.ModuleList):
    """The experts of one layer. All are run, also those without a token, so that hooks on each see every batch."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute `sum_k weights_k expert_k(hidden)` for each token.

        Args:
            hidden: (tokens, width), those of all examples one after another.
            chosen: numbers of each token's experts, (tokens, experts a token).
            weights: their weights, in the same shape.
        """
        numbers, order = chosen.flatten().sort(stable=True)
        runs = torch.split(order, torch.bincount(numbers, minlength=len(self)).tolist())
        result = torch.zeros_like(hidden)
        for expert, run in zip(self, runs, strict=True):
            tokens = run // chosen.shape[1]
            found = expert(hidden[tokens], tokens) * weights.flatten()[run, None]
            result = result.index_add(0, tokens, found.to(result.dtype))
        return result


def with_single_experts(model: Any, family: Family) -> None:
    """Put `Experts` in place of each stack of experts that the family's table names, in the running model."""
    paths = {path.rpartition(".")[0] for path in family.stacked}
    for layer in range(model.config.get_text_config().num_hidden_layers if paths else 0):
        for path in paths:
            parent = model.get_submodule(family.layer_path(layer) + path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            setattr(parent, name, _single(getattr(parent, name), family.stacked, path))


def _single(stacked: Any, table: Mapping[str, Sequence[str]], path: str) -> Experts:
    matrices: dict[str, Tensor] = {}
    for parameter, modules in table.items():
        whole: Tensor = getattr(stacked, parameter.removeprefix(f"{path}."))
        parts = whole.detach().chunk(len(modules), dim=1)
        matrices |= {module.rpartition(".")[2]: part for module, part in zip(modules, parts, strict=True)}
    count = len(next(iter(matrices.values())))
    return Experts(
        SingleExpert({name: of_all[number] for name, of_all in matrices.items()}, stacked.act_fn)
        for number in range(count)
    )
