"""`regmean_plus`: `regmean` block by block, whose Gram matrices are of what the merged blocks before it give."""

from collections.abc import Collection
from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.parameters import MeasuringParameters
from worker.engine.catalog.methods.regmean import GRAM_MATRICES, RIDGE
from worker.engine.catalog.primitives.values import PerTensor, Share


class RegMeanPlusParameters(MeasuringParameters):
    name: Literal["regmean_plus"] = "regmean_plus"
    shrink: PerTensor[Share] = 0.95
    """Factor of the off-diagonal entries of the Gram matrices. The paper's code has 0.95."""
    ridge: PerTensor[Share] = RIDGE
    """Number added to the diagonals of the Gram matrices, as a share of the models' mean diagonal entry."""

    @property
    def refits_layers(self) -> bool:
        return True

    @property
    def models_beside(self) -> int:
        return super().models_beside + 1  # for the Gram matrices of a block

    def is_measured(self, given: Collection[str]) -> bool:
        return True

    @property
    def merges_rows(self) -> bool:
        return False

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return GRAM_MATRICES * 8 * inputs**2


REGMEAN_PLUS = MethodEntry(
    name="regmean_plus",
    formula="block by block W = W_1 + [sum_j lambda_j (W_j - W_1) G_j] [sum_j lambda_j G_j]^-1, G_j = mean x x^T in "
    "model j's own block after the merged blocks before it; others as average",
    source="Nguyen et al. 2025, RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model "
    "Merging, arXiv 2508.03121",
    needs=("dataset",),
    parameters=RegMeanPlusParameters,
)
