"""Every merge method: parameters, formula, source and needs. The arithmetic is in `worker.engine.merging.methods`."""

from worker.engine.catalog.methods.aligned_regmean import AlignedRegMeanParameters
from worker.engine.catalog.methods.arcee_fusion import ArceeFusionParameters
from worker.engine.catalog.methods.auto import AUTO, AutoParameters, default_candidates
from worker.engine.catalog.methods.average import AVERAGE, AverageParameters
from worker.engine.catalog.methods.breadcrumbs import (
    BreadcrumbsParameters,
    BreadcrumbsTiesParameters,
    MaskingParameters,
)
from worker.engine.catalog.methods.dare import DareLinearParameters, DareTiesParameters
from worker.engine.catalog.methods.della import DellaDroppingParameters, DellaLinearParameters, DellaParameters
from worker.engine.catalog.methods.entry import Choice, MethodEntry, Range, SearchSpace
from worker.engine.catalog.methods.esm import EsmParameters
from worker.engine.catalog.methods.featcal import FeatCalParameters
from worker.engine.catalog.methods.fisher import PARAMETER_FISHER, FisherParameters
from worker.engine.catalog.methods.iso_c import IsoCParameters
from worker.engine.catalog.methods.iso_cts import IsoCtsParameters
from worker.engine.catalog.methods.karcher import KarcherParameters
from worker.engine.catalog.methods.linear import LinearParameters
from worker.engine.catalog.methods.mask_fisher import MASK_FISHER, MaskFisherParameters
from worker.engine.catalog.methods.mask_regmean import MaskRegMeanParameters
from worker.engine.catalog.methods.merging import METHODS, STATISTICS, Method, StatisticName, check_name
from worker.engine.catalog.methods.model_stock import ModelStockParameters
from worker.engine.catalog.methods.multislerp import MultiSlerpParameters
from worker.engine.catalog.methods.nearswap import NearSwapParameters
from worker.engine.catalog.methods.nuslerp import NuSlerpParameters
from worker.engine.catalog.methods.parameters import (
    BATCH_TOKENS,
    LARGEST_BATCH_TOKENS,
    NODE_FISHER,
    BaseParameters,
    GradientParameters,
    MeasuringParameters,
    MethodParameters,
    Normalize,
    ScoringParameters,
)
from worker.engine.catalog.methods.passthrough import PassthroughParameters
from worker.engine.catalog.methods.ram import RamParameters, RamPlusParameters
from worker.engine.catalog.methods.regmean import GRAM, RegMeanParameters, RegressionParameters
from worker.engine.catalog.methods.regmean_plus import RegMeanPlusParameters
from worker.engine.catalog.methods.sce import SceParameters
from worker.engine.catalog.methods.slerp import SlerpParameters
from worker.engine.catalog.methods.statistic import RunningModels, Statistic
from worker.engine.catalog.methods.task_arithmetic import TaskArithmeticParameters
from worker.engine.catalog.methods.task_vectors import (
    DroppingParameters,
    ElectionParameters,
    MatrixParameters,
    SumParameters,
    TaskVectorParameters,
)
from worker.engine.catalog.methods.ties import TiesParameters
from worker.engine.catalog.methods.tsv_m import TsvMParameters
from worker.engine.catalog.methods.wudi import WudiParameters

__all__ = [
    "AUTO",
    "AVERAGE",
    "BATCH_TOKENS",
    "GRAM",
    "LARGEST_BATCH_TOKENS",
    "MASK_FISHER",
    "METHODS",
    "NODE_FISHER",
    "PARAMETER_FISHER",
    "STATISTICS",
    "AlignedRegMeanParameters",
    "ArceeFusionParameters",
    "AutoParameters",
    "AverageParameters",
    "BaseParameters",
    "BreadcrumbsParameters",
    "BreadcrumbsTiesParameters",
    "Choice",
    "DareLinearParameters",
    "DareTiesParameters",
    "DellaDroppingParameters",
    "DellaLinearParameters",
    "DellaParameters",
    "DroppingParameters",
    "ElectionParameters",
    "EsmParameters",
    "FeatCalParameters",
    "FisherParameters",
    "GradientParameters",
    "IsoCParameters",
    "IsoCtsParameters",
    "KarcherParameters",
    "LinearParameters",
    "MaskFisherParameters",
    "MaskRegMeanParameters",
    "MaskingParameters",
    "MatrixParameters",
    "MeasuringParameters",
    "Method",
    "MethodEntry",
    "MethodParameters",
    "ModelStockParameters",
    "MultiSlerpParameters",
    "NearSwapParameters",
    "Normalize",
    "NuSlerpParameters",
    "PassthroughParameters",
    "RamParameters",
    "RamPlusParameters",
    "Range",
    "RegMeanParameters",
    "RegMeanPlusParameters",
    "RegressionParameters",
    "RunningModels",
    "SceParameters",
    "ScoringParameters",
    "SearchSpace",
    "SlerpParameters",
    "Statistic",
    "StatisticName",
    "SumParameters",
    "TaskArithmeticParameters",
    "TaskVectorParameters",
    "TiesParameters",
    "TsvMParameters",
    "WudiParameters",
    "check_name",
    "default_candidates",
]
