"""`arcee_fusion`: keeps the changes of one model that are outliers by their size and by their row's change."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DataDecidesParameters


class ArceeFusionParameters(DataDecidesParameters):
    name: Literal["arcee_fusion"] = "arcee_fusion"

    @property
    def selects_by_rank(self) -> bool:
        return True


ARCEE_FUSION = MethodEntry(
    name="arcee_fusion",
    formula="theta = theta_0 + d where s >= median(s) + 1.5 (q3(s) - q1(s)) of the tensor, else theta_0, "
    "d = theta_1 - theta_0, s = |d| KL(p_1, p_0), p = softmax(theta) + 1e-8 along the tensor's last axis",
    source="Arcee's method in mergekit 0.1.5 (github.com/arcee-ai/mergekit, docs/merge_methods.md); "
    "the bound is Tukey's for outliers, about the median",
    needs=("base",),
    parameters=ArceeFusionParameters,
    models=(1, 1),
    search={"scale": Range(0.5, 2.0)},
)
