"""`slerp`: from one model to another along the arc between them, each tensor as one vector."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace


class SlerpParameters(MethodParameters):
    name: Literal["slerp"] = "slerp"
    t: PerTensor[Annotated[float, Field(ge=-10, le=10)]] = 0.5
    """Place on the arc from the first model, 0, to the second, 1, or on along the same circle, below 0 and beyond 1.
    The models' weights have no influence and must be equal."""

    @property
    def weighs_models(self) -> bool:
        return False

    def shares(self, weights: Sequence[float], place: TensorPlace) -> Sequence[float] | None:
        t = self.at("t", place)
        return [1 - t, t] if 0 <= t <= 1 else None


SLERP = MethodEntry(
    name="slerp",
    formula="theta = [sin((1 - t) phi) theta_1 + sin(t phi) theta_2] / sin(phi), phi = angle(theta_1, theta_2); "
    "(1 - t) theta_1 + t theta_2 where a vector is 0 or sin(phi) < 1e-4",
    source="Shoemake 1985, Animating rotation with quaternion curves, doi 10.1145/325165.325242",
    needs=(),
    parameters=SlerpParameters,
    models=(2, 2),
    search={"t": Range(0.2, 0.8)},
)
