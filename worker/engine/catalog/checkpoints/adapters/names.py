"""Finds the tensors of a base that an adapter names, which names those of the model in memory."""

from collections.abc import Mapping
from dataclasses import replace

from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import Architecture
from worker.engine.catalog.families import Family, Kind
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


def tensors_of(base: CheckpointInfo, family: Family | None) -> dict[str, TensorInfo]:
    """Return the base's tensors by name: the canonical one if there is a table, and then without another class's head.

    Raises:
        InvalidCheckpoint: a tensor is there under two spellings.
    """
    if family is None:
        return dict(base.tensors)
    found: dict[str, TensorInfo] = {}
    for tensor in base.tensors.values():
        slot = family.slot(tensor.name) or family.slot(family.prefix + tensor.name)
        if slot is None or slot.kind is Kind.UNREAD:
            continue
        if slot.kind is Kind.HEAD and base.architecture != family.head.architecture:
            continue
        if slot.name in found:
            raise InvalidCheckpoint(base.source, f"tensor {slot.name} is there under two spellings")
        found[slot.name] = replace(tensor, name=slot.name)
    return found


def target_of(
    name: str, tensors: Mapping[str, TensorInfo], family: Family | None, known: Architecture | None = None
) -> str:
    """Return the name in the base's files of the tensor that is `name` in the running model, of the class `known`."""
    if family is not None:
        slot = family.slot(name)
        return name if slot is None else slot.name
    names = [*(known.in_files(name) if known is not None else ()), name]
    inner = [one.partition(".")[2] for one in names]  # pre-trained models are saved without the prefix of their holders
    return next((one for one in (*names, *inner) if one in tensors), name)
