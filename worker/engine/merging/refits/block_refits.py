"""Runs experts and a merge side by side, block by block, for methods that refit all layers of a block at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, TensorPlace, values_at
from worker.engine.inputs.examples import collate, plan_batches
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.refits.layer_alignment import model_of
from worker.engine.merging.refits.linear_groups import LinearGroup, linear_groups, stacks_of
from worker.engine.merging.refits.runs import Run
from worker.engine.runtime.device import Precision, rounded_weights


@dataclass(frozen=True)
class Pair:
    """An expert and the merge, in the same block on the same batches of the expert's rows."""

    expert: Expert
    own: Mapping[str, Tensor]
    """The expert's parameters by name, as they are without rounding for passes."""
    theirs: Run
    ours: Run
    batches: int


@contextmanager
def pairs_of(
    plan: MergePlan, experts: Sequence[Expert], merged: nn.Module, precision: Precision
) -> Iterator[list[Pair]]:
    """Make a pair of each expert and the merge; meanwhile experts' weights are held in `precision`."""
    with ExitStack() as stack:  # weights that are rounded in inference mode could not be differentiated through
        pairs = []
        for expert in experts:
            loaded = expert.loaded
            own = dict(loaded.model.named_parameters())
            stack.enter_context(rounded_weights(loaded.model, precision))
            batches = list(collate(plan_batches(expert.examples), loaded.padding, loaded.device))
            theirs, ours = (
                Run(model, loaded.kind, stacks_of(plan), batches, precision, loaded.device, ())
                for model in (loaded.model, merged)
            )
            pairs.append(Pair(expert, own, theirs, ours, len(batches)))
        with torch.inference_mode():
            yield pairs


def refit_blocks(
    plan: MergePlan,
    start: Mapping[str, Tensor],
    experts: Sequence[Expert],
    precision: Precision,
    on_group: Callable[[], None],
    refit: Callable[[list[LinearGroup], list[Pair], nn.Module], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return the backbone `start` with tensors that `refit` gives for each block, and for the pooler, in turn.

    Args:
        refit: returns new values by `Slot.name`. Runs are in the block, with the merge's inputs in both.
        on_group: called after each of `linear_groups`.
    """
    merged = model_of(start, experts)
    found: dict[str, Tensor] = dict(start)
    with pairs_of(plan, experts, merged, precision) as pairs:
        for _, of_layer in groupby(linear_groups(plan), key=lambda group: group.layer):
            groups = list(of_layer)
            new = refit(groups, pairs, merged)
            for name, values in new.items():
                merged.get_parameter(name).copy_(values)
                found[name] = values.float().cpu().contiguous()
            for pair in pairs:
                pair.ours.forget()
            for _ in groups:
                on_group()
    return found


def lambdas_at(experts: Sequence[Expert], place: TensorPlace) -> Tensor:
    """Return the experts' weights of one tensor, summing to 1, float64."""
    found = torch.tensor(values_at((expert.weight for expert in experts), place, DEFAULT_WEIGHT), dtype=torch.float64)
    return found / found.sum()
