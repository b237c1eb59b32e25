"""Layer alignment: linear layers are refitted, in the order in which they run, to their real inputs in a merge.

A layer that was merged for the experts' inputs does not get them: the layers before it were merged too, and errors add
up with depth. Here each layer is fitted to the inputs that the merged layers before it give. Where its output is added
to a residual, it also corrects the error of the residual.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor, nn

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.memory import most_tokens_kept
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, values_at
from worker.engine.merging.refits.comparison import Comparison, Expert, SharedComparison
from worker.engine.merging.refits.linear_groups import LinearGroup, linear_groups, matrix_of, stacks_of
from worker.engine.merging.refits.regression import LayerSettings, Regression
from worker.engine.runtime.device import Precision, rounded_weights

TURNS = 2  # of the groups of a layer that is run several times; later ones gained next to nothing
LEAST_SHARE = 1 / 8  # of a step there
SUMS_BYTES = 500_000_000  # of sums over tokens that are held at once, for experts


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

    def settings(module: str) -> LayerSettings:
        place = places[f"{module}.weight"]
        lambdas = tuple(values_at((expert.weight for expert in experts), place, DEFAULT_WEIGHT))
        return LayerSettings(lambdas, parameters.at("hold", place))

    keeping = most_tokens_kept(family.size(plan.checkpoints[0].config, "hidden"))
    changes: dict[str, Tensor] = {}
    with torch.inference_mode(), ExitStack() as stack:
        comparison_of = SharedComparison if family.shares_layers else Comparison
        comparisons: list[Comparison] = []
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
                changes |= refit_groups(at_once, comparisons, merged, settings)
                for _ in at_once:
                    on_group()
    return changes


def _align_shared(
    groups: Sequence[LinearGroup],
    comparisons: Sequence[Comparison],
    merged: nn.Module,
    settings: Callable[[str], LayerSettings],
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
            step, taken = refit_groups([group], comparisons, merged, settings), 1.0
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
        changes |= refit_groups([group], comparisons, merged, settings)
        on_group()
    return changes


def _at_once(groups: Sequence[LinearGroup], merged: nn.Module) -> Iterator[Sequence[LinearGroup]]:
    """Yield groups of a layer that are refitted at once: experts do not read what others give, up to `SUMS_BYTES`."""
    for is_of_expert, alike in groupby(groups, key=lambda group: group.expert and group.input.rpartition(".")[2]):
        members = list(alike)
        outputs, inputs = matrix_of(merged, members[0].reader, members[0].reader in members[0].transposed).shape
        size = 8 * (inputs + 1) * (inputs + outputs * len(members[0].modules))
        most = max(1, SUMS_BYTES // size) if is_of_expert else 1
        yield from (members[start : start + most] for start in range(0, len(members), most))


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


def refit_groups(
    groups: Sequence[LinearGroup],
    comparisons: Sequence[Comparison],
    merged: nn.Module,
    settings: Callable[[str], LayerSettings],
) -> dict[str, Tensor]:
    regressions = [Regression(group, merged, settings) for group in groups]
    for number, comparison in enumerate(comparisons):
        for regression, sums in zip(regressions, comparison.products(groups), strict=True):
            regression.add(number, *sums, comparison.count(regression.group))
    return {name: change for regression in regressions for name, change in regression.step().items()}
