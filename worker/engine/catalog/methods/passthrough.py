"""`passthrough`: stacks layers of one or several models to one model."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.parameters import MethodParameters, Scale
from worker.engine.catalog.primitives.slices import Slice
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace


class PassthroughParameters(MethodParameters):
    name: Literal["passthrough"] = "passthrough"
    scale: PerTensor[Scale] = 1.0
    """Factor of tensors; where it is 1, they are copied. It needs no base."""
    slices: Annotated[list[Slice], Field(min_length=1, max_length=1000)]
    """Slices that become the layers 0, 1, … of the result. Tensors before the layers come from the first slice's model,
    and so do configuration and tokenizer; tensors after the layers come from the last slice's model."""

    @property
    def stacked_slices(self) -> Sequence[Slice]:
        return self.slices

    @property
    def needs_base(self) -> bool:
        return False

    def distance(self, place: TensorPlace) -> float:
        return 1.0


PASSTHROUGH = MethodEntry(
    name="passthrough",
    formula="layers = [*layers_(m_1)[a_1:b_1], *layers_(m_2)[a_2:b_2], ...], each tensor times scale",
    source="Kim et al. 2023, SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling, "
    "arXiv 2312.15166; there training goes on afterwards",
    needs=(),
    parameters=PassthroughParameters,
)
