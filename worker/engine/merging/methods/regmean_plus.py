"""`regmean_plus`, see its catalog entry: the block of each model reads what the merged blocks before it give."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from worker.engine.catalog.methods import MethodParameters, RegMeanPlusParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.merging.methods.average import average
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.methods.regmean import regress
from worker.engine.merging.refits.block_refits import Pair, lambdas_at, refit_blocks
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.refits.linear_groups import LinearGroup
from worker.engine.merging.refits.regression import Products
from worker.engine.runtime.device import Precision


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    return average(models)


def refit(
    plan: MergePlan,
    start: Mapping[str, Tensor],
    experts: Sequence[Expert],
    parameters: MethodParameters,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    if not isinstance(parameters, RegMeanPlusParameters):
        raise TypeError(f"parameters of regmean_plus expected, got {type(parameters).__name__}")
    return refit_blocks(plan, start, experts, precision, on_group, partial(_block, plan, parameters))


def _block(
    plan: MergePlan,
    parameters: RegMeanPlusParameters,
    groups: Sequence[LinearGroup],
    pairs: Sequence[Pair],
    merged: nn.Module,
) -> dict[str, Tensor]:
    """Solve for the linear layers of a block."""
    measured = [MeasuredModel(1.0, grams=_grams(groups, pair)) for pair in pairs]
    places = {tensor.slot.name: tensor.place for tensor in plan.backbone}
    found = {}
    for group in groups:
        for module in group.modules:
            name, transposed = f"{module}.weight", module in group.transposed
            weights_of = [pair.own[name].T if transposed else pair.own[name] for pair in pairs]
            versions = [weight.detach().float().cpu() for weight in weights_of]
            place = places[name]
            weights = lambdas_at([pair.expert for pair in pairs], place)[:, None]
            shrink, ridge = parameters.at("shrink", place), parameters.at("ridge", place)
            solved = regress(group.input, versions, measured, weights, shrink, ridge)
            found[name] = solved.T if transposed else solved
    return found


def _grams(groups: Sequence[LinearGroup], pair: Pair) -> dict[str, Tensor]:
    """Return the mean of `x x^T` for each group, x what the expert's own layer reads, (inputs, inputs)."""
    pair.ours.enter(groups[0].layer, groups)
    pair.theirs.enter_with(pair.ours)
    sums: dict[str, Products] = {}
    for number in range(pair.batches):
        read = pair.theirs.read(number, groups[0], [group.reader for group in groups])
        for group in groups:
            x = read[group.reader]
            sums.setdefault(group.input, Products(x.shape[1], 0, x.device)).add(x, x[:, :0])
        pair.theirs.forget()
    found = {}
    for name, products in sums.items():
        moment, _ = products.sums()
        found[name] = (moment[:-1, :-1] / moment[-1, -1]).float().cpu()
    return found
