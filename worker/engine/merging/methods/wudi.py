"""`wudi`, see its catalog entry.

The paper minimises `sum_j |(T - t_j) t_j^T|^2 / |t_j|^2` for matrices (outputs, inputs), by a descent that starts
from the sum of the task vectors. Its gradient is zero where `T sum_j G_j = sum_j t_j G_j`: the regression of RegMean,
with `t_j^T t_j / |t_j|^2` in place of the inputs' Gram matrices. Weights of the models, which the paper does not have,
are factors of their terms.

The solution is computed as a step from where it starts, `S + [sum_j w_j (t_j - S) G_j] F`, with `F` the regularised
inverse of `sum_j w_j G_j`. With the ridge, S is the mean of the models, so that equal models stay as they are.
"""

import math

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, WudiParameters
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.methods.matrices import Components, TaskMatrices, merging_matrices
from worker.engine.merging.methods.regmean import STRONGER_RIDGES

ROUNDING = 1e-9  # of a number of directions, which rounds up


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, WudiParameters):
        raise TypeError(f"parameters of wudi expected, got {type(parameters).__name__}")

    def merged(matrices: TaskMatrices) -> Tensor:
        factors = _factors(matrices)
        if not any(factors):
            return matrices.mean()
        if parameters.filter == "ridge":
            return _by_ridge(matrices, factors, parameters.at("ridge", matrices.place))
        directions = _directions(matrices, factors)
        if parameters.filter == "participation":
            parts, kept = torch.ones_like(directions.values), participating(directions.values)
        else:
            parts = -torch.expm1(-parameters.at("time", matrices.place) * directions.values**2)
            kept = math.ceil(parameters.at("rank", matrices.place) * matrices.base.shape[1] - ROUNDING)
        return _filtered(matrices, factors, directions, parts, kept)

    return merging_matrices(models, merged)


def participating(values: Tensor) -> int:
    """Return the participation ratio of singular values, `(sum s)^2 / sum s^2`, rounded up.

    Args:
        values: (directions,), not all zero.
    """
    return math.ceil(float(values.sum() ** 2 / values.square().sum()) - ROUNDING)


def _factors(matrices: TaskMatrices) -> list[float]:
    """Return `w_j / |t_j|^2`, and 0 where the model has not changed the matrix by more than rounding could."""
    norms = [float(torch.linalg.vector_norm(matrices[index])) for index in range(len(matrices))]
    return [
        weight / norm**2 if norm > matrices.rounding else 0.0
        for weight, norm in zip(matrices.weights, norms, strict=True)
    ]


def _residual(matrices: TaskMatrices, factors: list[float], start: Tensor) -> Tensor:
    """Compute `sum_j w_j (W_j - S) G_j` for weights S, (outputs, inputs)."""
    total = torch.zeros_like(start)
    for index, factor in enumerate(factors):
        delta, off = matrices[index], matrices.versions[index].double() - start
        outputs, inputs = delta.shape
        product = (off @ delta.T) @ delta if outputs < inputs else off @ (delta.T @ delta)
        total.add_(product, alpha=factor)
    return total


def _by_ridge(matrices: TaskMatrices, factors: list[float], ridge: float) -> Tensor:
    start = matrices.mean()
    residual = _residual(matrices, factors, start)
    grams = torch.zeros(start.shape[1], start.shape[1], dtype=torch.float64)
    for index, factor in enumerate(factors):
        delta = matrices[index]
        grams.addmm_(delta.T, delta, alpha=factor)
    diagonal = grams.diagonal().clone()
    for stronger in STRONGER_RIDGES:  # the last one is more than rounding can lack, since the sum is semidefinite
        grams.diagonal().copy_(diagonal + (ridge + stronger) * diagonal.mean())
        root, info = torch.linalg.cholesky_ex(grams)
        if not bool(info):
            break
    return start + torch.cholesky_solve(residual.T, root).T


def _directions(matrices: TaskMatrices, factors: list[float]) -> Components:
    """Find eigenvectors of `sum_j w_j G_j` as singular vectors, whose values are the eigenvalues' square roots."""
    scaled = [matrices[index].mul_(factor**0.5) for index, factor in enumerate(factors)]
    stacked = torch.cat(scaled)
    return Components.of(stacked, stacked.shape[1], 0.0)


def _filtered(matrices: TaskMatrices, factors: list[float], directions: Components, parts: Tensor, kept: int) -> Tensor:
    """Solve for `parts` of the exact solution in the first `kept` directions, starting from the sum."""
    start = matrices.base.double() + matrices.sum()
    along = directions.right[:, :kept]
    scales = (parts / directions.values**2)[:kept]
    return start + (_residual(matrices, factors, start) @ along * scales) @ along.T
