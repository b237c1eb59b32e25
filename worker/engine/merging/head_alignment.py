"""Head alignment: a kept head is refitted to the features of the merged backbone, which it now reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.contracts.spec import ALIGN_RIDGE
from worker.engine.evaluation.evaluate import head_inputs_of_parts, head_of
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnRows

CHUNK = 4096  # rows of features that are held in float64 at once


class Refit:
    """Sums over rows from which an aligned head follows, see `aligned`. The rows themselves are not kept.

    Args:
        weight, bias: the expert's head, (outputs, width) and (outputs,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._has_bias = bias is not None
        self._head = weight.double() if bias is None else torch.cat([weight.double(), bias.double()[:, None]], dim=1)
        columns = self._head.shape[1]
        self._second_moment = torch.zeros(columns, columns, dtype=torch.float64)
        self._residual = torch.zeros_like(self._head)
        self._rows = 0

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Add rows: their features, (rows, width), and the outputs that are wanted, (rows, outputs)."""
        for start in range(0, len(features), CHUNK):
            x = features[start : start + CHUNK].double()
            if self._has_bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            self._second_moment += x.T @ x
            self._residual += (outputs[start : start + CHUNK].double() - x @ self._head.T).T @ x
        self._rows += len(features)

    def head(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Return the aligned head's weight and bias, float64."""
        second_moment, residual = self._second_moment / self._rows, self._residual / self._rows
        held = ridge * second_moment.diagonal().mean()
        factor = torch.linalg.cholesky(second_moment + held * torch.eye(len(second_moment), dtype=torch.float64))
        head = self._head + torch.cholesky_solve(residual.T, factor).T
        return (head[:, :-1], head[:, -1]) if self._has_bias else (head, None)


def aligned(
    features: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor | None, ridge: float = ALIGN_RIDGE
) -> tuple[Tensor, Tensor | None]:
    """Fit the head whose outputs on the merged backbone's features are closest to the expert's on its own features.

    `argmin_W 1/n ||X W^T - Y||^2 + mu tr(X^T X / n) / d ||W - W_expert||^2`, with X augmented by 1 where there is a
    bias, d its columns and mu the `ridge`: one ridge regression towards the expert's head, in float64. Where the
    features are the expert's own, the head stays as it is.

    Args:
        features: X, (rows, width), the features that the head reads in the merged model.
        outputs: Y, (rows, outputs), the outputs of the expert's own head on its own features, for the same rows.
        weight, bias: the expert's head, (outputs, width) and (outputs,).

    Returns:
        Weight and bias, float64.
    """
    refit = Refit(weight, bias)
    refit.add(features, outputs)
    return refit.head(ridge)


def align_head(
    expert: LoadedModel,
    outputs: Tensor,
    merged: LoadedModel,
    examples: Sequence[Example],
    precision: Precision,
    on_rows: OnRows,
    ridge: float = ALIGN_RIDGE,
) -> dict[str, Tensor]:
    """Return the tensors of `merged`'s head, by name, refitted to the outputs of `expert`; no model is changed.

    Args:
        outputs: outputs of the expert's own head on the rows, (outputs, labels).
        examples: the rows in the tokens of `merged`.
    """
    head = head_of(expert)
    refit = Refit(head.weight.detach().cpu(), None if head.bias is None else head.bias.detach().cpu())
    for places, features in head_inputs_of_parts(merged, examples, precision, on_rows):
        refit.add(features, outputs[places])
    new_weight, new_bias = refit.head(ridge)
    name = expert.family.head.logits
    return {f"{name}.weight": new_weight} | ({} if new_bias is None else {f"{name}.bias": new_bias})
