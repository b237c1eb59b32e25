"""Checks whether a checkpoint has the tensors that its configuration requires, without reading a weight."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from worker.engine.catalog.checkpoints.architectures import architecture_of
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.tensor_names import spellings
from worker.engine.catalog.families import backbone_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.checkpoints.configurations import library_config
from worker.engine.runtime.libraries import conversion_mapping, transformers

STORAGE = ("dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration that change no tensor's name or shape, and that a merge replaces."""
PARTS_PER_TENSOR, PARTS_BESIDE = 10, 1000  # modules and parameters; in BERT there are 2.2 for each tensor


@dataclass(frozen=True)
class Layout:
    """The tensors of a model, by the names that it gives them."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of the parameters; tied ones have the first of their names."""
    tied: dict[str, set[str]]
    """Other names of each tied parameter."""
    buffers: frozenset[str]
    prefix: str
    """Prefix of the model below the head, which names in a checkpoint may lack."""
    unsaved: frozenset[str] = frozenset()
    """Parameters that follow from the configuration, which checkpoints need not have."""

    @property
    def groups(self) -> list[set[str]]:
        """Sets of the names of each tied parameter."""
        return [{name, *others} for name, others in self.tied.items()]


@dataclass(frozen=True)
class _Described:
    """What a layout is built from; checkpoints of equal configurations have one layout."""

    config: str
    """The configuration as JSON, with sorted keys."""
    tensors: int
    """Number of the checkpoint's tensors."""
    source: str = field(compare=False)
    """The checkpoint's name in messages."""


def check_layout(info: CheckpointInfo) -> None:
    """Check that the model that transformers makes of the configuration has the checkpoint's tensors.

    Nothing is known of an architecture that is not one of the library's own, nor of one whose tensors it renames or
    rearranges while it loads them.

    Raises:
        InvalidCheckpoint: transformers takes no such configuration, or a tensor is missing or has another shape.
    """
    layout = _layout_of(info)
    if layout is None:
        return
    found = _shapes(info, layout)
    for name, shape in layout.shapes.items():
        if name not in found:
            same = {name, *(other for group in layout.groups if name in group for other in group)}
            if found.keys() & same or name in layout.unsaved:
                continue
            raise InvalidCheckpoint(info.source, f"no tensor {name}, which {info.architecture} needs")
        if found[name] != shape:
            raise misshapen(info, name, found[name], shape)


def misshapen(info: CheckpointInfo, name: str, found: Sequence[int], wanted: Sequence[int]) -> InvalidCheckpoint:
    problem = f"tensor {name} has shape {list(found)}, by its configuration it would have {list(wanted)}"
    return InvalidCheckpoint(info.source, problem, tensor=name)


def unread_tensors(info: CheckpointInfo) -> list[str]:
    """Return the names of tensors that transformers does not read; none where `check_layout` knows nothing either."""
    layout = _layout_of(info)
    if layout is None:
        return []
    known = {*layout.shapes, *layout.buffers, *(name for names in layout.tied.values() for name in names)}
    return [name for name in _shapes(info, layout) if name not in known]


def _shapes(info: CheckpointInfo, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return shapes of tensors by the names that the model gives them."""
    family = backbone_of(info.model_type)
    found = {}
    for name, tensor in info.tensors.items():
        slot = family.slot(name) if family else None
        name = slot.name if slot else name
        names = [known for one in spellings(name) for known in (one, f"{layout.prefix}.{one}")]
        own = (one for one in names if one in layout.shapes or one in layout.buffers)
        found[next(own, name)] = tensor.shape
    return found


def stores_copies(info: CheckpointInfo) -> bool | None:
    """Return whether it has two tensors that are one in the model; None where `check_layout` knows nothing either."""
    layout = _layout_of(info)
    if layout is None:
        return None
    found = _shapes(info, layout)
    return any(len(found.keys() & group) > 1 for group in layout.groups)


def _layout_of(info: CheckpointInfo) -> Layout | None:
    stored = {key: value for key, value in info.config.items() if key not in STORAGE}
    return _built_layout(_Described(json.dumps(stored, sort_keys=True), len(info.tensors), info.source))


@lru_cache(maxsize=64)
def _built_layout(described: _Described) -> Layout | None:
    """Return the layout of the model that transformers builds; None where checkpoints have other names or shapes."""
    values, source = json.loads(described.config), described.source
    model_class = library_class(architecture_of(values))
    if model_class is None or values.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    if model_class.forward is nn.Module.forward:
        problem = f"architectures in config.json names {model_class.__name__}, which computes nothing by itself"
        raise InvalidCheckpoint(source, f"{problem}; name the model's own class")
    try:
        with torch.device("meta"), _built_for(described.tensors, source):
            model = model_class._from_config(library_config(values, source), attn_implementation="eager")
        model.tie_weights()
        if conversion_mapping.get_model_conversion_mapping(model, add_legacy=False):
            return None
        tied: dict[str, set[str]] = {}
        for target, origin in model.all_tied_weights_keys.items():
            tied.setdefault(origin, set()).add(target)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        buffers = frozenset(name for name, _ in model.named_buffers())
        spared = [*(model._keys_to_ignore_on_save or ()), *(model._keys_to_ignore_on_load_missing or ())]
        unsaved = frozenset(name for name in shapes if any(re.search(pattern, name) for pattern in spared))
        return Layout(shapes, tied, buffers, model.base_model_prefix, unsaved)
    except InvalidCheckpoint:
        raise
    except Exception as error:  # transformers raises various exceptions for configurations
        raise InvalidCheckpoint(source, f"transformers cannot load it: {in_one_line(error)}") from error


def computed_bytes(info: CheckpointInfo, model_class: Any, config: Any) -> int:
    """Return the bytes of values that a model computes when it is built, such as tables of positions."""
    with torch.device("meta"), _built_for(len(info.tensors), info.source):
        model = model_class._from_config(config, attn_implementation="eager")
    computed = [*model.buffers(), *(one for one in model.parameters() if not one.requires_grad)]
    return sum(one.numel() * one.element_size() for one in computed)


@contextmanager
def _built_for(tensors: int, source: str) -> Iterator[None]:
    """Stop the building of a model that is far larger than a checkpoint of so many tensors.

    A few bytes of its configuration, under a key of any name, decide how many layers it gets.
    """
    left = PARTS_PER_TENSOR * tensors + PARTS_BESIDE

    def count(module: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            problem = f"by its configuration it would have many more than the {tensors} tensors that are there"
            raise InvalidCheckpoint(source, f"{problem} (at {name} of a {type(module).__name__})")

    with (
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(count),
    ):
        yield


def library_class(name: str) -> Any:
    """Return the model class of this name that transformers itself has; None where there is none."""
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs a library that is not there
        return None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and found.__module__.startswith("transformers.") else None
