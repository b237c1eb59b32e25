"""Weights of a model that memory cannot hold in float32: a part of the model has them while it is at work.

The parts are the layers, the matrix of token embeddings, and the layer that gives logits over the vocabulary; what else
a model has is small, and stays. A part's weights come in the format of the files, from memory or from the files, are
converted when it begins, and given up when it ends. They have the values that they have in a model that is held whole,
and the same code computes with them, so results have the same bits.

A backward pass needs the weights once more, and gets them in the same way. Where they are in files, memory for the
activations of all layers would lack too: only a layer's input is kept, and the layer is computed again (Chen et al.
2016, arXiv 1604.06174).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.families import Family
from worker.engine.catalog.planning.holding import Holding
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.runtime.placeholders import PART, placeholder

Source = Callable[[slice | None], Tensor]
"""Gives a tensor on the CPU, or, for a slice, some of its rows."""
IS_COMPUTED_AGAIN: ContextVar[bool] = ContextVar("is_computed_again", default=False)
"""Whether a layer is run without gradients that its backward pass will compute again with them."""


def held(values: Tensor) -> Source:
    """Return the source of a tensor in memory."""
    return lambda rows: values if rows is None else values[rows]


class Weights:
    """The weights of a model's parts. While a part is not at work, its parameters are placeholders.

    Args:
        model: in eval mode, on its device; what it has besides its parts is there already.
        tensors: the tensors of its parameters, see `tensors_of`.
        holding: where the parts' weights are, `STORED` or `STREAMED`.
    """

    def __init__(
        self,
        model: nn.Module,
        info: CheckpointInfo,
        family: Family,
        tensors: Mapping[str, TensorInfo],
        holding: Holding,
        device: torch.device,
    ) -> None:
        self.holding = holding
        self._first = first_names(model)
        self._sources: dict[str, Source] = {}
        self._held: dict[str, Tensor] = {}
        self._tensors = tensors
        self._parts: list[Part] = []
        self._reader = TensorReader()
        finalize(model, self._reader.__exit__, None)
        self._reader.open({tensor.path for tensor in tensors.values()})  # as they are now, wherever they will be moved
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for module, kind in parts_of(model, info, family):
            weights = []
            for owner, own, parameter in kind.own_parameters(module):
                name = names[id(parameter)]
                if name not in tensors:  # the files have it in another form
                    continue
                if name not in self._sources:
                    self._sources[name] = self._source(name)
                weights.append(_Weight(self._sources, name, ref(owner), own))
                owner._parameters[own] = placeholder(parameter.shape, torch.float32, device)
            part = kind(module, weights)
            part.recomputes = holding is Holding.STREAMED
            self._parts.append(part)
            vars(module).update({PART: part, "forward": part.run})

    @property
    def nbytes(self) -> int:
        """Number of bytes that are held."""
        return sum(values.nbytes for values in self._held.values())

    def replace(self, sources: Mapping[str, Source]) -> None:
        """Take parameters of the parts from other sources, which have the same shapes; further names do not count."""
        for name, source in sources.items():
            first = self._first.get(name)
            if first in self._sources:
                self._sources[first] = source
                self._held.pop(first, None)

    def stream(self) -> None:
        """Read the weights from the files from now on, and hold none."""
        self.holding = Holding.STREAMED
        for name in self._held:
            self._sources[name] = self._source(name)
        self._held.clear()
        for part in self._parts:
            part.recomputes = True

    def _source(self, name: str) -> Source:
        reader, tensor = self._reader, self._tensors[name]
        if self.holding is Holding.STREAMED:
            return lambda rows: reader.read(tensor, rows)
        values = reader.read(tensor)
        self._held[name] = values.float() if values.dtype is torch.float64 else values
        return held(self._held[name])


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each name of a model's parameters to the first name of the same parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def tensors_of(model: nn.Module, info: CheckpointInfo, family: Family) -> dict[str, TensorInfo]:
    """Return the checkpoint's tensors by the first names of the model's parameters."""
    first = first_names(model)
    found: dict[str, TensorInfo] = {}
    for tensor in info.tensors.values():
        slot = family.slot(tensor.name)
        if slot is not None and slot.name in first:
            found.setdefault(first[slot.name], tensor)
    return found


def parts_of(model: Any, info: CheckpointInfo, family: Family) -> Iterator[tuple[nn.Module, type["Part"]]]:
    """Yield the modules of a model that have weights while they are at work, each with the class of its part."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding):
        yield table, _Table
    if isinstance(output, nn.Linear):
        yield output, Part
    for layer in range(family.size(info.config, "layers")):
        yield model.get_submodule(family.layer_path(layer).rstrip(".")), _Layer


@dataclass(frozen=True)
class _Weight:
    """A parameter of a part. It does not own the module, which would otherwise never be freed by itself."""

    sources: Mapping[str, Source]
    source: str
    owner: Callable[[], nn.Module | None]
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self._module._parameters[self.name]
        if parameter is None:
            raise RuntimeError(f"{self.name} was removed")
        return parameter

    def put(self, parameter: nn.Parameter) -> None:
        self._module._parameters[self.name] = parameter

    def values(self, dtype: torch.dtype, device: torch.device, rows: Sequence[int] | None = None) -> Tensor:
        """Return the values, or some rows of them, in a format for computing; bfloat16 is rounded from float32."""
        source = self.sources[self.source]
        found = source(None) if rows is None else torch.cat([source(slice(row, row + 1)) for row in rows])
        if found.dtype is not dtype:
            found = found.to(torch.float32).to(dtype)
        return found.to(device)

    @property
    def _module(self) -> nn.Module:
        module = self.owner()
        if module is None:
            raise RuntimeError("the model was given up")
        return module


