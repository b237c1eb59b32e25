"""`esm`, see its catalog entry.

The paper takes the principal directions of the shift `X D^T` of a layer's outputs on some rows X. They are the
eigenvectors of `D G D^T`, with G the Gram matrix of X, so that the rows themselves are not needed here.

As the authors' code (github.com/kiddo127/ESM) has it, principal components are of the shift as it is, without its mean
taken off, and a model is scaled by the norm of its whole task vector. Their scaling of one layer against others of its
kind is left out, since a tensor is merged here without the others; so is the factor by eigenvalues, which the paper
does not have.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.methods import EsmParameters, MethodParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import model_weights
from worker.engine.merging.methods.matrices import TaskMatrices, isometry, merging_matrices

ROUNDING = 1e-9  # of a number of directions, which rounds down
UNSEEN = 1e-10  # share of the largest variance below which that of a direction is rounding


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, EsmParameters):
        raise TypeError(f"parameters of esm expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        source, place = versions.slot.input, versions.place
        weights = model_weights(models, place).tolist()
        taking_part = [model for model, weight in zip(models, weights, strict=True) if weight > 0]
        rank, power = parameters.at("rank", place), parameters.at("power", place)

        def merged(matrices: TaskMatrices) -> Tensor:
            return matrices.base.double() + merged_subspaces(matrices, taking_part, source, rank, power)

        return merging_matrices(models, merged)(versions)

    return prepare


def merged_subspaces(
    matrices: TaskMatrices, models: Sequence[MeasuredModel], source: str | None, rank: float, power: float
) -> Tensor:
    """Compute the change of the base's matrix, (outputs, inputs), float64.

    Args:
        models: those of the matrices, in their order.
        source: name of the layer's input; None where it is not measured, and every Gram matrix counts as the identity.
        rank: share of the directions that all models together keep.
        power: power of the relative norms by which models and inputs are scaled.
    """
    most = max(1, int(rank / len(matrices) * matrices.base.shape[0] + ROUNDING))
    directions, parts, norms = [], [], []
    for index, weight in enumerate(matrices.weights):
        delta = matrices[index]
        gram = None if source is None else models[index].grams[source].double()
        norm = float(torch.linalg.vector_norm(delta))
        found = essential_directions(delta, gram, most) if norm > matrices.rounding else delta[:, :0]
        directions.append(found)
        parts.append(weight * norm**power * (found.T @ delta))
        norms.append(norm)
    mean = sum(norms) / len(norms)
    if mean == 0:
        return torch.zeros_like(matrices.base, dtype=torch.float64)
    coordinates = torch.cat(parts) / mean**power
    by_input = torch.linalg.vector_norm(coordinates, dim=0)
    coordinates *= (by_input / by_input.mean()) ** power
    return _evened(torch.cat(directions, dim=1)) @ _evened(coordinates.T).T


def essential_directions(delta: Tensor, gram: Tensor | None, most: int) -> Tensor:
    """Return the directions in which a task vector moves outputs most, (outputs, directions), orthonormal, float64.

    These are eigenvectors of `D G D^T`, or of `D D^T` where no inputs are known. Directions in which nothing moves are
    left out.

    Args:
        delta: D, (outputs, inputs).
        gram: G, (inputs, inputs), the mean of `x x^T`; zero where no token was seen.
        most: number of directions to be found.
    """
    known = gram is not None and bool(gram.any())
    is_tall = delta.shape[0] > delta.shape[1]
    if not is_tall:
        shift = delta @ gram @ delta.T if known and gram is not None else delta @ delta.T
        factor = None
    else:  # there are no more directions than inputs, and G = L L^T gives them from (D L)^T D L
        factor = delta @ _root(gram) if known and gram is not None else delta
        shift = factor.T @ factor
    variances, vectors = torch.linalg.eigh(shift)
    kept = variances > UNSEEN * variances[-1]
    kept[: max(0, len(kept) - most)] = False
    variances, vectors = variances[kept].flip(0), vectors[:, kept].flip(1)
    found: Tensor = vectors if factor is None else factor @ vectors / variances.sqrt()
    return found


def _root(gram: Tensor) -> Tensor:
    """Return L with `L L^T = G`, of a matrix that is positive semidefinite but for rounding."""
    squares, basis = torch.linalg.eigh(gram)
    root: Tensor = basis * squares.clamp_min(0).sqrt()
    return root


def _evened(vectors: Tensor) -> Tensor:
    """Replace all singular values by their mean: the nearest orthonormal vectors, (width, vectors), times that mean."""
    orthonormal = isometry(vectors)
    sum_of_values = (orthonormal * vectors).sum()  # the trace of (X^T X)^(1/2)
    return orthonormal * (sum_of_values / min(vectors.shape))
