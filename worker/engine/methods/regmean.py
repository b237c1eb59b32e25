"""`regmean`, see its catalog entry.

It is the least-squares solution of `sum_j lambda_j ||X_j W^T - X_j W_j^T||^2` (arXiv 2212.09849, equation 2), with
`G_j` the mean instead of the sum over tokens, so that a model with more or longer rows has no more of a say.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.errors import NumericalError
from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import MethodParameters, RegressionParameters
from worker.engine.methods.combine import MeasuredModel, Merger, combine, merged_dtype, model_weights

BATCH_BYTES = 128_000_000  # of the matrices that are factorised at once
STRONGER_RIDGES = (0.0, 1e-6, 1e-4, 1e-2)  # added in turn while rounding leaves a matrix that is not positive definite


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, RegressionParameters):
        raise TypeError(f"parameters of regmean expected, got {type(parameters).__name__}")
    weights = model_weights(models)[:, None]
    weights /= weights.sum()

    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        if slot.input is None:
            return combine(versions, weights)
        grams = [model.grams[slot.input] for model in models]
        return regress(slot.input, versions, grams, weights, parameters.shrink, parameters.ridge)

    return merge


def regress(
    source: str,
    versions: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Tensor,
    shrink: float,
    ridge: float,
    columns: Tensor | None = None,
) -> Tensor:
    """`W_s = W_1,s + [sum_j w_j,s (W_j,s - W_1,s) G_j] [sum_j w_j,s G_j]^-1`, exact for identical versions.

    Args:
        source: the name of the layer's input, for errors.
        versions: one matrix per model, (outputs, inputs).
        grams: one per model, (inputs, inputs).
        weights: (models, slices), float64; a factor common to the models does not matter. The rows are cut into
            `slices` equal runs.
        shrink: multiplies what is off the diagonal of each `G_j`.
        ridge: what is added to its diagonal, in units of the mean diagonal entry over all models. Where that is 0,
            every `G_j` counts as the identity, and the result is the weighted mean.
        columns: (models, inputs), float64: weights of the columns, `G_j` becoming `D_j G_j D_j` with `D_j` the
            diagonal matrix of their square roots.

    Returns:
        The merged matrix in float32, or float64 where a version is float64; solved in float64.

    Raises:
        NumericalError: a Gram matrix has no finite entries or is far from positive semidefinite.
    """
    mean = float(torch.stack([gram.diagonal().double().mean() for gram in grams]).mean())
    if mean == 0:
        grams = [torch.eye(len(gram)) for gram in grams]
    for stronger in STRONGER_RIDGES:
        conditioned = [_conditioned(gram, shrink, (ridge + stronger) * mean) for gram in grams]
        if columns is not None:
            conditioned = [r[:, None] * gram * r for r, gram in zip(columns.sqrt(), conditioned, strict=True)]
        step = _solve(versions, conditioned, weights)
        if step is not None:
            return (versions[0].double() + step).to(merged_dtype(versions))
    raise NumericalError(f"the Gram matrices of {source} are not positive semidefinite", input=source)


def _conditioned(gram: Tensor, shrink: float, ridge: float) -> Tensor:
    """Off-diagonal entries times `shrink`, `ridge` added to the diagonal; float64."""
    conditioned = shrink * gram.double()
    conditioned.diagonal().copy_(gram.diagonal() + ridge)
    return conditioned


def _solve(versions: Sequence[Tensor], grams: Sequence[Tensor], weights: Tensor) -> Tensor | None:
    """The change of the first version, (outputs, inputs); None where a slice's matrix cannot be factorised."""
    first = versions[0].double()
    slices, (outputs, inputs) = weights.shape[1], first.shape
    by_slice = (slices, outputs // slices, inputs)
    batch = max(1, BATCH_BYTES // (8 * inputs**2))
    step = torch.empty(by_slice, dtype=torch.float64)
    for start in range(0, slices, batch):
        chosen = slice(start, start + batch)
        left = torch.zeros(len(step[chosen]), inputs, inputs, dtype=torch.float64)
        right = torch.zeros_like(step[chosen])
        for version, gram, weight in zip(versions, grams, weights[:, chosen, None, None], strict=True):
            left.addcmul_(weight, gram)
            right += (weight * (version.double() - first).view(by_slice)[chosen]) @ gram
        factor, info = torch.linalg.cholesky_ex(left)
        if bool(info.any()):
            return None
        step[chosen] = torch.cholesky_solve(right.mT, factor).mT
    return step.view(outputs, inputs)
