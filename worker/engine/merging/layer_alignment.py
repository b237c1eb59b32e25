"""Layer alignment: linear layers are refitted, in the order in which they run, to their real inputs in a merge.

A layer that was merged for the experts' inputs does not get them: the layers before it were merged too, and errors add
up with depth. Here each layer is fitted to the inputs that the merged layers before it give. Where its output is added
to a residual, it also corrects the error of the residual.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import LAYER_INPUTS
from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.memory import MOST_FINISHED, most_tokens_kept
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, values_at
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in, rounded_weights
from worker.engine.scoring.scorer import not_finite
from worker.engine.tasks import HeadKind

RIDGE = 1e-4  # share of the mean diagonal entry: directions that no input spans stay as they are
ORDER = (*LAYER_INPUTS, Kind.POOLER)
PRODUCT_TOKENS = 4096  # multiplied at once, so that adding to the sums takes little of the time
LEAST_COLUMNS = 128  # of a run in which half of a symmetric product is computed
MOST_RUNS = 12
Read = TypeVar("Read")
_Finished = tuple[nn.Module, Any]
"""A module that was called, and its output."""


@dataclass(frozen=True)
class Expert:
    """A model that takes part, and its rows, from the data set `source`."""

    loaded: LoadedModel
    weight: PerTensor[float]
    examples: Sequence[Example]
    source: str


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers with the same input, as paths of modules.

    The input is seen at the module `reader`. Where the layers' output is added to a residual, the sum is the input of
    `norm`, or the output of the block.
    """

    input: str
    layer: int | None
    modules: tuple[str, ...]
    reader: str
    norm: str | None
    ends_block: bool = False
    transposed: frozenset[str] = frozenset()
    """Modules of the group whose weights are stored as (inputs, outputs)."""

    @property
    def is_added(self) -> bool:
        """Whether the layers' output is added to a residual, and the sum is seen."""
        return self.norm is not None or self.ends_block


def linear_groups(plan: MergePlan) -> list[LinearGroup]:
    """Return the linear layers that are refitted, in the order of a pass: four groups a layer, and the pooler."""
    modules = {(t.slot.layer, t.slot.kind): _module(t.slot) for t in plan.backbone}
    slots = [t.slot for t in plan.backbone if t.slot.input and t.slot.kind in ORDER]
    slots.sort(key=lambda slot: (math.inf if slot.layer is None else slot.layer, ORDER.index(slot.kind)))
    norms = required_family(plan).residual_norms(plan.checkpoints[0].config)
    groups = []
    for name, sharing in groupby(slots, key=lambda slot: slot.input):
        members = list(sharing)
        shown = next(slot for slot in members if slot.shows_input)
        norm = norms.get(shown.kind)
        groups.append(
            LinearGroup(
                input=str(name),
                layer=shown.layer,
                modules=tuple(_module(slot) for slot in members),
                reader=_module(shown),
                norm=modules[shown.layer, norm] if norm else None,
                ends_block=shown.kind in norms and norm is None,
                transposed=frozenset(_module(slot) for slot in members if slot.transposed),
            )
        )
    return groups


