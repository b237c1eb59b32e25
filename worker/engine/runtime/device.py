"""Chooses the device of the work and its number formats."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from worker.engine.runtime.placeholders import is_placeholder, placeholder

Precision = Literal["float32", "bfloat16"]

logger = logging.getLogger(__name__)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of a worker. Raises ValueError for a GPU that PyTorch does not see."""
    if name == "auto":
        return best_device()
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("MASKMERGE_DEVICE is cuda, and PyTorch sees no CUDA GPU; set it to cpu or auto")
    return torch.device(name)


def resolve_precision(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """Resolve `auto`: bfloat16 where the device multiplies such matrices in hardware, else float32."""
    if asked != "auto":
        return asked
    on_cpu = device.type != "cuda"
    pays = bool(torch.cpu.get_capabilities().get("amx_bf16")) if on_cpu else has_bfloat16(device)
    return "bfloat16" if pays else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16. Without them, PyTorch takes up to a hundred times as
    long for a product of matrices in bfloat16 as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def hardware(device: torch.device) -> dict[str, str]:
    """Return what the bits of a forward pass depend on besides model and rows: the device, its threads, PyTorch."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {instructions}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute matrix products in `precision`, and functions that only read them: activations, and softmax on a CPU.

    Residual streams and norms stay float32, and so does softmax on a GPU.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextmanager
def rounded_weights(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Hold the weights of linear layers in `precision`; afterwards the layers have their own weights again.

    Autocast would round every weight again in every pass.
    """
    kept: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []
    try:
        for module in model.modules():
            if precision == "bfloat16" and isinstance(module, nn.Linear):
                kept.append((module, dict(module._parameters)))
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = _rounded(parameter)
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


def _rounded(parameter: nn.Parameter) -> nn.Parameter:
    if is_placeholder(parameter):  # its values are rounded when they come
        return placeholder(parameter.shape, torch.bfloat16, parameter.device)
    return nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)


def reset_peak_memory() -> None:
    """Start measuring the process's peak memory anew (Linux: 5 to clear_refs resets VmHWM)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        logger.warning("peak memory is since the process started: %s", error)


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process since `reset_peak_memory`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