class Part:
    """A module that has its weights while it is at work, as the layer that gives logits over the vocabulary."""

    recomputes = False
    """Whether the backward pass computes a layer again instead of keeping its activations."""

    def __init__(self, module: nn.Module, weights: Sequence[_Weight]) -> None:
        self._module = ref(module)
        self._weights = weights
        self._is_open = False

    @staticmethod
    def own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Yield the parameters that the module has while it is at work: a matrix, without a bias that others may share.

        Each comes with the module that has it, and its name there.
        """
        yield module, "weight", module.get_parameter("weight")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's outputs. This is its `forward`."""
        with self.opened():
            return self._kept_small(args, kwargs) if torch.is_grad_enabled() else self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs as the module's class does."""
        module = self._module()
        if module is None:
            raise RuntimeError("the model was given up")
        return type(module).forward(module, *args, **kwargs)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the module have its weights, in the format of the placeholders."""
        if self._is_open:
            yield
            return
        closed = [weight.parameter for weight in self._weights]
        self._is_open = True
        try:
            for weight, parameter in zip(self._weights, closed, strict=True):
                weight.put(_constant(weight.values(parameter.dtype, parameter.device)))
            yield
        finally:
            self._is_open = False
            for weight, parameter in zip(self._weights, closed, strict=True):
                weight.put(parameter)

    def _kept_small(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the outputs, and keep for the backward pass where the weights come from instead of the weights."""
        by_storage = {weight.parameter.untyped_storage().data_ptr(): weight for weight in self._weights}

        def pack(saved: Tensor) -> Any:
            weight = by_storage.get(saved.untyped_storage().data_ptr())
            return saved if weight is None else _View.of(saved, weight)

        with saved_tensors_hooks(pack, lambda saved: saved.values() if isinstance(saved, _View) else saved):
            return self.forward(*args, **kwargs)


@dataclass(frozen=True)
class _View:
    """A view of a weight, such as its transpose, without the values."""

    weight: _Weight
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, weight: _Weight) -> "_View":
        return cls(weight, view.dtype, view.device, tuple(view.shape), view.stride(), int(view.storage_offset()))

    def values(self) -> Tensor:
        return self.weight.values(self.dtype, self.device).as_strided(self.size, self.stride, self.offset)


class _Table(Part):
    """A matrix of token embeddings. It has the rows of the tokens at hand, and these are counted anew."""

    def __init__(self, module: nn.Embedding, weights: Sequence[_Weight]) -> None:
        super().__init__(module, weights)
        module.padding_idx = None  # it counts rows of the whole matrix, and says something of gradients alone

    def run(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        [weight] = self._weights
        closed = weight.parameter
        rows, places = torch.unique(ids, return_inverse=True)
        weight.put(_constant(weight.values(closed.dtype, closed.device, rows.tolist())))
        try:
            return self.forward(places, *args, **kwargs)
        finally:
            weight.put(closed)


class _Layer(Part):
    """A layer. Where weights come from files, its backward pass computes it again."""

    @staticmethod
    def own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    yield owner, name, parameter

    def _kept_small(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.recomputes:
            return super()._kept_small(args, kwargs)
        given = [*args, *kwargs.values()]
        if any(is_differentiated(part) for value in given if isinstance(value, tuple | list) for part in value):
            raise TypeError(f"{type(self._module()).__name__} gets tensors within others; it is computed again without")
        places = [place for place, value in enumerate(given) if is_differentiated(value)]
        if not places:  # the first layer: nothing before it is differentiated
            places = [next(place for place, value in enumerate(given) if isinstance(value, Tensor))]
            given[places[0]] = given[places[0]].detach().requires_grad_()
        tensors = [given[place] for place in places]
        others = [None if place in places else value for place, value in enumerate(given)]

        def call(tensors: Sequence[Tensor]) -> Any:
            values = list(others)
            for place, tensor in zip(places, tensors, strict=True):
                values[place] = tensor
            positional = values[: len(args)]
            return self.forward(*positional, **dict(zip(kwargs, values[len(args) :], strict=True)))

        return _Recomputed.apply(self, call, *tensors)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """Computes a layer without a graph, and again with one when its derivatives are needed."""

    @staticmethod
    def forward(ctx: Any, part: Part, call: Callable[[Sequence[Tensor]], Any], *tensors: Tensor) -> Any:
        device = tensors[0].device.type
        ctx.part, ctx.call = part, call
        ctx.casting = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(*tensors)
        before = IS_COMPUTED_AGAIN.set(True)
        try:
            return call(tensors)
        finally:
            IS_COMPUTED_AGAIN.reset(before)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        device, dtype, is_casting = ctx.casting
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        # A cache would keep one rounded copy of the input, which is a leaf here, and sum gradients up in its format.
        casting = torch.autocast(device, dtype, enabled=is_casting, cache_enabled=False)
        with ctx.part.opened(), torch.enable_grad(), casting:
            outputs = ctx.call(tensors)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, *(tensor.grad for tensor in tensors)


def is_differentiated(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
