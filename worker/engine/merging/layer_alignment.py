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
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import LAYER_INPUTS
from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.memory import MOST_FINISHED, most_tokens_kept
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, values_at
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.models.experts import RoutedLinear, SingleExpert
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in, rounded_weights
from worker.engine.scoring.scorer import not_finite
from worker.engine.tasks import HeadKind

RIDGE = 1e-4  # share of the mean diagonal entry: directions that no input spans stay as they are
ORDER = (*LAYER_INPUTS, Kind.POOLER)
TURNS = 2  # of the groups of a layer that is run several times; later ones gained next to nothing
LEAST_SHARE = 1 / 8  # of a step there
SUMS_BYTES = 500_000_000  # of sums over tokens that are held at once, for experts
PRODUCT_TOKENS = 4096  # multiplied at once, so that adding to the sums takes little of the time
LEAST_COLUMNS = 128  # of a run in which half of a symmetric product is computed
MOST_RUNS = 12
Read = TypeVar("Read")
_Selected = tuple[Tensor, Tensor]
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
    """Place of their layer among all layers in the order in which they run, those of an encoder first."""
    modules: tuple[str, ...]
    reader: str
    norm: str | None
    ends_block: bool = False
    transposed: frozenset[str] = frozenset()
    """Modules of the group whose weights are stored as (inputs, outputs)."""
    reads_decoder: bool = False
    """Whether the tokens of the input are those of a decoder beside an encoder."""
    expert: str | None = None
    """The module of the expert that the layers are part of, in a mixture of experts: (its tokens, width)."""
    router: str | None = None
    """The module that reads what all experts of that mixture read."""

    @property
    def is_added(self) -> bool:
        """Whether the layers' output is added to a residual, and the sum is seen."""
        return self.norm is not None or self.ends_block


def linear_groups(plan: MergePlan) -> list[LinearGroup]:
    """Return the linear layers that are refitted, in the order of a pass, and last the pooler.

    A layer has four groups, and one of a decoder beside an encoder seven. One that is a mixture of experts has one for
    its router, and two for each expert; first come those by which experts read, and then those by which they give.
    """
    family, config = required_family(plan), plan.checkpoints[0].config
    sizes = [family.size(config, stack.size("layers")) for stack in family.stacks]
    before = {stack.name: sum(sizes[:number]) for number, stack in enumerate(family.stacks)}

    def place(slot: Slot) -> int | None:
        return None if slot.layer is None else before[slot.stack] + slot.layer

    modules = {(place(t.slot), t.slot.kind): _module(t.slot) for t in plan.backbone}
    slots = [(place(t.slot), t.slot) for t in plan.backbone if t.slot.input and t.slot.kind in ORDER]
    slots.sort(key=lambda found: (math.inf if found[0] is None else found[0], *_order(found[1])))
    groups = []
    for (layer, name), sharing in groupby(slots, key=lambda found: (found[0], found[1].input)):
        members = [slot for _, slot in sharing]
        shown = next(slot for slot in members if slot.shows_input)
        reader, is_of_expert = _module(shown), shown.expert is not None
        norms = {} if is_of_expert and shown.kind is Kind.DOWN else family.residual_norms(config, shown.stack)
        norm = norms.get(shown.kind)
        groups.append(
            LinearGroup(
                input=str(name),
                layer=layer,
                modules=tuple(_module(slot) for slot in members),
                reader=reader,
                norm=modules[layer, norm] if norm else None,
                ends_block=shown.kind in norms and norm is None,
                transposed=frozenset(_module(slot) for slot in members if slot.transposed),
                reads_decoder=shown.reads_decoder,
                expert=reader.rpartition(".")[0] if is_of_expert else None,
                router=modules[layer, Kind.ROUTER] if is_of_expert else None,
            )
        )
    return groups


