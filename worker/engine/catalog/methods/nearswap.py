"""`nearswap`: the base, moved towards one model by no more than `t` in any element."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DataDecidesParameters
from worker.engine.catalog.primitives.values import PerTensor


class NearSwapParameters(DataDecidesParameters):
    name: Literal["nearswap"] = "nearswap"
    t: PerTensor[Annotated[float, Field(ge=-1e6, le=1e6)]] = 1e-3
    """Largest distance that an element moves. Elements that are nearer than this become the model's, others go part of
    the way. At 0 or below nothing moves."""


NEARSWAP = MethodEntry(
    name="nearswap",
    formula="theta = theta_0 + w d, d = theta_1 - theta_0, w = min(1, max(0, t / max(|d|, 1e-6))) of each element",
    source="alchemonaut 2024, QuartetAnemoi-70B (huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)",
    needs=("base",),
    parameters=NearSwapParameters,
    models=(1, 1),
    search={"t": Range(1e-4, 1e-1, log=True)},
)
