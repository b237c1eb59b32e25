"""Parameters of methods that merge task vectors, that is, differences from the common ancestor."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from worker.engine.catalog.methods.parameters import MethodParameters, Scale
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace

Density = Annotated[float, Field(gt=0, le=1)]


class TaskVectorParameters(MethodParameters):
    normalize: bool

    @property
    def needs_base(self) -> bool:
        return True

    takes_negative_weights: ClassVar[bool] = True

    def weights_problem(self, weights: Sequence[float]) -> str | None:
        return None  # where all weights are 0, the base stays


class DataDecidesParameters(MethodParameters):
    """Parameters of methods that find each model's share from its task vectors alone."""

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def weighs_models(self) -> bool:
        return False

    def shares(self, weights: Sequence[float], place: TensorPlace) -> None:
        return None


class MatrixParameters(MethodParameters):
    """Parameters of methods that merge the task vectors of linear layers as matrices, in float64."""

    matrices: ClassVar[int]
    """Number of matrices of the size of the largest that are held in float64 while it is merged."""

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def merges_rows(self) -> bool:
        return False

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return self.matrices * 8 * outputs * inputs


class SumParameters(TaskVectorParameters):
    """Parameters of methods that add task vectors up."""

    scale: PerTensor[Scale] = 0.4
    """Factor of the sum of the task vectors. Ilharco et al. find 0.3 to 0.5 close to optimal in many cases."""
    normalize: bool = False
    """Whether the sum is divided by the sum of the weights, and so is a mean; it is not where weights add up to 0."""


class ElectionParameters(TaskVectorParameters):
    """Parameters of methods that elect a sign for every parameter."""

    normalize: bool = True
    """Whether the sum of the values that agree with the elected sign is divided by the sum of their weights, where that
    is not 0."""


class DroppingParameters(TaskVectorParameters):
    """Parameters of methods that drop parts of the task vectors at random."""

    per_model: ClassVar[tuple[str, ...]] = ("density",)

    density: PerTensor[Density] = 0.5
    """Share of each task vector that is kept, on average."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed from which the dropped elements are drawn, for every model and tensor by itself."""
