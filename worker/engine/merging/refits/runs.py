"""Runs a model on batches of rows, layer by layer, and shows what its linear layers read and give."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from worker.engine.catalog.planning.memory import MOST_FINISHED
from worker.engine.inputs.examples import Batch
from worker.engine.merging.refits.forward_passes import (
    Beside,
    Finished,
    Read,
    first_calls,
    giving,
    recording,
    replaying,
    tensors_of,
)
from worker.engine.merging.refits.linear_groups import LinearGroup, bias_of, matrix_of
from worker.engine.models.experts import RoutedLinear, SingleExpert
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.tasks import HeadKind

Selected = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a group of layers reads, (tokens, width), and gives; float32, without padding."""

    x: Tensor
    places: Tensor
    """Places of these tokens among all that count."""
    outputs: Callable[[], Tensor]
    """Gives (tokens, outputs): the residual sum where the layers are added to one, else their outputs side by side."""


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return Call(args, kwargs)


class Run:
    """Runs a model on batches of rows, layer by layer. For each batch it holds the input of its present layer."""

    def __init__(
        self,
        model: nn.Module,
        kind: HeadKind[Any],
        stacks: Sequence[Sequence[str]],
        batches: Sequence[Batch],
        precision: Precision,
        device: torch.device,
        kept: Collection[int],
    ) -> None:
        """Make a run.

        Args:
            kept: numbers of the batches for which more is held, so that less is computed again.
        """
        self._model, self._kind = model, kind
        self._kept = kept
        self._groups: Sequence[LinearGroup] = ()
        self._stacks = [[model.get_submodule(block) for block in stack] for stack in stacks]
        self._blocks = [block for stack in self._stacks for block in stack]
        self._batches = batches
        self._computing = partial(computing_in, precision, device)
        self._layer: int | None = None
        self._hidden: dict[int, Tensor] = {}  # (batch, tokens, width), by number of the batch
        self._given: dict[int, Tensor] = {}  # the present layer's outputs that are known, alike
        self._finished: dict[int, list[Finished]] = {}  # alike: what need not be computed again in the present layer
        self._arguments: dict[int, Call] = {}  # alike: those of the present layer besides the hidden states
        self._ended: dict[int, list[Tensor]] = {}  # alike: outputs of stacks whose last layer is behind
        self._beside = Beside()

    def enter(self, layer: int | None, groups: Sequence[LinearGroup]) -> None:
        """Go on to the next layer, which has these groups, or past the last."""
        for number in range(len(self._batches)):
            if self._layer is not None:
                self._hidden[number] = self._output(number)
            self._finished.pop(number, None)
            ended = self._ended.setdefault(number, [])
            if layer is not None and layer == sum(map(len, self._stacks[: len(ended) + 1])):  # another stack begins
                ended.append(self._hidden.pop(number))
        self._given.clear()
        self._arguments.clear()
        if layer is not None:
            for number in range(len(self._batches)):
                [call] = self._reach(number, layer, [self._blocks[layer]], _called)
                self._hidden[number], *others = call.args
                held = sum(value.numel() for value in tensors_of((*others, *call.kwargs.values())))
                if number in self._kept and held <= self._hidden[number].numel():
                    self._arguments[number] = Call(tuple(others), call.kwargs)
        self._layer, self._groups = layer, groups

    def enter_with(self, other: "Run") -> None:
        """Go on to the layer that another run of the same rows is in, with that run's inputs of it."""
        self._layer, self._groups, self._beside = other._layer, other._groups, other._beside
        self._hidden, self._ended = dict(other._hidden), dict(other._ended)
        self._given.clear()
        self._finished.clear()
        self._arguments.clear()

    def read(self, number: int, group: LinearGroup, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return what modules of the present layer, which has this group, read, (tokens, width), by path.

        The run keeps the layer's output, and must not be changed before it goes on.
        """
        counted = counted_inputs(self._batches[number], group)
        modules = [self._model.get_submodule(path) for path in paths]

        def selected(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return selected_inputs(args[0], counted)[0]

        if group.layer is None:
            return dict(zip(paths, self._reach(number, None, modules, selected), strict=True))
        block, call = self._block(number)

        def run() -> None:
            self._given[number] = self._hidden_of(block(*call.args, **call.kwargs))

        with self._computing():
            return dict(zip(paths, first_calls(run, modules, selected, stops=False), strict=True))

    def tokens_read(self, number: int) -> Tensor:
        """Mark the tokens whose last hidden state the head's outputs depend on, (tokens,), without padding.

        The run is in its last layer, and has its output.
        """
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self._given[number].clone().requires_grad_()
            batch = self._batches[number]
            inputs = {name: values.clone() for name, values in batch.inputs.items()}
            with self._computing(), giving(self._blocks, hidden, self._beside):
                outputs = batch.of_outputs(self._kind.run(inputs)).float()
            # Of normalised outputs the squares, or the values themselves, have the same sum whatever is read.
            uneven = torch.linspace(1, 2, outputs.shape[-1], device=outputs.device)
            [gradient] = torch.autograd.grad((outputs * uneven).sum(), hidden)
        return gradient.abs().sum(-1)[batch.counted] > 0

    def forget(self) -> None:
        """Compute the present layer's output anew, because the layer has changed."""
        self._given.clear()

    def seen(self, number: int, groups: Sequence[LinearGroup], whole: bool = False) -> list[Seen]:
        """Return what groups of the present layer read and give in a batch.

        Args:
            whole: keep the layer's output too.
        """
        batch = self._batches[number]
        counted = {
            path: counted_inputs(batch, group) for group in groups for path in (group.reader, group.norm) if path
        }
        paths, modules = list(counted), [self._model.get_submodule(path) for path in counted]
        by_module = dict(zip(modules, counted.values(), strict=True))

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Selected:
            return selected_inputs(args[0], by_module[module], module)

        if groups[0].layer is None:
            read_by = dict(zip(paths, self._reach(number, None, modules, read), strict=True))
        else:
            read_by = dict(zip(paths, self._passed(number, groups, modules, read, whole), strict=True))
        found = []
        for group in groups:
            x, places = read_by[group.reader]
            total = selected_inputs(self._given[number], counted_inputs(batch, group))[0] if group.ends_block else None
            if group.norm:
                total = read_by[group.norm][0]
            outputs = partial(self.outputs, group, x) if total is None else partial(_same, total)
            found.append(Seen(x, places, outputs))
        if whole:  # no further pass is needed
            self._arguments.pop(number, None)
        else:
            self._given.pop(number, None)
        return found

    def outputs(self, group: LinearGroup, x: Tensor) -> Tensor:
        """Return outputs of the group's layers, side by side, (tokens, outputs); a router's are logits."""
        found = []
        with self._computing():
            for module in group.modules:
                weight = matrix_of(self._model, module, module in group.transposed)
                found.append(linear(x, weight, bias_of(self._model, module)).float())
        return torch.cat(found, dim=-1)

    def read_in_all_uses(self, number: int, group: LinearGroup) -> dict[str, Tensor]:
        """Return what the reader and the norm of a group read in a pass of the whole model, one use after another.

        These are (uses * tokens, width), float32, without padding, by path.
        """
        counted = counted_inputs(self._batches[number], group)
        seen: dict[str, list[Tensor]] = {path: [] for path in (group.reader, group.norm) if path}

        def keep(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path].append(selected_inputs(args[0], counted)[0])

        handles = [self._model.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in seen]
        try:
            with self._computing():
                self._model(**self._kind.arguments(self._batches[number].inputs))
        finally:
            for handle in handles:
                handle.remove()
        return {path: torch.cat(uses) for path, uses in seen.items()}

    def read_by_expert(self, group: LinearGroup, x: Tensor) -> Tensor:
        """Return what a group of an expert reads, (tokens, width), where the expert reads x."""
        expert = self._model.get_submodule(group.expert or "")
        if not isinstance(expert, SingleExpert):
            raise TypeError(f"{group.input} is of no expert")
        if self._model.get_submodule(group.reader) is not expert.down_proj:
            return x
        with self._computing():
            return expert.neurons(x).float()

    def _passed(
        self,
        number: int,
        groups: Sequence[LinearGroup],
        modules: Sequence[nn.Module],
        read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Selected],
        whole: bool,
    ) -> list[Selected]:
        """Return what modules of the present layer read; `whole`: and keep the layer's output."""
        to_end = whole or any(group.ends_block for group in groups)
        block, call = self._block(number)

        def run() -> None:
            self._given[number] = self._hidden_of(block(*call.args, **call.kwargs))

        started = [group.input for group in self._groups].index(groups[0].input)
        not_final = {self._model.get_submodule(path) for group in self._groups[started:] for path in group.modules}
        with (
            self._computing(),
            replaying(self._finished.get(number, [])),
            recording(block, not_final if number in self._kept and not whole else ()) as finished,
        ):
            calls = first_calls(run, modules, read, stops=not to_end)
        held = sum(value.numel() for _, output in finished for value in tensors_of(output))
        if finished and held <= MOST_FINISHED * self._hidden[number].numel():
            self._finished[number] = finished
        return calls

    def _output(self, number: int) -> Tensor:
        """Return the output of the present layer for the held input."""
        if number not in self._given:
            with self._computing(), replaying(self._finished.get(number, [])):
                block, call = self._block(number)
                return self._hidden_of(block(*call.args, **call.kwargs))
        return self._given.pop(number)

    def _hidden_of(self, given: Any) -> Tensor:
        self._beside = Beside.of(given)
        hidden: Tensor = given[0] if isinstance(given, tuple) else given
        return hidden

    def _block(self, number: int) -> tuple[nn.Module, Call]:
        """Return the present block, and its call with the arguments that the model gives it, such as its own mask."""
        if self._layer is None:
            raise ValueError("no layer was entered")
        block = self._blocks[self._layer]
        call = self._arguments.get(number)
        if call is None:
            [whole] = self._reach(number, self._layer, [block], _called)
            call = Call(whole.args[1:], whole.kwargs)
        return block, Call((self._hidden[number], *call.args), call.kwargs)

    def _reach(
        self,
        number: int,
        layer: int | None,
        modules: Sequence[nn.Module],
        read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Read],
    ) -> list[Read]:
        """Return what modules from `layer` on read, in the whole model, whose blocks before it give what is held."""
        arguments = self._kind.arguments(self._batches[number].inputs)
        ended = self._ended.get(number, [])
        behind = None if layer is None else layer - sum(map(len, self._stacks[: len(ended)]))
        with self._computing(), ExitStack() as stack:
            for blocks, hidden in zip(self._stacks, ended, strict=False):
                stack.enter_context(giving(blocks, hidden, Beside(self._beside.count)))
            present = self._stacks[len(ended)][:behind]
            stack.enter_context(giving(present, self._hidden.get(number), self._beside))
            return first_calls(partial(self._model, **arguments), modules, read)


def selected_inputs(values: Tensor, counted: Tensor, module: nn.Module | None = None) -> Selected:
    """Return the values that count, (inputs, width), float32, with their places among all that count.

    Args:
        values: (batch, tokens, width), or flattened as OPT does, or (its tokens, width) where an expert's `module`
            reads them.
    """
    if not isinstance(module, RoutedLinear):
        values = values.reshape(*counted.shape, -1)[counted].float()
        return values, torch.arange(len(values), device=values.device)
    is_counted = counted.flatten()
    kept = is_counted[module.tokens]
    return values[kept].float(), (is_counted.cumsum(0) - 1)[module.tokens[kept]]


def counted_inputs(batch: Batch, group: LinearGroup) -> Tensor:
    """Mark the inputs of a batch that count: (batch, tokens), no padding; for the pooler, (batch,), the first token."""
    is_text = batch.counted_in_decoder if group.reads_decoder else batch.counted
    return is_text[:, 0] if group.layer is None else is_text


def _same(values: Tensor) -> Tensor:
    return values