def _order(slot: Slot) -> tuple[int, int, int]:
    """Return a key by which the linear layers of a layer are in the order in which they run, by their inputs."""
    of_input = Kind.UP if slot.kind is Kind.GATE else slot.kind
    return ORDER.index(of_input), -1 if slot.expert is None else slot.expert, ORDER.index(slot.kind)


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
    groups, family = linear_groups(plan), required_family(plan)
    places = {tensor.slot.name: tensor.place for tensor in plan.backbone}

    def settings(module: str) -> _Settings:
        place = places[f"{module}.weight"]
        lambdas = tuple(values_at((expert.weight for expert in experts), place, DEFAULT_WEIGHT))
        return _Settings(lambdas, parameters.at("hold", place))

    keeping = most_tokens_kept(family.size(plan.checkpoints[0].config, "hidden"))
    changes: dict[str, Tensor] = {}
    with torch.inference_mode(), ExitStack() as stack:
        comparison_of = _SharedComparison if family.shares_layers else _Comparison
        comparisons: list[_Comparison] = []
        for expert in experts:
            comparisons.append(comparison_of(expert, merged, stacks_of(plan), precision, keeping))
            keeping -= comparisons[-1].tokens_kept
        for expert in experts:  # the merge's state changes from layer to layer
            stack.enter_context(rounded_weights(expert.loaded.model, precision))
        if family.shares_layers:
            return _align_shared(groups, comparisons, merged, settings, on_group)
        for layer, alike in groupby(groups, key=lambda group: group.layer):
            of_layer = list(alike)
            for comparison in comparisons:
                comparison.enter(layer, of_layer)
            for at_once in _at_once(of_layer, merged):
                changes |= _refit(at_once, comparisons, merged, settings)
                for _ in at_once:
                    on_group()
    return changes


