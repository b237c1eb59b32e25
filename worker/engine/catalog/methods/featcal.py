"""`featcal`: the layers of a merge are calibrated block by block to the features of the experts."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.refitting import RefittingParameters, default_start

if TYPE_CHECKING:
    from worker.engine.catalog.methods.refitting import StartingMethod


class FeatCalParameters(RefittingParameters):
    name: Literal["featcal"] = "featcal"
    start: "StartingMethod" = Field(
        default_factory=lambda: default_start("task_arithmetic", scale=0.3),
        json_schema_extra={"default": "task_arithmetic with scale 0.3"},
    )
    """Method whose merge is calibrated: its name, or an object with its parameters, but for `examples` and `precision`,
    which are those of the whole."""
    strength: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Strength that holds weights to the anchor, in units of the Frobenius norm of a model's matrix of inputs."""
    anchor: Annotated[float, Field(ge=0, le=10)] = 2.2
    """Distance of the anchor from the base: the anchor is `theta_0 + anchor * (theta_start - theta_0)`."""
    teacher: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the expert's own inputs in what its layer is asked for; the rest are the merge's."""
    unread: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of the tokens that the head does not read, in the last block. Key and value count all tokens alike."""

    @property
    def needs_base(self) -> bool:
        return True


FEATCAL = MethodEntry(
    name="featcal",
    formula="block by block W = [sum_j W_j M_j / |C_j| + strength A] [sum_j C_j / |C_j| + strength I]^-1, "
    "C_j = mean x x^T, M_j = mean t x^T, x = inputs in the merge, t = teacher x_expert + (1 - teacher) x, "
    "A = W_0 + anchor (W_start - W_0); biases and layer norms alike",
    source="Gu et al. 2026, FeatCal: Feature Calibration for Post-Merging Models, arXiv 2605.13030",
    needs=("dataset", "base"),
    parameters=FeatCalParameters,
)