def align_layers(
    plan: MergePlan,
    experts: Sequence[Expert],
    merged: nn.Module,
    parameters: MethodParameters,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Refit the linear layers of `merged`, in place, so that their outputs approach those of each expert's own layers.

    X_j (tokens, d) are the layer's inputs in `merged` on expert j's rows, augmented by 1 where there is a bias. E_j
    (tokens, outputs) are the outputs of the expert's layer on its own inputs, minus those of `merged`'s layer on X_j.
    The layer V_0 = (W, b) becomes

        V = V_0 + [sum_j lambda_j E_j^T X_j / n_j] [S + hold diag(S) + 1e-4 tr(S)/d I]^-1,
        S = sum_j lambda_j X_j^T X_j / n_j,

    with lambda_j summing to 1: a ridge regression towards V_0. lambda_j and `hold` are those of W's place. For layers
    that are added to a residual, E_j is the difference of the sums. Sums and solution are float64, products of a batch
    float32; padding does not count.

    Meanwhile the hidden states of one layer are held for all rows, of expert and merge: 8 bytes times the hidden size
    per padded token. What spares passes through the layer is held beside them, as far as `KEPT_BYTES` go.

    Args:
        merged: a model of the plan's family with the start as its backbone, on the experts' device.
        on_group: called after each of `linear_groups`; may raise to stop.

    Returns:
        V - V_0 by `Slot.name`, float32 on the CPU.

    Raises:
        NumericalError: an input or an output is NaN or infinite; the message names the row.
    """
    by_layer = groupby(linear_groups(plan), key=lambda group: group.layer)
    family = required_family(plan)
    layers = family.size(plan.checkpoints[0].config, "layers")
    places = {tensor.slot.name: tensor.place for tensor in plan.backbone}

    def settings(module: str) -> _Settings:
        place = places[f"{module}.weight"]
        lambdas = tuple(values_at((expert.weight for expert in experts), place, DEFAULT_WEIGHT))
        return _Settings(lambdas, parameters.at("hold", place))

    blocks = [family.layer_path(layer).removesuffix(".") for layer in range(layers)]
    keeping = most_tokens_kept(family.size(plan.checkpoints[0].config, "hidden"))
    changes: dict[str, Tensor] = {}
    with torch.inference_mode(), ExitStack() as stack:
        comparisons: list[_Comparison] = []
        for expert in experts:
            comparisons.append(_Comparison(expert, merged, blocks, precision, keeping))
            keeping -= comparisons[-1].tokens_kept
        for expert in experts:  # the merge's state changes from layer to layer
            stack.enter_context(rounded_weights(expert.loaded.model, precision))
        for layer, of_layer in by_layer:
            groups = list(of_layer)
            for comparison in comparisons:
                comparison.enter(layer, groups)
            for group in groups:
                changes |= _refit(group, comparisons, merged, settings)
                on_group()
    return changes


def refitted(
    plan: MergePlan,
    start: Mapping[str, Tensor],
    experts: Sequence[Expert],
    parameters: MethodParameters,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the merged backbone `start`, by `Slot.name`, after `align_layers`."""
    merged = copy.deepcopy(experts[0].loaded.model)
    merged.load_state_dict(dict(start), strict=False)
    changes = align_layers(plan, experts, merged, parameters, precision, on_group)
    del merged  # the sums take its place
    return {name: tensor + changes.get(name, 0.0) for name, tensor in start.items()}


def ridge_step(moment: Tensor, error: Tensor, hold: float) -> Tensor:
    """Compute `N [S + hold diag(S) + 1e-4 tr(S)/d I]^-1`, (outputs, d), from S (d, d) and N (outputs, d), in float64.

    It minimises the mean of `||e - x step^T||^2` plus `hold` and the ridge times the squares of the step, where S is
    the mean of `x x^T`, and N that of `e x^T`.

    Raises:
        NumericalError: rounding leaves a matrix that is not positive definite.
    """
    diagonal = moment.diagonal()
    factor, failed = torch.linalg.cholesky_ex(moment + torch.diag(hold * diagonal + RIDGE * diagonal.mean()))
    if bool(failed):
        raise NumericalError("rounding left the inputs of a linear layer without a solution; raise hold")
    return torch.cholesky_solve(error.T, factor).T


def _refit(
    group: LinearGroup,
    comparisons: Sequence["_Comparison"],
    merged: nn.Module,
    settings: Callable[[str], "_Settings"],
) -> dict[str, Tensor]:
    weights = [_matrix(merged, module, module in group.transposed) for module in group.modules]
    biases = [_bias(merged, module) for module in group.modules]
    has_bias = all(bias is not None for bias in biases)  # a regression has either a constant or none
    outputs, inputs = [len(weight) for weight in weights], weights[0].shape[1]
    columns = inputs + has_bias
    alike: dict[_Settings, list[int]] = {}  # layers with the same settings share a regression
    for number, module in enumerate(group.modules):
        alike.setdefault(settings(module), []).append(number)
    empty = torch.zeros(columns, columns, dtype=torch.float64, device=weights[0].device)
    moments = {of: empty.clone() for of in alike}
    errors = {of: empty.new_zeros(sum(outputs[number] for number in members), columns) for of, members in alike.items()}
    for expert, comparison in enumerate(comparisons):
        moment, error = comparison.products(group)
        by_layer = torch.split(error[:, :columns], outputs)
        for of, members in alike.items():
            share = of.lambdas[expert] / sum(of.lambdas) / comparison.count(group)
            moments[of].add_(moment[:columns, :columns], alpha=share)
            errors[of].add_(torch.cat([by_layer[number] for number in members]), alpha=share)
    changes = {}
    for of, members in alike.items():
        step_of_all = ridge_step(moments[of], errors[of], of.hold).float()
        steps = torch.split(step_of_all, [outputs[number] for number in members])
        for number, step in zip(members, steps, strict=True):
            module, change = group.modules[number], step[:, :inputs]
            changes[f"{module}.weight"] = change.T if module in group.transposed else change
            weights[number].add_(change)
            bias = biases[number] if has_bias else None
            if bias is not None:
                changes[f"{module}.bias"] = step[:, -1]
                bias.add_(step[:, -1])
    return {name: change.cpu().contiguous() for name, change in changes.items()}


@dataclass(frozen=True)
class _Settings:
    """Settings of one linear layer: every expert's lambda, and the strength that holds it."""

    lambdas: tuple[float, ...]
    hold: float


class _Products:
    """Weighted sums over tokens of `x x^T` and `e x^T`, x augmented by 1: float64 sums of float32 products."""

    def __init__(self, inputs: int, errors: int, device: torch.device) -> None:
        self._moment = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self._error = torch.zeros(errors, inputs + 1, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, e: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: x (tokens, inputs), e (tokens, errors), and the tokens' weights, (tokens,), 1 by default."""
        root = x.new_ones(len(x), 1) if weights is None else weights.to(x)[:, None].sqrt()
        self._waiting.append((x, e, root) if weights is None else (x * root, e * root, root))
        if sum(len(x) for x, *_ in self._waiting) >= PRODUCT_TOKENS:
            self._multiply()

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums (inputs + 1, inputs + 1) and (errors, inputs + 1)."""
        self._multiply()
        return self._moment, self._error

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x, e, root = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        width = x.shape[1]
        columns = max(LEAST_COLUMNS, -(-width // MOST_RUNS))
        for start in range(0, width, columns):  # the matrix is symmetric, and little more than half is computed
            end = min(start + columns, width)
            product = x[:, start:end].T @ x[:, start:]
            self._moment[start:end, start:width].add_(product)
            self._moment[end:width, start:end].add_(product[:, end - start :].T)
        constant = (root.T @ x)[0]
        self._moment[:width, width].add_(constant)
        self._moment[width, :width].add_(constant)
        self._moment[width, width].add_(root.square().sum())
        self._error[:, :width].add_(e.T @ x)
        self._error[:, width].add_((e.T @ root)[:, 0])


class _Comparison:
    """An expert and the merge, side by side on the expert's rows.

    The expert does not change while a layer is refitted, so one pass through it shows what all groups need. That is
    kept for the first batches.

    It is made before the expert's weights are rounded for passes, and solves with those that they were.

    Args:
        keeping: number of padded tokens for which it may be kept.
    """

    def __init__(
        self, expert: Expert, merged: nn.Module, blocks: Sequence[str], precision: Precision, keeping: int
    ) -> None:
        loaded = expert.loaded
        self.expert = expert
        self._own = dict(loaded.model.named_parameters())
        self._merged = merged
        self._batches = list(collate(plan_batches(expert.examples), loaded.padding, loaded.device))
        padded = list(accumulate(math.prod(batch.counted.shape) for batch in self._batches))
        self._kept = range(sum(tokens <= keeping for tokens in padded))
        self.tokens_kept = padded[len(self._kept) - 1] if self._kept else 0
        self._tokens = sum(example.unpadded for example in expert.examples)
        self._sequences = sum(len(example.inputs) for example in expert.examples)
        self._theirs, self._ours = (
            _Run(
                model,
                loaded.kind,
                blocks,
                self._batches,
                precision,
                loaded.device,
                self._kept,
            )
            for model in (loaded.model, merged)
        )
        self._shown: dict[tuple[str, int], Tensor] = {}
        """What the expert's layers read or give, by the group's input and the number of the batch."""

    def enter(self, layer: int | None, groups: Sequence[LinearGroup]) -> None:
        """Go on to the next layer, which has these groups; None: past the last layer."""
        for run in (self._theirs, self._ours):
            run.enter(layer, groups)
        for number in self._kept:
            self._show(number, groups, whole=layer is not None)

    def _show(self, number: int, groups: Sequence[LinearGroup], whole: bool = False) -> None:
        for group, seen in zip(groups, self._theirs.seen(number, groups, whole), strict=True):
            self._shown[group.input, number] = seen.x if self._is_by_inputs(group) else seen.outputs()

    def count(self, group: LinearGroup) -> int:
        """Return the number of the group's inputs on all rows: tokens without padding, or, for the pooler, rows."""
        return self._sequences if group.layer is None else self._tokens

    def samples(self, group: LinearGroup) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch the inputs x of the merge's layers, (tokens, width), and what the expert's are off.

        That are the errors of the outputs, (tokens, outputs), with the group's layers side by side: the expert's minus
        the merge's. Where outputs are more than inputs, it is the difference of the inputs, (tokens, width). Both are
        float32, without padding.
        """
        for number, batch in enumerate(self._batches):
            if number not in self._kept:
                self._show(number, [group])
            [ours] = self._ours.seen(number, [group])
            theirs = self._shown.pop((group.input, number))
            e = theirs - (ours.x if self._is_by_inputs(group) else ours.outputs())
            finite = torch.isfinite(ours.x.sum(-1) + e.sum(-1))  # NaN and infinity stay in a sum
            if not bool(finite.all()):
                row = int(_counted(batch, group).nonzero()[~finite][0, 0])
                raise not_finite(
                    f"what {group.input} reads or gives", batch.places[batch.row_of(row)], self.expert.source
                )
            yield ours.x, e

    def products(self, group: LinearGroup) -> tuple[Tensor, Tensor]:
        """Sum `x x^T` and `e x^T` over all rows: (width + 1, width + 1) and (outputs, width + 1), float64.

        x are the inputs of the merge's layers, augmented by 1, and e the errors of their outputs. With `W` and `x` the
        augmented weights and inputs of the expert, and `V` and `z` those of the merge, `e = W (x - z) + (W - V) z`.
        """
        products: _Products | None = None
        for x, e in self.samples(group):
            products = products or _Products(x.shape[1], e.shape[1], x.device)
            products.add(x, e)
        if products is None:
            raise ValueError(f"{self.expert.source} has no rows")
        moment, error = products.sums()
        if self._is_by_inputs(group):
            theirs, ours = (_augmented(own, group) for own in (self._own, dict(self._merged.named_parameters())))
            error = theirs[:, :-1] @ error + (theirs - ours) @ moment
        return moment, error

    def _is_by_inputs(self, group: LinearGroup) -> bool:
        """Return whether the difference of inputs stands for that of outputs, because it is narrower."""
        shapes = [_matrix(self._merged, module, module in group.transposed).shape for module in group.modules]
        return not group.is_added and sum(outputs for outputs, _ in shapes) > shapes[0][1]


@dataclass(frozen=True)
class _Seen:
    """What a group of layers reads, (tokens, width), and gives; float32, without padding."""

    x: Tensor
    outputs: Callable[[], Tensor]
    """Gives (tokens, outputs): the residual sum where the layers are added to one, else their outputs side by side."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Run:
    """Runs a model on batches of rows, layer by layer. For each batch it holds the input of its present layer."""

    def __init__(
        self,
        model: nn.Module,
        kind: HeadKind[Any],
        blocks: Sequence[str],
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
        self._blocks = [model.get_submodule(block) for block in blocks]
        self._batches = batches
        self._computing = partial(computing_in, precision, device)
        self._layer: int | None = None
        self._hidden: dict[int, Tensor] = {}  # (batch, tokens, width), by number of the batch
        self._given: dict[int, Tensor] = {}  # the present layer's outputs that are known, alike
        self._finished: dict[int, list[_Finished]] = {}  # alike: what need not be computed again in the present layer
        self._arguments: dict[int, _Call] = {}  # alike: those of the present layer besides the hidden states
        self._beside: int | None = None  # values that a block gives in a tuple after the hidden states

    def enter(self, layer: int | None, groups: Sequence[LinearGroup]) -> None:
        """Go on to the next layer, which has these groups, or past the last."""
        for number in range(len(self._batches)):
            if self._layer is not None:
                self._hidden[number] = self._output(number)
            self._finished.pop(number, None)
        self._given.clear()
        self._arguments.clear()
        if layer is not None:
            for number in range(len(self._batches)):
                [call] = self._reach(number, layer, [self._blocks[layer]], _Call)
                self._hidden[number], *others = call.args
                held = sum(value.numel() for value in _tensors((*others, *call.kwargs.values())))
                if number in self._kept and held <= self._hidden[number].numel():
                    self._arguments[number] = _Call(tuple(others), call.kwargs)
        self._layer, self._groups = layer, groups

    def enter_with(self, other: "_Run") -> None:
        """Go on to the layer that another run of the same rows is in, with that run's inputs of it."""
        self._layer, self._groups, self._beside = other._layer, other._groups, other._beside
        self._hidden = dict(other._hidden)
        self._given.clear()
        self._finished.clear()
        self._arguments.clear()

    def read(self, number: int, group: LinearGroup, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return what modules of the present layer, which has this group, read, (tokens, width), by path.

        The run keeps the layer's output, and must not be changed before it goes on.
        """
        counted = _counted(self._batches[number], group)
        modules = [self._model.get_submodule(path) for path in paths]

        def selected(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return _selected(args[0], counted).float()

        if group.layer is None:
            return dict(zip(paths, self._reach(number, None, modules, selected), strict=True))
        block, call = self._block(number)

        def run() -> None:
            self._given[number] = self._hidden_of(block(*call.args, **call.kwargs))

        with self._computing():
            return dict(zip(paths, _first_calls(run, modules, selected, stops=False), strict=True))

    def tokens_read(self, number: int) -> Tensor:
        """Mark the tokens whose last hidden state the head's outputs depend on, (tokens,), without padding.

        The run is in its last layer, and has its output.
        """
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self._given[number].clone().requires_grad_()
            batch = self._batches[number]
            inputs = {name: values.clone() for name, values in batch.inputs.items()}
            with self._computing(), _giving(self._blocks, hidden, self._beside):
                outputs = self._kind.run(inputs)
            [gradient] = torch.autograd.grad(batch.of_outputs(outputs).float().square().sum(), hidden)
        return gradient.abs().sum(-1)[batch.counted] > 0

    def forget(self) -> None:
        """Compute the present layer's output anew, because the layer has changed."""
        self._given.clear()

    def seen(self, number: int, groups: Sequence[LinearGroup], whole: bool = False) -> list[_Seen]:
        """Return what groups of the present layer read and give in a batch.

        Args:
            whole: keep the layer's output too.
        """
        counted = _counted(self._batches[number], groups[0])
        paths = [path for group in groups for path in (group.reader, group.norm) if path]
        modules = [self._model.get_submodule(path) for path in paths]

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return _selected(args[0], counted).float()

        if groups[0].layer is None:
            read_by = dict(zip(paths, self._reach(number, None, modules, read), strict=True))
        else:
            read_by = dict(zip(paths, self._passed(number, groups, modules, read, whole), strict=True))
        found = []
        for group in groups:
            x = read_by[group.reader]
            total = _selected(self._given[number], counted).float() if group.ends_block else None
            if group.norm:
                total = read_by[group.norm]
            found.append(_Seen(x, partial(self._outputs, group, x) if total is None else partial(_same, total)))
        if whole:  # no further pass is needed
            self._arguments.pop(number, None)
        else:
            self._given.pop(number, None)
        return found

    def _outputs(self, group: LinearGroup, x: Tensor) -> Tensor:
        """Return outputs of the group's layers, side by side, (tokens, outputs)."""
        with self._computing():
            return torch.cat([self._model.get_submodule(module)(x).float() for module in group.modules], dim=-1)

    def _passed(
        self,
        number: int,
        groups: Sequence[LinearGroup],
        modules: Sequence[nn.Module],
        read: Callable[[tuple[Any, ...], dict[str, Any]], Tensor],
        whole: bool,
    ) -> list[Tensor]:
        """Return what modules of the present layer read; `whole`: and keep the layer's output."""
        to_end = whole or any(group.ends_block for group in groups)
        block, call = self._block(number)

        def run() -> None:
            self._given[number] = self._hidden_of(block(*call.args, **call.kwargs))

        started = [group.input for group in self._groups].index(groups[0].input)
        not_final = {self._model.get_submodule(path) for group in self._groups[started:] for path in group.modules}
        with (
            self._computing(),
            _replaying(self._finished.get(number, [])),
            _recording(block, not_final if number in self._kept and not whole else ()) as finished,
        ):
            calls = _first_calls(run, modules, read, stops=not to_end)
        held = sum(value.numel() for _, output in finished for value in _tensors(output))
        if finished and held <= MOST_FINISHED * self._hidden[number].numel():
            self._finished[number] = finished
        return calls

    def _output(self, number: int) -> Tensor:
        """Return the output of the present layer for the held input."""
        if number not in self._given:
            with self._computing(), _replaying(self._finished.get(number, [])):
                block, call = self._block(number)
                return self._hidden_of(block(*call.args, **call.kwargs))
        return self._given.pop(number)

    def _hidden_of(self, given: Any) -> Tensor:
        self._beside = len(given) - 1 if isinstance(given, tuple) else None
        hidden: Tensor = given[0] if isinstance(given, tuple) else given
        return hidden

    def _block(self, number: int) -> tuple[nn.Module, _Call]:
        """Return the present block, and its call with the arguments that the model gives it, such as its own mask."""
        if self._layer is None:
            raise ValueError("no layer was entered")
        block = self._blocks[self._layer]
        call = self._arguments.get(number)
        if call is None:
            [whole] = self._reach(number, self._layer, [block], _Call)
            call = _Call(whole.args[1:], whole.kwargs)
        return block, _Call((self._hidden[number], *call.args), call.kwargs)

    def _reach(
        self,
        number: int,
        layer: int | None,
        modules: Sequence[nn.Module],
        read: Callable[[tuple[Any, ...], dict[str, Any]], Read],
    ) -> list[Read]:
        """Return what modules from `layer` on read, in the whole model, whose blocks before it give what is held."""
        arguments = self._kind.arguments(self._batches[number].inputs)
        with self._computing(), _giving(self._blocks[:layer], self._hidden.get(number), self._beside):
            return _first_calls(partial(self._model, **arguments), modules, read)


def _selected(values: Tensor, counted: Tensor) -> Tensor:
    """Return the values that count, (inputs, width), of (batch, tokens, width), or flattened as OPT does."""
    return values.reshape(*counted.shape, -1)[counted]


def _counted(batch: Batch, group: LinearGroup) -> Tensor:
    """Mark the inputs of a batch that count: (batch, tokens), no padding; for the pooler, (batch,), the first token."""
    is_text = batch.counted
    return is_text[:, 0] if group.layer is None else is_text


class _AllCalled(Exception):
    """The rest of the pass is not needed."""


def _first_calls(
    run: Callable[[], object],
    modules: Sequence[nn.Module],
    read: Callable[[tuple[Any, ...], dict[str, Any]], Read],
    stops: bool = True,
) -> list[Read]:
    """Return what `read` makes of the first call of each module while `run` runs.

    Args:
        stops: stop it once all have been called.
    """
    calls: dict[nn.Module, Read] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = read(args, kwargs)
        if stops and len(calls) == len(set(modules)):
            raise _AllCalled

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        with suppress(_AllCalled):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [calls[module] for module in modules]


@contextmanager
def _giving(blocks: Sequence[nn.Module], hidden: Tensor | None, beside: int | None) -> Iterator[None]:
    """Let the last of these blocks give `hidden`, alone or in a tuple with so many further values.

    Those before it give what they are given.
    """

    def give(given: Tensor | None, read: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = read if given is None else given
        return output if beside is None else (output, *([None] * beside))

    for number, block in enumerate(blocks, start=1):
        block.forward = partial(give, hidden if number == len(blocks) else None)
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, "forward")


@contextmanager
def _recording(block: nn.Module, not_final: Collection[nn.Module]) -> Iterator[list[_Finished]]:
    """Collect outputs of the block's modules, until the first call of one that is not final.

    Of modules within modules, the outer one's output is there. Nothing is collected where all are final.
    """
    finished: list[_Finished] = []
    starts: list[int] = []
    is_final = True

    def before(module: nn.Module, args: object) -> None:
        nonlocal is_final
        is_final = is_final and module not in not_final
        starts.append(len(finished))

    def after(module: nn.Module, args: object, output: Any) -> None:
        start = starts.pop()
        if is_final:
            finished[start:] = [(module, output)]

    inner = [module for module in block.modules() if module is not block] if not_final else []
    handles = [module.register_forward_pre_hook(before) for module in inner]
    handles += [module.register_forward_hook(after) for module in inner]
    try:
        yield finished
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaying(finished: Sequence[_Finished]) -> Iterator[None]:
    """Let modules give what they gave, call by call; further calls are computed."""
    outputs: dict[nn.Module, deque[Any]] = {}
    for module, output in finished:
        outputs.setdefault(module, deque()).append(output)

    def give(waiting: deque[Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return waiting.popleft() if waiting else forward(*args, **kwargs)

    for module, waiting in outputs.items():
        module.forward = partial(give, waiting, module.forward)
    try:
        yield
    finally:
        for module in outputs:
            delattr(module, "forward")


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _same(values: Tensor) -> Tensor:
    return values


def _matrix(model: nn.Module, path: str, transposed: bool) -> Tensor:
    """Return a view of a linear layer's weight, (outputs, inputs), however it is stored."""
    weight = model.get_parameter(f"{path}.weight")
    if weight.dim() != 2:
        raise TypeError(f"{path} is no linear layer")
    return weight.T if transposed else weight


def _augmented(parameters: Mapping[str, Tensor], group: LinearGroup) -> Tensor:
    """Return the weights of a group, one below the other, with a column of biases, (outputs, inputs + 1), float64.

    Args:
        parameters: of the model, by name.
    """
    parts = []
    for module in group.modules:
        weight, bias = parameters[f"{module}.weight"], parameters.get(f"{module}.bias")
        weight = weight.T if module in group.transposed else weight
        constant = weight.new_zeros(len(weight)) if bias is None else bias
        parts.append(torch.cat([weight, constant[:, None]], dim=1).double())
    return torch.cat(parts)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    return dict(model.get_submodule(path).named_parameters(recurse=False)).get("bias")


def _module(slot: Slot) -> str:
    return slot.name.rpartition(".")[0]