def _align_shared(
    groups: Sequence[LinearGroup],
    comparisons: Sequence["_Comparison"],
    merged: nn.Module,
    settings: Callable[[str], "_Settings"],
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Refit a layer that is run several times, as `align_layers`: the groups take turns, each for all of its uses.

    A step changes what all later uses read too, and so may lead away from the experts. It is halved until the layer's
    residual sums are nearer to theirs than before, and in the end left out.
    """
    of_layer = [group for group in groups if group.layer is not None]
    last = of_layer[-1]
    lambdas = settings(last.modules[0]).lambdas

    def distance() -> float:
        """Return the mean square of what the sums are off, over tokens and uses, by the models' weights."""
        return sum(share * comparison.distance(last) for share, comparison in zip(lambdas, comparisons, strict=True))

    changes: dict[str, Tensor] = {}
    nearest = distance()
    for turn in range(TURNS):
        before = nearest
        for group in of_layer:
            step, taken = _refit([group], comparisons, merged, settings), 1.0
            while (found := distance()) >= nearest and taken:
                less = taken / 2 if taken > LEAST_SHARE else 0.0
                for name, change in step.items():
                    parameter = merged.get_parameter(name)
                    parameter.add_(change.to(parameter.device), alpha=less - taken)
                taken = less
            nearest = min(found, nearest)
            for name, change in step.items() if taken else ():
                changes[name] = changes.get(name, torch.zeros(())) + taken * change
            if not turn:
                on_group()
        if nearest == before:
            break
    for group in groups[len(of_layer) :]:
        changes |= _refit([group], comparisons, merged, settings)
        on_group()
    return changes


def _at_once(groups: Sequence[LinearGroup], merged: nn.Module) -> Iterator[Sequence[LinearGroup]]:
    """Yield groups of a layer that are refitted at once: experts do not read what others give, up to `SUMS_BYTES`."""
    for is_of_expert, alike in groupby(groups, key=lambda group: group.expert and group.input.rpartition(".")[2]):
        members = list(alike)
        outputs, inputs = _matrix(merged, members[0].reader, members[0].reader in members[0].transposed).shape
        size = 8 * (inputs + 1) * (inputs + outputs * len(members[0].modules))
        most = max(1, SUMS_BYTES // size) if is_of_expert else 1
        yield from (members[start : start + most] for start in range(0, len(members), most))


def stacks_of(plan: MergePlan) -> list[list[str]]:
    """Return the paths of the layers, in the order in which they run: those of each stack."""
    family, config = required_family(plan), plan.checkpoints[0].config
    numbers = {stack.name: range(family.size(config, stack.size("layers"))) for stack in family.stacks}
    return [[family.layer_path(n, stack).removesuffix(".") for n in of_stack] for stack, of_stack in numbers.items()]


def model_of(start: Mapping[str, Tensor], experts: Sequence[Expert]) -> nn.Module:
    """Return a model with the backbone `start`, by `Slot.name`, and all else as the first expert has it."""
    merged = copy.deepcopy(experts[0].loaded.model)
    merged.load_state_dict(dict(start), strict=False)
    return merged


def refitted(
    plan: MergePlan,
    start: Mapping[str, Tensor],
    experts: Sequence[Expert],
    parameters: MethodParameters,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the merged backbone `start`, by `Slot.name`, after `align_layers`."""
    merged = model_of(start, experts)
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
    groups: Sequence[LinearGroup],
    comparisons: Sequence["_Comparison"],
    merged: nn.Module,
    settings: Callable[[str], "_Settings"],
) -> dict[str, Tensor]:
    regressions = [_Regression(group, merged, settings) for group in groups]
    for number, comparison in enumerate(comparisons):
        for regression, sums in zip(regressions, comparison.products(groups), strict=True):
            regression.add(number, *sums, comparison.count(regression.group))
    return {name: change for regression in regressions for name, change in regression.step().items()}


class _Regression:
    """The ridge regression of one group: linear layers of the merge that read the same."""

    def __init__(self, group: LinearGroup, merged: nn.Module, settings: Callable[[str], "_Settings"]) -> None:
        self.group = group
        self._weights = [_matrix(merged, module, module in group.transposed) for module in group.modules]
        self._biases = [_bias(merged, module) for module in group.modules]
        self._has_bias = all(bias is not None for bias in self._biases)  # it has either a constant or none
        self._outputs = [len(weight) for weight in self._weights]
        self._inputs = self._weights[0].shape[1]
        self._alike: dict[_Settings, list[int]] = {}  # layers with the same settings share a regression
        for number, module in enumerate(group.modules):
            self._alike.setdefault(settings(module), []).append(number)
        columns, device = self._inputs + self._has_bias, self._weights[0].device
        empty = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._moments = {of: empty.clone() for of in self._alike}
        self._errors = {
            of: empty.new_zeros(sum(self._outputs[number] for number in members), columns)
            for of, members in self._alike.items()
        }

    def add(self, expert: int, moment: Tensor, error: Tensor, count: int) -> None:
        """Add the sums of a model's `count` tokens, see `_Comparison.products`."""
        columns = self._inputs + self._has_bias
        by_layer = torch.split(error[:, :columns], self._outputs)
        for of, members in self._alike.items():
            share = of.lambdas[expert] / sum(of.lambdas) / count
            self._moments[of].add_(moment[:columns, :columns], alpha=share)
            self._errors[of].add_(torch.cat([by_layer[number] for number in members]), alpha=share)

    def step(self) -> dict[str, Tensor]:
        """Change the layers in place, and return their changes; nothing changes where there was no token."""
        changes = {}
        for of, members in self._alike.items():
            if not bool(self._moments[of].any()):
                continue
            step_of_all = ridge_step(self._moments[of], self._errors[of], of.hold).float()
            steps = torch.split(step_of_all, [self._outputs[number] for number in members])
            for number, step in zip(members, steps, strict=True):
                module, change = self.group.modules[number], step[:, : self._inputs]
                changes[f"{module}.weight"] = change.T if module in self.group.transposed else change
                self._weights[number].add_(change)
                bias = self._biases[number] if self._has_bias else None
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
        self, expert: Expert, merged: nn.Module, stacks: Sequence[Sequence[str]], precision: Precision, keeping: int
    ) -> None:
        loaded = expert.loaded
        self.expert = expert
        self._own = dict(loaded.model.named_parameters())
        self._merged = merged
        self._batches = list(collate(plan_batches(expert.examples), loaded.padding, loaded.device))
        padded = list(accumulate(max(map(math.prod, batch.shapes)) for batch in self._batches))
        self._kept = range(sum(tokens <= keeping for tokens in padded))
        self.tokens_kept = padded[len(self._kept) - 1] if self._kept else 0
        self._theirs, self._ours = (
            _Run(
                model,
                loaded.kind,
                stacks,
                self._batches,
                precision,
                loaded.device,
                self._kept,
            )
            for model in (loaded.model, merged)
        )
        self._shown: dict[tuple[str, int], Tensor] = {}
        """What the expert's layers read or give, by the group's input and the number of the batch."""
        self._routed: dict[int, Tensor] = {}
        """What all experts of a mixture in its present layer read, (tokens, width), alike."""

    def enter(self, layer: int | None, groups: Sequence[LinearGroup]) -> None:
        """Go on to the next layer, which has these groups; None: past the last layer."""
        for run in (self._theirs, self._ours):
            run.enter(layer, groups)
        self._routed.clear()
        for number in self._kept:
            self._show(number, groups, whole=layer is not None)

    def _show(self, number: int, groups: Sequence[LinearGroup], whole: bool = False) -> None:
        asked = {group.input: group for group in groups if group.expert is None}
        experts = next((group for group in groups if group.expert is not None), None)
        if experts is not None and experts.router is not None:
            routed = replace(experts, reader=experts.router, modules=(experts.router,), expert=None)
            asked[experts.input] = routed
        for group, seen in zip(asked.values(), self._theirs.seen(number, [*asked.values()], whole), strict=True):
            if experts is not None and group.input == experts.input:
                self._routed[number] = seen.x
            else:
                self._shown[group.input, number] = seen.x if self._is_by_inputs(group) else seen.outputs()

    def count(self, group: LinearGroup) -> int:
        """Return the number of the group's inputs on all rows: tokens without padding, or, for the pooler, rows."""
        return sum(int(_counted(batch, group).sum()) for batch in self._batches)

    def samples(self, groups: Sequence[LinearGroup]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield for each batch and group the inputs x of the merge's layers, (tokens, width), and what is off of these.

        These are the errors of the outputs, (tokens, outputs), with the group's layers side by side: the expert's minus
        the merge's. Where outputs are more than inputs, it is the difference of the inputs, (tokens, width). Both are
        float32, without padding. The layers of a mixture's expert read the tokens that the merge routes to it, and
        what they are compared with is what the same expert of the other model makes of the same tokens there,
        wherever these are routed.

        Args:
            groups: one group, or several of experts.
        """
        for number, batch in enumerate(self._batches):
            if number not in self._kept:
                self._show(number, groups)
            found = []
            for group, ours in zip(groups, self._ours.seen(number, groups), strict=True):
                by_inputs = self._is_by_inputs(group)
                if group.expert is None:
                    theirs = self._shown.pop((group.input, number))
                else:
                    theirs = self._theirs.read_by_expert(group, self._routed[number][ours.places])
                    theirs = theirs if by_inputs else self._theirs.outputs(group, theirs)
                e = theirs - (ours.x if by_inputs else ours.outputs())
                self._check_finite(group, batch, ours.places, ours.x, e)
                found.append((ours.x, e))
            if number not in self._kept:
                self._routed.pop(number, None)
            yield found

    def _check_finite(self, group: LinearGroup, batch: Batch, places: Tensor, x: Tensor, e: Tensor) -> None:
        """Raise NumericalError, which names the row, where a token at one of `places` is NaN or infinite."""
        finite = torch.isfinite(x.sum(-1) + e.sum(-1))  # NaN and infinity stay in a sum
        if not bool(finite.all()):
            row = int(_counted(batch, group).nonzero()[places[~finite]][0, 0])
            what = f"what {group.input} reads or gives"
            raise not_finite(what, batch.places[batch.row_of(row)], self.expert.source)

    def distance(self, group: LinearGroup) -> float:
        """Return the mean square of what is off in a group of `samples`, over tokens."""
        sums, tokens = 0.0, 0
        for [(_, e)] in self.samples([group]):
            sums += float(e.square().sum(dtype=torch.float64))
            tokens += len(e)
        return sums / tokens

    def products(self, groups: Sequence[LinearGroup]) -> list[tuple[Tensor, Tensor]]:
        """Sum `x x^T` and `e x^T` over all rows: (width + 1, width + 1) and (outputs, width + 1), float64, by group.

        x are the inputs of the merge's layers, augmented by 1, and e the errors of their outputs. With `W` and `x` the
        augmented weights and inputs of the expert, and `V` and `z` those of the merge, `e = W (x - z) + (W - V) z`.
        """
        products: list[_Products] = []
        for batch in self.samples(groups):
            products = products or [_Products(x.shape[1], e.shape[1], x.device) for x, e in batch]
            for of_group, (x, e) in zip(products, batch, strict=True):
                of_group.add(x, e)
        if not products:
            raise ValueError(f"{self.expert.source} has no rows")
        found = []
        for group, of_group in zip(groups, products, strict=True):
            moment, error = of_group.sums()
            if self._is_by_inputs(group):
                merged = dict(self._merged.named_parameters())
                theirs, ours = (_augmented(own, group) for own in (self._own, merged))
                error = theirs[:, :-1] @ error + (theirs - ours) @ moment
            found.append((moment, error))
        return found

    def _is_by_inputs(self, group: LinearGroup) -> bool:
        """Return whether the difference of inputs stands for that of outputs, because it is narrower."""
        shapes = [_matrix(self._merged, module, module in group.transposed).shape for module in group.modules]
        return not group.is_added and sum(outputs for outputs, _ in shapes) > shapes[0][1]


class _SharedComparison(_Comparison):
    """A comparison of models that run one layer several times. A group's tokens are those of all uses."""

    def samples(self, groups: Sequence[LinearGroup]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield inputs and what is off, as `_Comparison.samples`, of one group."""
        [group] = groups
        for number, batch in enumerate(self._batches):
            ours, theirs = (run.read_in_all_uses(number, group) for run in (self._ours, self._theirs))
            x = ours[group.reader]
            if group.norm:
                e = theirs[group.norm] - ours[group.norm]
            elif self._is_by_inputs(group):
                e = theirs[group.reader] - x
            else:
                e = self._theirs.outputs(group, theirs[group.reader]) - self._ours.outputs(group, x)
            tokens = int(_counted(batch, group).sum())
            self._check_finite(group, batch, torch.arange(len(x), device=x.device) % tokens, x, e)
            yield [(x, e)]


@dataclass(frozen=True)
class _Seen:
    """What a group of layers reads, (tokens, width), and gives; float32, without padding."""

    x: Tensor
    places: Tensor
    """Places of these tokens among all that count."""
    outputs: Callable[[], Tensor]
    """Gives (tokens, outputs): the residual sum where the layers are added to one, else their outputs side by side."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Beside:
    """What a block gives beside the hidden states."""

    count: int | None = None
    """Number of further values in a tuple; None: it gives no tuple."""
    is_computed: bool = False
    """Whether any of these is a tensor, which the blocks after it may read."""

    @classmethod
    def of(cls, given: Any) -> "_Beside":
        """Return what there is beside the hidden states in a block's output."""
        if not isinstance(given, tuple):
            return cls()
        return cls(len(given) - 1, any(isinstance(value, Tensor) for value in given[1:]))


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return _Call(args, kwargs)


class _Run:
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
        self._finished: dict[int, list[_Finished]] = {}  # alike: what need not be computed again in the present layer
        self._arguments: dict[int, _Call] = {}  # alike: those of the present layer besides the hidden states
        self._ended: dict[int, list[Tensor]] = {}  # alike: outputs of stacks whose last layer is behind
        self._beside = _Beside()

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
                held = sum(value.numel() for value in _tensors((*others, *call.kwargs.values())))
                if number in self._kept and held <= self._hidden[number].numel():
                    self._arguments[number] = _Call(tuple(others), call.kwargs)
        self._layer, self._groups = layer, groups

    def enter_with(self, other: "_Run") -> None:
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
        counted = _counted(self._batches[number], group)
        modules = [self._model.get_submodule(path) for path in paths]

        def selected(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return _selected(args[0], counted)[0]

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
                outputs = batch.of_outputs(self._kind.run(inputs)).float()
            # Of normalised outputs the squares, or the values themselves, have the same sum whatever is read.
            uneven = torch.linspace(1, 2, outputs.shape[-1], device=outputs.device)
            [gradient] = torch.autograd.grad((outputs * uneven).sum(), hidden)
        return gradient.abs().sum(-1)[batch.counted] > 0

    def forget(self) -> None:
        """Compute the present layer's output anew, because the layer has changed."""
        self._given.clear()

    def seen(self, number: int, groups: Sequence[LinearGroup], whole: bool = False) -> list[_Seen]:
        """Return what groups of the present layer read and give in a batch.

        Args:
            whole: keep the layer's output too.
        """
        batch = self._batches[number]
        counted = {path: _counted(batch, group) for group in groups for path in (group.reader, group.norm) if path}
        paths, modules = list(counted), [self._model.get_submodule(path) for path in counted]
        by_module = dict(zip(modules, counted.values(), strict=True))

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Selected:
            return _selected(args[0], by_module[module], module)

        if groups[0].layer is None:
            read_by = dict(zip(paths, self._reach(number, None, modules, read), strict=True))
        else:
            read_by = dict(zip(paths, self._passed(number, groups, modules, read, whole), strict=True))
        found = []
        for group in groups:
            x, places = read_by[group.reader]
            total = _selected(self._given[number], _counted(batch, group))[0] if group.ends_block else None
            if group.norm:
                total = read_by[group.norm][0]
            outputs = partial(self.outputs, group, x) if total is None else partial(_same, total)
            found.append(_Seen(x, places, outputs))
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
                weight = _matrix(self._model, module, module in group.transposed)
                found.append(linear(x, weight, _bias(self._model, module)).float())
        return torch.cat(found, dim=-1)

    def read_in_all_uses(self, number: int, group: LinearGroup) -> dict[str, Tensor]:
        """Return what the reader and the norm of a group read in a pass of the whole model, one use after another.

        These are (uses * tokens, width), float32, without padding, by path.
        """
        counted = _counted(self._batches[number], group)
        seen: dict[str, list[Tensor]] = {path: [] for path in (group.reader, group.norm) if path}

        def keep(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path].append(_selected(args[0], counted)[0])

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
        read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], _Selected],
        whole: bool,
    ) -> list[_Selected]:
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
        self._beside = _Beside.of(given)
        hidden: Tensor = given[0] if isinstance(given, tuple) else given
        return hidden

    def _block(self, number: int) -> tuple[nn.Module, _Call]:
        """Return the present block, and its call with the arguments that the model gives it, such as its own mask."""
        if self._layer is None:
            raise ValueError("no layer was entered")
        block = self._blocks[self._layer]
        call = self._arguments.get(number)
        if call is None:
            [whole] = self._reach(number, self._layer, [block], _called)
            call = _Call(whole.args[1:], whole.kwargs)
        return block, _Call((self._hidden[number], *call.args), call.kwargs)

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
        with self._computing(), ExitStack() as giving:
            for blocks, hidden in zip(self._stacks, ended, strict=False):
                giving.enter_context(_giving(blocks, hidden, _Beside(self._beside.count)))
            present = self._stacks[len(ended)][:behind]
            giving.enter_context(_giving(present, self._hidden.get(number), self._beside))
            return _first_calls(partial(self._model, **arguments), modules, read)


def _selected(values: Tensor, counted: Tensor, module: nn.Module | None = None) -> _Selected:
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


def _counted(batch: Batch, group: LinearGroup) -> Tensor:
    """Mark the inputs of a batch that count: (batch, tokens), no padding; for the pooler, (batch,), the first token."""
    is_text = batch.counted_in_decoder if group.reads_decoder else batch.counted
    return is_text[:, 0] if group.layer is None else is_text


class _AllCalled(Exception):
    """The rest of the pass is not needed."""


def _first_calls(
    run: Callable[[], object],
    modules: Sequence[nn.Module],
    read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Read],
    stops: bool = True,
) -> list[Read]:
    """Return what `read` makes of the first call of each module while `run` runs.

    Args:
        stops: stop it once all have been called.
    """
    calls: dict[nn.Module, Read] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = read(module, args, kwargs)
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
def _giving(blocks: Sequence[nn.Module], hidden: Tensor | None, beside: _Beside) -> Iterator[None]:
    """Let the last of these blocks give `hidden`, with what blocks give beside it, and those before what they read.

    What the first block computes for all others, as T5's biases of positions, it computes; the others give that on.
    """
    shared: list[Any] = [None] * (beside.count or 0)

    def give(given: Tensor | None, forward: Callable[..., Any] | None, read: Tensor, *args: Any, **kwargs: Any) -> Any:
        if forward is not None:
            shared[:] = forward(read, *args, **kwargs)[1:]
        output = read if given is None else given
        return output if beside.count is None else (output, *shared)

    for number, block in enumerate(blocks, start=1):
        computes = number == 1 and beside.is_computed
        block.forward = partial(give, hidden if number == len(blocks) else None, block.forward if computes else None)
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
