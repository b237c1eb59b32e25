"""Parameters whose values are elsewhere: they have a shape, a format and a device, and take no memory.

A module that has its values only while it is at work is a part, see `worker.engine.models.weights`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

PART = "maskmerge_part"
"""Attribute of modules that are parts. It has a method `opened`, a context in which the module has its values."""


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Make a parameter of one value, NaN, for all places: who reads it by mistake gets NaN, and no wrong number."""
    value = torch.full((), float("nan"), dtype=dtype, device=device)
    return nn.Parameter(value.expand(tuple(shape)), requires_grad=False)


def is_placeholder(parameter: Tensor) -> bool:
    """Return whether there is less memory than the values would take."""
    return parameter.untyped_storage().nbytes() < parameter.numel() * parameter.element_size()


@contextmanager
def without_values() -> Iterator[None]:
    """Build modules whose parameters have no values, on the device `meta`. Buffers are computed as they always are."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:  # tied parameters stay one
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    with register_module_parameter_registration_hook(emptied):  # type: ignore[arg-type]
        yield


@contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """Let a module have its values for several runs of it, if it is a part."""
    part = getattr(module, PART, None)
    with nullcontext() if part is None else part.opened():
        yield
