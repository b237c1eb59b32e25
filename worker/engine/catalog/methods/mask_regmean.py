"""`mask_regmean`: the regression of `regmean`, in which each node's rows have that node's merge weights."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import Choice, MethodEntry, Range
from worker.engine.catalog.methods.parameters import NODE_FISHER, ScoringParameters
from worker.engine.catalog.methods.regmean import GRAM, RIDGE, SHRINK
from worker.engine.catalog.methods.statistic import Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share


class MaskRegMeanParameters(ScoringParameters):
    name: Literal["mask_regmean"] = "mask_regmean"
    examples: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] = 512
    """Number of rows of each data set that are measured."""
    shrink: PerTensor[Share] = SHRINK
    """Factor of the off-diagonal entries of the Gram matrices."""
    ridge: PerTensor[Share] = RIDGE
    """Number added to the diagonals of the Gram matrices, as a share of the models' mean diagonal entry."""
    columns: bool = False
    """Whether matrices whose columns belong to nodes are weighted by them, inside the regression."""
    neuron_rows: bool = False
    """Whether each neuron's row of the first projection is its own regression: over a minute a layer of BERT-base."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({NODE_FISHER, GRAM})

    @property
    def merges_rows(self) -> bool:
        return False


MASK_REGMEAN = MethodEntry(
    name="mask_regmean",
    formula="rows of node s: W_s = W_1,s + [sum_j w_j,s (W_j,s - W_1,s) G_j] [sum_j w_j,s G_j]^-1, w and all else as "
    "mask_fisher; other linear layers as regmean",
    source="this project's, from arXiv 2403.09891 and 2212.09849",
    needs=("dataset",),
    parameters=MaskRegMeanParameters,
    search={  # without neuron_rows, with which a trial takes minutes
        "normalize": Choice(("layer", "model")),
        "rest": Choice(("uniform", "model")),
        "shrink": Range(0.8, 1.0),
        "ridge": Range(1e-4, 1e-1, log=True),
        "columns": Choice((False, True)),
        "scale": Range(0.8, 1.25),
    },
)
