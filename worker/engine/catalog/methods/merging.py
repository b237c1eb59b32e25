"""All methods that merge, in the order in which they are listed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field
from pydantic_core import PydanticCustomError

from worker.engine.catalog.methods.aligned_regmean import ALIGNED_REGMEAN
from worker.engine.catalog.methods.arcee_fusion import ARCEE_FUSION
from worker.engine.catalog.methods.average import AVERAGE
from worker.engine.catalog.methods.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from worker.engine.catalog.methods.dare import DARE_LINEAR, DARE_TIES
from worker.engine.catalog.methods.della import DELLA, DELLA_LINEAR
from worker.engine.catalog.methods.entry import MethodEntry, MethodParameters
from worker.engine.catalog.methods.fisher import FISHER
from worker.engine.catalog.methods.karcher import KARCHER
from worker.engine.catalog.methods.linear import LINEAR
from worker.engine.catalog.methods.mask_fisher import MASK_FISHER
from worker.engine.catalog.methods.mask_regmean import MASK_REGMEAN
from worker.engine.catalog.methods.model_stock import MODEL_STOCK
from worker.engine.catalog.methods.multislerp import MULTISLERP
from worker.engine.catalog.methods.nearswap import NEARSWAP
from worker.engine.catalog.methods.nuslerp import NUSLERP
from worker.engine.catalog.methods.passthrough import PASSTHROUGH
from worker.engine.catalog.methods.ram import RAM, RAMPLUS_TL
from worker.engine.catalog.methods.regmean import REGMEAN
from worker.engine.catalog.methods.sce import SCE
from worker.engine.catalog.methods.slerp import SLERP
from worker.engine.catalog.methods.task_arithmetic import TASK_ARITHMETIC
from worker.engine.catalog.methods.ties import TIES
from worker.engine.catalog.primitives.strict import did_you_mean

METHODS: dict[str, MethodEntry[MethodParameters]] = {
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
        MULTISLERP,
        KARCHER,
        DARE_LINEAR,
        DARE_TIES,
        DELLA,
        DELLA_LINEAR,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        MODEL_STOCK,
        SCE,
        RAM,
        RAMPLUS_TL,
        NEARSWAP,
        ARCEE_FUSION,
        PASSTHROUGH,
    )
}

if TYPE_CHECKING:
    Method = MethodParameters
else:
    Method = Annotated[
        Union[tuple(entry.parameters for entry in METHODS.values())],  # noqa: UP007 - made of a tuple
        Field(discriminator="name"),
    ]


def check_name(method: Any, known: Iterable[str] = METHODS) -> Any:
    """What may be the recipe of a method, as it is. Raises PydanticCustomError where it names none that is known."""
    name = method.get("name") if isinstance(method, dict) else None
    if isinstance(name, str) and name not in known:
        hint = did_you_mean(name, list(known))
        raise PydanticCustomError("unknown_method", "unknown method '{name}'{hint}", {"name": name, "hint": hint})
    return method
