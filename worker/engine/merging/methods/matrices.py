"""Merges the task vectors of linear layers as whole matrices, and decomposes such matrices, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.checkpoints.row_blocks import is_finite
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.combine import by_slices, model_weights

AXES = 2  # of a matrix
GRAM_ROUNDING = 1e-7  # share of the largest singular value below which a matrix times its transpose tells nothing
DEPENDENT = 1e-10  # share of the largest square below which what vectors have beyond the others is rounding


@dataclass(frozen=True)
class TaskMatrices:
    """The task vectors of a linear layer's weight in the models that have a part in it, (outputs, inputs).

    They are computed when they are asked for, so that few are held in float64.
    """

    versions: Sequence[Tensor]
    """Weights of the models, (outputs, inputs), float32 or float64."""
    base: Tensor
    weights: Sequence[float]
    """`N lambda_j / sum_k lambda_k` of N models: 1 where all lambdas are equal."""
    place: TensorPlace

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, index: int) -> Tensor:
        return self.versions[index].double() - self.base.double()

    def mean(self) -> Tensor:
        """Compute the weighted mean of the models' weights, float64, exact for equal models."""
        first, *others = self.versions
        start = first.double()
        total = start.clone()
        for version, weight in zip(others, self.weights[1:], strict=True):
            total.add_(version.double() - start, alpha=weight / len(self))
        return total

    def sum(self) -> Tensor:
        """Compute the weighted sum of the task vectors, float64."""
        total = torch.zeros(self.base.shape, dtype=torch.float64)
        for index, weight in enumerate(self.weights):
            total.add_(self[index], alpha=weight)
        return total

    @cached_property
    def rounding(self) -> float:
        """Size of the largest singular value that the rounding of stored weights may give to a task vector."""
        return 0.5 * torch.finfo(self.base.dtype).eps * float(torch.linalg.vector_norm(self.base.double()))


def merging_matrices(models: Sequence[MeasuredModel], merged_by: Callable[[TaskMatrices], Tensor]) -> Merger:
    """Make the method that merges linear layers by `merged_by`, and averages all other tensors.

    A matrix that fuses several layers, as query, key and value, is one matrix. Models of weight 0 in a tensor have no
    part in it. Matrices that are not finite are averaged, so that the executor sees what is not finite.

    Args:
        merged_by: returns merged weights, (outputs, inputs), float64.
    """

    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place)
        mean = by_slices(versions, (weights / weights.sum())[:, None])
        if not versions.slot.is_linear or len(versions.shape) != AXES or 0 in versions.shape:
            return mean
        whole = versions.whole()
        if not all(map(is_finite, (*whole.versions, required_base(whole.base)))):
            return mean
        matrices = _matrices(whole, weights, versions)
        merged = merged_by(matrices).to(matrices.base.dtype)
        merged = merged.T if versions.slot.transposed else merged
        return lambda block: merged[block.rows]

    return prepare


def _matrices(whole: Block, weights: Tensor, versions: Versions) -> TaskMatrices:
    def turned(tensor: Tensor) -> Tensor:
        return tensor.T if versions.slot.transposed else tensor

    part = weights > 0
    found = [turned(version) for version, has in zip(whole.versions, part, strict=True) if has]
    relative = weights[part] / weights[part].mean()
    return TaskMatrices(found, turned(required_base(whole.base)), relative.tolist(), versions.place)


@dataclass(frozen=True)
class Components:
    """Singular components of a matrix, the largest first: `left @ diag(values) @ right.T`, float64."""

    left: Tensor
    """(rows, components)"""
    values: Tensor
    """(components,)"""
    right: Tensor
    """(columns, components)"""

    @classmethod
    def of(cls, matrix: Tensor, most: int, rounding: float) -> "Components":
        """Find the largest singular components, from the eigenvectors of the matrix times its transpose.

        Args:
            matrix: (rows, columns), float64, finite.
            most: number of components to be found.
            rounding: singular value up to which a component is left out, since its vectors would be those of noise.
        """
        is_tall = matrix.shape[0] >= matrix.shape[1]
        squares, vectors = torch.linalg.eigh(matrix.T @ matrix if is_tall else matrix @ matrix.T)
        values = squares.clamp_min(0).sqrt()
        kept = values > max(rounding, GRAM_ROUNDING * float(values[-1]))
        kept[: max(0, len(kept) - most)] = False
        values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
        if is_tall:
            return cls(matrix @ vectors / values, values, vectors)
        return cls(vectors, values, matrix.T @ vectors / values)

    @classmethod
    def joined(cls, parts: Sequence["Components"]) -> "Components":
        """Put components of several matrices beside each other, and turn their vectors by `isometry`."""
        left, right = (torch.cat([getattr(part, side) for part in parts], dim=1) for side in ("left", "right"))
        return cls(isometry(left), torch.cat([part.values for part in parts]), isometry(right))

    def isotropic(self) -> "Components":
        """Return the same vectors with the mean of the values, float64."""
        return Components(self.left, self.values.mean().expand_as(self.values), self.right)

    def matrix(self) -> Tensor:
        """Return the sum of the components, (rows, columns)."""
        return (self.left * self.values) @ self.right.T


def isometry(vectors: Tensor) -> Tensor:
    """Return the nearest orthonormal vectors, `X (X^T X)^(-1/2)`, which solves the orthogonal Procrustes problem.

    Of vectors that depend on each other it is the partial isometry, with the pseudo-inverse in place of the inverse: N
    equal unit vectors become N of length `1 / sqrt(N)`. Directions that no vector has are not made up.

    Args:
        vectors: (width, vectors), float64.
    """
    width, count = vectors.shape
    squares, basis = torch.linalg.eigh(vectors.T @ vectors if count <= width else vectors @ vectors.T)
    kept = squares > DEPENDENT * squares[-1:]
    root: Tensor = (basis[:, kept] * squares[kept].rsqrt()) @ basis[:, kept].T
    return vectors @ root if count <= width else root @ vectors
