"""An expert and the merge side by side on the expert's rows: what the merge's layers read, and what is off of these."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from worker.engine.catalog.primitives.values import PerTensor
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.merging.refits.linear_groups import LinearGroup, augmented, matrix_of
from worker.engine.merging.refits.regression import Products
from worker.engine.merging.refits.runs import Run, counted_inputs
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.scoring.scorer import not_finite


@dataclass(frozen=True)
class Expert:
    """A model that takes part, and its rows, from the data set `source`."""

    loaded: LoadedModel
    weight: PerTensor[float]
    examples: Sequence[Example]
    source: str


class Comparison:
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
            Run(
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
        return sum(int(counted_inputs(batch, group).sum()) for batch in self._batches)

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
            row = int(counted_inputs(batch, group).nonzero()[places[~finite]][0, 0])
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
        products: list[Products] = []
        for batch in self.samples(groups):
            products = products or [Products(x.shape[1], e.shape[1], x.device) for x, e in batch]
            for of_group, (x, e) in zip(products, batch, strict=True):
                of_group.add(x, e)
        if not products:
            raise ValueError(f"{self.expert.source} has no rows")
        found = []
        for group, of_group in zip(groups, products, strict=True):
            moment, error = of_group.sums()
            if self._is_by_inputs(group):
                merged = dict(self._merged.named_parameters())
                theirs, ours = (augmented(own, group) for own in (self._own, merged))
                error = theirs[:, :-1] @ error + (theirs - ours) @ moment
            found.append((moment, error))
        return found

    def _is_by_inputs(self, group: LinearGroup) -> bool:
        """Return whether the difference of inputs stands for that of outputs, because it is narrower."""
        shapes = [matrix_of(self._merged, module, module in group.transposed).shape for module in group.modules]
        return not group.is_added and sum(outputs for outputs, _ in shapes) > shapes[0][1]


class SharedComparison(Comparison):
    """A comparison of models that run one layer several times. A group's tokens are those of all uses."""

    def samples(self, groups: Sequence[LinearGroup]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield inputs and what is off, as `Comparison.samples`, of one group."""
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
            tokens = int(counted_inputs(batch, group).sum())
            self._check_finite(group, batch, torch.arange(len(x), device=x.device) % tokens, x, e)
            yield [(x, e)]
