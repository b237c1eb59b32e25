"""Every merge method: its parameters, formula, source and needs. The arithmetic is in `worker.engine.methods`."""

from worker.engine.catalog.methods.aligned_regmean import ALIGNED_REGMEAN, AlignedRegMeanParameters
from worker.engine.catalog.methods.average import AVERAGE, AverageParameters
from worker.engine.catalog.methods.entry import (
    BATCH_TOKENS,
    LARGEST_BATCH_TOKENS,
    GradientParameters,
    MeasuringParameters,
    MethodEntry,
    MethodParameters,
    Statistic,
)
from worker.engine.catalog.methods.fisher import FISHER, FisherParameters
from worker.engine.catalog.methods.mask_fisher import MASK_FISHER, MaskFisherParameters, Normalize, ScoringParameters
from worker.engine.catalog.methods.mask_regmean import MASK_REGMEAN, MaskRegMeanParameters
from worker.engine.catalog.methods.passthrough import PASSTHROUGH, PassthroughParameters
from worker.engine.catalog.methods.regmean import REGMEAN, RegMeanParameters, RegressionParameters
from worker.engine.catalog.methods.task_arithmetic import TASK_ARITHMETIC, TaskArithmeticParameters
from worker.engine.catalog.methods.ties import TIES, TiesParameters

METHODS: dict[str, MethodEntry] = {
    entry.name: entry
    for entry in (
        AVERAGE,
        MASK_FISHER,
        TASK_ARITHMETIC,
        TIES,
        FISHER,
        REGMEAN,
        MASK_REGMEAN,
        ALIGNED_REGMEAN,
        PASSTHROUGH,
    )
}

__all__ = [
    "BATCH_TOKENS",
    "LARGEST_BATCH_TOKENS",
    "METHODS",
    "AlignedRegMeanParameters",
    "AverageParameters",
    "FisherParameters",
    "GradientParameters",
    "MaskFisherParameters",
    "MaskRegMeanParameters",
    "MeasuringParameters",
    "MethodEntry",
    "MethodParameters",
    "Normalize",
    "PassthroughParameters",
    "RegMeanParameters",
    "RegressionParameters",
    "ScoringParameters",
    "Statistic",
    "TaskArithmeticParameters",
    "TiesParameters",
]
