"""Families of architectures. The table of each says what its tensors are; to add a family is one file with a table."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from pkgutil import iter_modules

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.nodes import (
    CROSS_HEADS,
    DECODER,
    HEADS,
    KV_HEADS,
    NEURONS,
    NODE_KINDS,
    NodeKind,
    ScoreName,
)
from worker.engine.catalog.families.table import Family, Fused, Kind, Owner, Part, Site, Slot


def _found() -> Iterator[Family]:
    """Yield the tables in the files of this package; one that another file imports comes several times."""
    for name in sorted(module.name for module in iter_modules(__path__)):
        module = import_module(f"{__name__}.{name}")
        yield from (value for value in vars(module).values() if isinstance(value, Family))


def _by_model_type(found: Iterable[Family]) -> dict[str, Family]:
    """Return tables by model type, in alphabetical order. Raises ImportError where two have the same one."""
    families: dict[str, Family] = {}
    for family in found:
        if families.setdefault(family.model_type, family) is not family:
            raise ImportError(f"two families have the model type {family.model_type}")
    return dict(sorted(families.items()))


FAMILIES = _by_model_type(_found())


def backbone_of(model_type: str) -> Family | None:
    """Return the table of backbones of this kind of model, whatever the head is; None where there is none."""
    return FAMILIES.get(model_type)


__all__ = [
    "CROSS_HEADS",
    "DECODER",
    "FAMILIES",
    "HEADS",
    "KV_HEADS",
    "NEURONS",
    "NODE_KINDS",
    "Family",
    "Fused",
    "Head",
    "Kind",
    "NodeKind",
    "Owner",
    "Part",
    "ScoreName",
    "Site",
    "Slot",
    "backbone_of",
]
