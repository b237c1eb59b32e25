"""`aligned_regmean`: `regmean`, after which every linear layer is refitted to its real inputs in the merge."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.regmean import RegressionParameters
from worker.engine.catalog.primitives.values import PerTensor


class AlignedRegMeanParameters(RegressionParameters):
    name: Literal["aligned_regmean"] = "aligned_regmean"
    hold: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 0.1
    """Strength that holds a weight to RegMean's, as a share of the mean square of the input that it multiplies. A bias
    has that of its weight."""

    @property
    def refits_layers(self) -> bool:
        return True


ALIGNED_REGMEAN = MethodEntry(
    name="aligned_regmean",
    formula="layer by layer V = V_0 + [sum_j lambda_j E_j^T X_j / n_j] [S + hold diag(S) + 1e-4 tr(S)/d I]^-1, "
    "S = sum_j lambda_j X_j^T X_j / n_j, X_j = inputs in the merge, E_j = expert's outputs - merge's, V_0 = regmean",
    source="this project's, from arXiv 2212.09849",
    needs=("dataset",),
    parameters=AlignedRegMeanParameters,
)
