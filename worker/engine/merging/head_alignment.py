"""Head alignment: a kept head is refitted to the features of the merged backbone, which it now reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.contracts.spec import ALIGN_RIDGE
from worker.engine.evaluation.evaluate import head_inputs, head_of
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnRows


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
    x = features.double()
    head = weight.double()
    if bias is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        head = torch.cat([head, bias.double()[:, None]], dim=1)
    second_moment = x.T @ x / len(x)
    held = ridge * second_moment.diagonal().mean()
    residual = (outputs.double() - x @ head.T).T @ x / len(x)  # (outputs, columns)
    factor = torch.linalg.cholesky(second_moment + held * torch.eye(x.shape[1], dtype=torch.float64))
    head = head + torch.cholesky_solve(residual.T, factor).T
    return (head, None) if bias is None else (head[:, :-1], head[:, -1])


def align_head(
    expert: LoadedModel,
    merged: LoadedModel,
    examples: Sequence[Example],
    precision: Precision,
    on_rows: OnRows,
    ridge: float = ALIGN_RIDGE,
    merged_examples: Sequence[Example] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of `merged`'s head, by name, refitted to the outputs of `expert`; no model is changed.

    Args:
        merged_examples: the same rows in the tokens of `merged`, where these differ from the expert's.
    """
    head = head_of(expert)
    weight, bias = head.weight.detach().cpu(), None if head.bias is None else head.bias.detach().cpu()
    outputs = head_inputs(expert, examples, precision, on_rows) @ weight.double().T
    if bias is not None:
        outputs += bias.double()
    features = head_inputs(merged, examples if merged_examples is None else merged_examples, precision, on_rows)
    new_weight, new_bias = aligned(features, outputs, weight, bias, ridge)
    name = expert.family.head.logits
    return {f"{name}.weight": new_weight} | ({} if new_bias is None else {f"{name}.bias": new_bias})
