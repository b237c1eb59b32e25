"""Every merge method: its parameters, formula, source and needs. The arithmetic is in `worker.engine.methods`."""

from worker.engine.catalog.methods.aligned_regmean import ALIGNED_REGMEAN, AlignedRegMeanParameters
from worker.engine.catalog.methods.average import AVERAGE, AverageParameters
from worker.engine.catalog.methods.breadcrumbs import (
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    BreadcrumbsParameters,
    BreadcrumbsTiesParameters,
    MaskingParameters,
)
from worker.engine.catalog.methods.dare import DARE_LINEAR, DARE_TIES, DareLinearParameters, DareTiesParameters
from worker.engine.catalog.methods.della import (
    DELLA,
    DELLA_LINEAR,
    DellaDroppingParameters,
    DellaLinearParameters,
    DellaParameters,
)
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
from worker.engine.catalog.methods.karcher import KARCHER, KarcherParameters
from worker.engine.catalog.methods.linear import LINEAR, LinearParameters
from worker.engine.catalog.methods.mask_fisher import (
    MASK_FISHER,
    MaskFisherParameters,
    Normalize,
    ScoringParameters,
)
from worker.engine.catalog.methods.mask_regmean import MASK_REGMEAN, MaskRegMeanParameters
from worker.engine.catalog.methods.model_stock import MODEL_STOCK, ModelStockParameters
from worker.engine.catalog.methods.nuslerp import NUSLERP, NuSlerpParameters
from worker.engine.catalog.methods.passthrough import PASSTHROUGH, PassthroughParameters
from worker.engine.catalog.methods.regmean import REGMEAN, RegMeanParameters, RegressionParameters
from worker.engine.catalog.methods.sce import SCE, SceParameters
from worker.engine.catalog.methods.slerp import SLERP, SlerpParameters
from worker.engine.catalog.methods.task_arithmetic import TASK_ARITHMETIC, TaskArithmeticParameters
from worker.engine.catalog.methods.task_vectors import (
    DroppingParameters,
    ElectionParameters,
    SumParameters,
    TaskVectorParameters,
)
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
        LINEAR,
        SLERP,
        NUSLERP,
        KARCHER,
        DARE_LINEAR,
        DARE_TIES,
        DELLA,
        DELLA_LINEAR,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        MODEL_STOCK,
        SCE,
        PASSTHROUGH,
    )
}

__all__ = [
    "BATCH_TOKENS",
    "LARGEST_BATCH_TOKENS",
    "METHODS",
    "AlignedRegMeanParameters",
    "AverageParameters",
    "BreadcrumbsParameters",
    "BreadcrumbsTiesParameters",
    "DareLinearParameters",
    "DareTiesParameters",
    "DellaDroppingParameters",
    "DellaLinearParameters",
    "DellaParameters",
    "DroppingParameters",
    "ElectionParameters",
    "FisherParameters",
    "GradientParameters",
    "KarcherParameters",
    "LinearParameters",
    "MaskFisherParameters",
    "MaskRegMeanParameters",
    "MaskingParameters",
    "MeasuringParameters",
    "MethodEntry",
    "MethodParameters",
    "ModelStockParameters",
    "Normalize",
    "NuSlerpParameters",
    "PassthroughParameters",
    "RegMeanParameters",
    "RegressionParameters",
    "SceParameters",
    "ScoringParameters",
    "SlerpParameters",
    "Statistic",
    "SumParameters",
    "TaskArithmeticParameters",
    "TaskVectorParameters",
    "TiesParameters",
]
