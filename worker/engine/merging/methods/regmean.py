"""`regmean`, see its catalog entry.

It is the least-squares solution of `sum_j lambda_j ||X_j W^T - X_j W_j^T||^2` (arXiv 2212.09849, equation 2), with
`G_j` the mean instead of the sum over tokens, so that a model with more or longer rows has no more influence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, RegMeanParameters, RegressionParameters
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.combine import by_slices, model_weights

BATCH_BYTES = 128_000_000  # size of the matrices that are factorised at once
STRONGER_RIDGES = (0.0, 1e-6, 1e-4, 1e-2)  # added in turn while rounding leaves a matrix that is not positive definite


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, RegressionParameters):
        raise TypeError(f"parameters of regmean expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        source, place = versions.slot.input, versions.place
        weights = model_weights(models, place)[:, None]
        weights /= weights.sum()
        if source is None:
            return by_slices(versions, weights)
        shrink, ridge = parameters.at("shrink", place), parameters.at("ridge", place)
        measured = models
        if isinstance(parameters, RegMeanParameters) and parameters.gram == "deltas":
            measured = _estimated(models, versions)
        return regression_of(versions, source, measured, weights, shrink, ridge)

    return prepare


@dataclass(frozen=True)
class TaskVectorGrams(Mapping[str, Tensor]):
    """The estimate `tau^T tau` of a Gram matrix, whatever the name of the input, computed when it is asked for.

    Gradients of a layer's rows are multiples of its inputs, so that the sum of steps spans what it has read
    (arXiv 2604.01329). The estimate is up to a factor.
    """

    version: Tensor
    """(outputs, inputs), or its transpose."""
    base: Tensor
    transposed: bool

    def __getitem__(self, name: str) -> Tensor:
        delta = self.version.double() - self.base.double()
        return delta @ delta.T if self.transposed else delta.T @ delta

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _estimated(models: Sequence[MeasuredModel], versions: Versions) -> list[MeasuredModel]:
    """Return the models with estimates of the Gram matrices of one linear layer."""
    whole = versions.whole()
    base, transposed = required_base(whole.base), versions.slot.transposed
    return [
        replace(model, grams=TaskVectorGrams(version, base, transposed))
        for model, version in zip(models, whole.versions, strict=True)
    ]


def regression_of(
    versions: Versions,
    source: str,
    models: Sequence[MeasuredModel],
    weights: Tensor,
    shrink: float,
    ridge: float,
    columns: Tensor | None = None,
) -> BlockMerge:
    """Make `regress` of a linear layer's weight, which may be stored as (inputs, outputs)."""
    whole = versions.whole().versions
    if versions.slot.transposed:
        whole = [version.T for version in whole]
    merged = regress(source, whole, models, weights, shrink, ridge, columns)
    merged = merged.T if versions.slot.transposed else merged
    return lambda block: merged[block.rows]


def regress(
    source: str,
    versions: Sequence[Tensor],
    models: Sequence[MeasuredModel],
    weights: Tensor,
    shrink: float,
    ridge: float,
    columns: Tensor | None = None,
) -> Tensor:
    """Compute `W_s = W_1,s + [sum_j w_j,s (W_j,s - W_1,s) G_j] [sum_j w_j,s G_j]^-1`, exact for identical versions.

    Args:
        source: name of the layer's input. Only one model's Gram matrix of it is held at a time.
        versions: one matrix per model, (outputs, inputs).
        weights: (models, slices), float64; a factor common to the models does not matter. The rows are cut into
            `slices` equal runs.
        shrink: factor of the entries off the diagonal of each `G_j`.
        ridge: number added to its diagonal, in units of the mean diagonal entry over all models. Where that mean is
            0, every `G_j` counts as the identity, and the result is the weighted mean.
        columns: (models, inputs), float64: weights of the columns, `G_j` becoming `D_j G_j D_j` with `D_j` the
            diagonal matrix of their square roots.

    Returns:
        The merged matrix in the versions' dtype; solved in float64.

    Raises:
        NumericalError: a Gram matrix has no finite entries or is far from positive semidefinite.
    """
    mean = sum(float(model.grams[source].diagonal().double().mean()) for model in models) / len(models)

    def conditioned(added: float, index: int) -> Tensor:
        """Return a model's matrix: entries off the diagonal times `shrink`, `added` on the diagonal; float64."""
        gram = models[index].grams[source] if mean else torch.eye(versions[0].shape[1])
        found = shrink * gram.double()
        found.diagonal().copy_(gram.diagonal() + added)
        if columns is not None:
            root = columns[index].sqrt()
            found.mul_(root[:, None]).mul_(root)
        return found

    for stronger in STRONGER_RIDGES:
        step = _solve(versions, partial(conditioned, (ridge + stronger) * mean), weights)
        if step is not None:
            return (versions[0].double() + step).to(versions[0].dtype)
    raise NumericalError(f"the Gram matrices of {source} are not positive semidefinite", input=source)


def _solve(versions: Sequence[Tensor], gram_of: Callable[[int], Tensor], weights: Tensor) -> Tensor | None:
    """Return the change of the first version, (outputs, inputs); None where a slice's matrix cannot be factorised."""
    first = versions[0].double()
    slices, (outputs, inputs) = weights.shape[1], first.shape
    by_slice = (slices, outputs // slices, inputs)
    batch = max(1, BATCH_BYTES // (8 * inputs**2))
    step = torch.empty(by_slice, dtype=torch.float64)
    for start in range(0, slices, batch):
        chosen = slice(start, start + batch)
        left = torch.zeros(len(step[chosen]), inputs, inputs, dtype=torch.float64)
        right = torch.zeros_like(step[chosen])
        for index, (version, weight) in enumerate(zip(versions, weights[:, chosen, None, None], strict=True)):
            gram = gram_of(index)
            left.addcmul_(weight, gram)
            right += (weight * (version.double() - first).view(by_slice)[chosen]) @ gram
        factor, info = torch.linalg.cholesky_ex(left)
        if bool(info.any()):
            return None
        step[chosen] = torch.cholesky_solve(right.mT, factor).mT
    return step.view(outputs, inputs)
