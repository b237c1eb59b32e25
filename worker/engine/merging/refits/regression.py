"""Ridge regressions of linear layers, and the sums over tokens that they solve with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.merging.refits.linear_groups import LinearGroup, bias_of, matrix_of

RIDGE = 1e-4  # share of the mean diagonal entry: directions that no input spans stay as they are
PRODUCT_TOKENS = 4096  # multiplied at once, so that adding to the sums takes little of the time
LEAST_COLUMNS = 128  # of a run in which half of a symmetric product is computed
MOST_RUNS = 12


def ridge_step(moment: Tensor, error: Tensor, hold: float) -> Tensor:
    """Compute `N [S + hold diag(S) + 1e-4 tr(S)/d I]^-1`, (outputs, d), from S (d, d) and N (outputs, d), in float64.

    It minimises the mean of `||e - x step^T||^2` plus `hold` and the ridge times the squares of the step, where S is
    the mean of `x x^T`, and N that of `e x^T`.

    Raises:
        NumericalError: rounding leaves a matrix that is not positive definite.
    """
    diagonal = moment.diagonal()
    factor, failed = torch.linalg.cholesky_ex(moment + torch.diag(hold * diagonal + RIDGE * diagonal.mean()))
    if bool(failed):
        raise NumericalError("rounding left the inputs of a linear layer without a solution; raise hold")
    return torch.cholesky_solve(error.T, factor).T


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one linear layer: every expert's lambda, and the strength that holds it."""

    lambdas: tuple[float, ...]
    hold: float


class Regression:
    """The ridge regression of one group: linear layers of the merge that read the same."""

    def __init__(self, group: LinearGroup, merged: nn.Module, settings: Callable[[str], LayerSettings]) -> None:
        self.group = group
        self._weights = [matrix_of(merged, module, module in group.transposed) for module in group.modules]
        self._biases = [bias_of(merged, module) for module in group.modules]
        self._has_bias = all(bias is not None for bias in self._biases)  # it has either a constant or none
        self._outputs = [len(weight) for weight in self._weights]
        self._inputs = self._weights[0].shape[1]
        self._alike: dict[LayerSettings, list[int]] = {}  # layers with the same settings share a regression
        for number, module in enumerate(group.modules):
            self._alike.setdefault(settings(module), []).append(number)
        columns, device = self._inputs + self._has_bias, self._weights[0].device
        empty = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._moments = {of: empty.clone() for of in self._alike}
        self._errors = {
            of: empty.new_zeros(sum(self._outputs[number] for number in members), columns)
            for of, members in self._alike.items()
        }

    def add(self, expert: int, moment: Tensor, error: Tensor, count: int) -> None:
        """Add the sums of a model's `count` tokens, see `Comparison.products`."""
        columns = self._inputs + self._has_bias
        by_layer = torch.split(error[:, :columns], self._outputs)
        for of, members in self._alike.items():
            share = of.lambdas[expert] / sum(of.lambdas) / count
            self._moments[of].add_(moment[:columns, :columns], alpha=share)
            self._errors[of].add_(torch.cat([by_layer[number] for number in members]), alpha=share)

    def step(self) -> dict[str, Tensor]:
        """Change the layers in place, and return their changes; nothing changes where there was no token."""
        changes = {}
        for of, members in self._alike.items():
            if not bool(self._moments[of].any()):
                continue
            step_of_all = ridge_step(self._moments[of], self._errors[of], of.hold).float()
            steps = torch.split(step_of_all, [self._outputs[number] for number in members])
            for number, step in zip(members, steps, strict=True):
                module, change = self.group.modules[number], step[:, : self._inputs]
                changes[f"{module}.weight"] = change.T if module in self.group.transposed else change
                self._weights[number].add_(change)
                bias = self._biases[number] if self._has_bias else None
                if bias is not None:
                    changes[f"{module}.bias"] = step[:, -1]
                    bias.add_(step[:, -1])
        return {name: change.cpu().contiguous() for name, change in changes.items()}


class Products:
    """Weighted sums over tokens of `x x^T` and `e x^T`, x augmented by 1: float64 sums of float32 products."""

    def __init__(self, inputs: int, errors: int, device: torch.device) -> None:
        self._moment = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self._error = torch.zeros(errors, inputs + 1, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, e: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: x (tokens, inputs), e (tokens, errors), and the tokens' weights, (tokens,), 1 by default."""
        root = x.new_ones(len(x), 1) if weights is None else weights.to(x)[:, None].sqrt()
        self._waiting.append((x, e, root) if weights is None else (x * root, e * root, root))
        if sum(len(x) for x, *_ in self._waiting) >= PRODUCT_TOKENS:
            self._multiply()

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums (inputs + 1, inputs + 1) and (errors, inputs + 1)."""
        self._multiply()
        return self._moment, self._error

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x, e, root = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        width = x.shape[1]
        columns = max(LEAST_COLUMNS, -(-width // MOST_RUNS))
        for start in range(0, width, columns):  # the matrix is symmetric, and little more than half is computed
            end = min(start + columns, width)
            product = x[:, start:end].T @ x[:, start:]
            self._moment[start:end, start:width].add_(product)
            self._moment[end:width, start:end].add_(product[:, end - start :].T)
        constant = (root.T @ x)[0]
        self._moment[:width, width].add_(constant)
        self._moment[width, :width].add_(constant)
        self._moment[width, width].add_(root.square().sum())
        self._error[:, :width].add_(e.T @ x)
        self._error[:, width].add_((e.T @ root)[:, 0])
