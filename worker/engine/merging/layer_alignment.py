"""Layer alignment: linear layers are refitted, in the order in which they run, to their real inputs in a merge.

A layer that was merged for the experts' inputs does not get them: the layers before it were merged too, and errors add
up with depth. Here each layer is fitted to the inputs that the merged layers before it give. Where its output is added
to a residual, it also corrects the error of the residual.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import LAYER_INPUTS
from worker.engine.catalog.methods import MethodParameters
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
    per padded token.

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
    changes: dict[str, Tensor] = {}
    with torch.inference_mode(), ExitStack() as stack:
        for expert in experts:  # the merge's state changes from layer to layer
            stack.enter_context(rounded_weights(expert.loaded.model, precision))
        comparisons = [_Comparison(expert, merged, blocks, precision) for expert in experts]
        for layer, groups in by_layer:
            if layer is not None:
                for comparison in comparisons:
                    comparison.enter(layer)
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
        for x, e in comparison.samples(group):
            if has_bias:
                x = pad(x, (0, 1), value=1.0)
            by_layer = torch.split(e, outputs, dim=1)
            products = x.T @ x
            for of, members in alike.items():
                share = of.lambdas[expert] / sum(of.lambdas) / comparison.count(group)
                moments[of].add_(products, alpha=share)
                errors[of].add_(torch.cat([by_layer[number] for number in members], dim=1).T @ x, alpha=share)
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


class _Comparison:
    """An expert and the merge, side by side on the expert's rows."""

    def __init__(self, expert: Expert, merged: nn.Module, blocks: Sequence[str], precision: Precision) -> None:
        loaded = expert.loaded
        self.expert = expert
        self._batches = list(collate(plan_batches(expert.examples), loaded.padding, loaded.device))
        self._theirs, self._ours = (
            _Run(model, loaded.kind, blocks, self._batches, precision, loaded.device)
            for model in (loaded.model, merged)
        )

    def enter(self, layer: int) -> None:
        self._theirs.enter(layer)
        self._ours.enter(layer)

    def count(self, group: LinearGroup) -> int:
        """Return the number of the group's inputs on all rows: tokens without padding, or, for the pooler, rows."""
        of_row = self.expert.examples
        return sum(len(example.inputs) if group.layer is None else example.unpadded for example in of_row)

    def samples(self, group: LinearGroup) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch the inputs of the merge's layers, (tokens, width), and the errors of their outputs.

        The errors are the expert's outputs minus the merge's, (tokens, outputs), with the group's layers side by side.
        Both are float32, without padding.
        """
        for number, batch in enumerate(self._batches):
            x, ours = self._ours.seen(number, group)
            _, theirs = self._theirs.seen(number, group)
            e = theirs - ours
            finite = torch.isfinite(x.sum(-1) + e.sum(-1))  # NaN and infinity stay in a sum
            if not bool(finite.all()):
                row = int(_counted(batch, group).nonzero()[~finite][0, 0])
                raise not_finite(
                    f"what {group.input} reads or gives", batch.places[batch.row_of(row)], self.expert.source
                )
            yield x, e


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
    ) -> None:
        self._model, self._kind = model, kind
        self._blocks = [model.get_submodule(block) for block in blocks]
        self._batches = batches
        self._computing = partial(computing_in, precision, device)
        self._hidden: dict[int, Tensor] = {}  # (batch, tokens, width), by number of the batch
        self._beside: int | None = None  # values that a block gives in a tuple after the hidden states

    def enter(self, layer: int) -> None:
        """Go on to the next layer.

        The first two are reached through the whole model, because DeBERTa has a convolution between them. Any other
        layer reads the output of the one before it.
        """
        for number in range(len(self._batches)):
            if layer < 2:
                self._hidden[number] = self._whole(number, [self._blocks[layer]])[0].args[0]
            else:
                self._hidden[number] = self._given(number, layer - 1)

    def seen(self, number: int, group: LinearGroup) -> tuple[Tensor, Tensor]:
        """Return inputs of the group's layers, (tokens, width), and outputs, (tokens, outputs); float32, no padding.

        The outputs are the residual sum where the layers are added to one, and else the layers' outputs, side by side.
        """
        counted = _counted(self._batches[number], group)
        modules = [self._model.get_submodule(path) for path in (group.reader, group.norm) if path]
        if group.layer is None:
            calls = self._whole(number, modules)
        else:
            block = self._block(number, group.layer)
            with self._computing():
                calls = _first_calls(block, modules)
        x, *sums = (_selected(call.args[0], counted).float() for call in calls)
        if group.layer is not None and group.ends_block:
            sums = [self._given(number, group.layer)[counted].float()]
        if sums:
            return x, sums[0]
        with self._computing():
            return x, torch.cat([self._model.get_submodule(module)(x).float() for module in group.modules], dim=-1)

    def _given(self, number: int, layer: int) -> Tensor:
        """Return the output of a block for the held input."""
        with self._computing():
            given = self._block(number, layer)()
        self._beside = len(given) - 1 if isinstance(given, tuple) else None
        hidden: Tensor = given[0] if isinstance(given, tuple) else given
        return hidden

    def _whole(self, number: int, modules: Sequence[nn.Module]) -> list["_Call"]:
        """Run the whole model up to the modules, and return their first calls."""
        with self._computing():
            return _first_calls(partial(self._model, **self._kind.arguments(self._batches[number].inputs)), modules)

    def _block(self, number: int, layer: int) -> Callable[[], Any]:
        """Return a pass of one block with the arguments that the model gives it, such as the mask of its own window."""
        skipped = self._blocks[: layer if layer > 1 else 0]
        with _skipping(skipped, self._beside):
            [call] = self._whole(number, [self._blocks[layer]])
        return partial(self._blocks[layer], self._hidden[number], *call.args[1:], **call.kwargs)


def _selected(values: Tensor, counted: Tensor) -> Tensor:
    """Return the values that count, (inputs, width), of (batch, tokens, width), or flattened as OPT does."""
    return values.reshape(*counted.shape, -1)[counted]


def _counted(batch: Batch, group: LinearGroup) -> Tensor:
    """Mark the inputs of a batch that count: (batch, tokens), no padding; for the pooler, (batch,), the first token."""
    is_text = batch.counted
    return is_text[:, 0] if group.layer is None else is_text


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllCalled(Exception):
    """The rest of the pass is not needed."""


def _first_calls(run: Callable[[], object], modules: Sequence[nn.Module]) -> list[_Call]:
    """Return the first call of each module while `run` runs, which is stopped once all have been called."""
    calls: dict[nn.Module, _Call] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, _Call(args, kwargs))
        if len(calls) == len(modules):
            raise _AllCalled

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        with suppress(_AllCalled):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [calls[module] for module in modules]


@contextmanager
def _skipping(blocks: Sequence[nn.Module], beside: int | None) -> Iterator[None]:
    """Let blocks give back the hidden states that they are given, alone or in a tuple with so many further values."""

    def skip(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden if beside is None else (hidden, *([None] * beside))

    for block in blocks:
        block.forward = skip
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, "forward")


def _matrix(model: nn.Module, path: str, transposed: bool) -> Tensor:
    """Return a view of a linear layer's weight, (outputs, inputs), however it is stored."""
    weight = model.get_parameter(f"{path}.weight")
    if weight.dim() != 2:
        raise TypeError(f"{path} is no linear layer")
    return weight.T if transposed else weight


def _bias(model: nn.Module, path: str) -> Tensor | None:
    return dict(model.get_submodule(path).named_parameters(recurse=False)).get("bias")


def _module(slot: Slot) -> str:
    return slot.name.rpartition(".")[0]
