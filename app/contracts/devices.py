"""Kinds of device on which workers compute. A worker has one, and a job may ask for one."""

from typing import Literal, get_args

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)

ANY = "any"
LANES = (ANY, *DEVICES)
"""Lanes of the queue: tasks of jobs that any worker may do, and those of jobs that ask for a device."""


def lane_of(device: str | None) -> str:
    """Return the lane in which tasks wait that ask for a device, or for none."""
    return device or ANY


def lanes_for(device: Device) -> tuple[str, str]:
    """Return the lanes from which a worker with this device takes tasks."""
    return ANY, device
