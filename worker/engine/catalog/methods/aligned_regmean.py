"""`aligned_regmean`: a merge, that of `regmean` by default, whose linear layers are refitted to their real inputs."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.refitting import RefittingParameters
from worker.engine.catalog.methods.regmean import RIDGE, SHRINK
from worker.engine.catalog.primitives.values import PerTensor, Share


class AlignedRegMeanParameters(RefittingParameters):
    shared: ClassVar = {"shrink": SHRINK, "ridge": RIDGE}

    name: Literal["aligned_regmean"] = "aligned_regmean"
    shrink: PerTensor[Share] = SHRINK
    """Factor of the off-diagonal entries of the Gram matrices, where the start is a regression."""
    ridge: PerTensor[Share] = RIDGE
    """Number added to the diagonals of these Gram matrices, as a share of the models' mean diagonal entry."""
    hold: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 0.1
    """Strength that holds a weight to the start's, as a share of the mean square of the input that it multiplies. A
    bias has that of its weight."""

    @property
    def refits_every_form(self) -> bool:
        return True


ALIGNED_REGMEAN = MethodEntry(
    name="aligned_regmean",
    formula="layer by layer V = V_0 + [sum_j lambda_j E_j^T X_j / n_j] [S + hold diag(S) + 1e-4 tr(S)/d I]^-1, "
    "S = sum_j lambda_j X_j^T X_j / n_j, X_j = inputs in the merge, E_j = expert's outputs - merge's, V_0 = the start, "
    "regmean by default",
    source="this project's, from arXiv 2212.09849",
    needs=("dataset",),
    parameters=AlignedRegMeanParameters,
)
