"""`wudi`: the change whose difference from each task vector gives least on the inputs that this task vector shows."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import MatrixParameters
from worker.engine.catalog.primitives.values import PerTensor, Share

OF_FILTERS = {"ridge": ("ridge",), "exponential": ("time", "rank"), "participation": ()}
"""Parameters of each filter."""


class WudiParameters(MatrixParameters):
    name: Literal["wudi"] = "wudi"
    filter: Literal["ridge", "exponential", "participation"] = "ridge"
    """Part of the exact solution that is taken in each direction of the inputs: by a ridge, starting from the models'
    mean; or, starting from the sum of the task vectors, as a descent of some `time` does in the `rank` largest
    directions, or all of it in as many directions as participate in the spectrum."""
    ridge: PerTensor[Share] = 1e-3
    """Number added to the diagonal of `sum_j w_j G_j`, as a share of its mean entry."""
    time: PerTensor[Annotated[float, Field(gt=0, le=1e9)]] = 300.0
    """Time of the descent: a direction of eigenvalue x is solved to `1 - exp(-time x)`."""
    rank: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 0.65
    """Share of the directions that are solved for; the authors take 0.85 for language models."""

    @property
    def idle(self) -> Mapping[str, str]:
        others = {other: names for other, names in OF_FILTERS.items() if other != self.filter}
        why = f"and the filter is {self.filter!r}"
        return {name: f"is of the filter {other!r}, {why}" for other, names in others.items() for name in names}

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        """Count what the formula takes, and products of the inputs with themselves.

        The task vectors of all models, which a filter holds at once, are no more than what is counted for versions.
        """
        matrices = 5 if self.filter == "ridge" else 12
        return 8 * (matrices * outputs * inputs + 6 * inputs**2)


WUDI = MethodEntry(
    name="wudi",
    formula="W = W_0 + scale * [sum_j w_j t_j G_j] [sum_j w_j G_j]^-1, t_j = W_j - W_0, G_j = t_j^T t_j / |t_j|^2, "
    "w_j = N lambda_j / sum_k lambda_k, with a ridge towards the mean, or by a spectral filter; tensors of no linear "
    "layer as average",
    source="Cheng et al. 2025, Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via "
    "Task Vectors, arXiv 2503.08099; filters: Wei et al. 2026, Closed-Form Spectral Regularization for Multi-Task "
    "Model Merging, arXiv 2606.07289",
    needs=("base",),
    parameters=WudiParameters,
    search={"scale": Range(0.5, 2.0)},
)
