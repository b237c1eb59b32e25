"""Computes Gram matrices of the inputs of a model's linear layers, over its rows' tokens.

They come from forward passes of their own, or from those that another statistic runs over the same rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.catalog.methods import GRAM
from worker.engine.catalog.methods.regmean import GRAM_BYTES
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.models.experts import RoutedLinear
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.measurement import Measured, Measurement, StatisticPass
from worker.engine.scoring.scorer import Watching, not_finite

TILE = 96
"""Rows of a Gram matrix that are multiplied at once. What is left of their diagonal tile follows by symmetry."""


def in_passes(inputs: Sequence[LinearInput], budget_bytes: int = GRAM_BYTES) -> list[list[LinearInput]]:
    """Cut the inputs into runs whose matrices, in float64, are held at once. Each run takes one pass over the rows."""
    passes: list[list[LinearInput]] = []
    held = 0
    for one in inputs:
        size = 8 * one.width**2
        if not passes or held + size > budget_bytes:
            passes.append([])
            held = 0
        passes[-1].append(one)
        held += size
    return passes


def grams(
    loaded: LoadedModel,
    inputs: Sequence[LinearInput],
    batches: Iterable[Sequence[Example]],
    precision: Precision,
    source: str,
    on_rows: OnRows,
) -> dict[str, Tensor]:
    """Compute `G = 1/n sum x x^T` over the n non-padding tokens of all rows (Jin et al. 2023, arXiv 2212.09849, 3).

    An input that is read once a row, such as the pooler's first token, has one `x` a row. That of a layer that is run
    several times has one for each use. That of an expert has those of the tokens that are routed to it, and the matrix
    is zero if there are none. Products of a batch are float32, and their sum is float64.

    Args:
        batches: rows that are computed together.

    Returns:
        Gram matrices by name of the input, (width, width), float32.

    Raises:
        NumericalError: an input is NaN or infinite; the message names the row.
    """
    with GramSums(loaded, inputs, source, stops=True) as sums, torch.inference_mode():
        for batch in collate(batches, loaded.padding, loaded.device):
            with computing_in(precision, loaded.device), sums.watching(batch), suppress(_AllSeen):
                loaded.model(**loaded.kind.arguments(batch.inputs))
            on_rows(len(batch))
        return sums.means()


class _AllSeen(Exception):
    """All inputs were seen, so the rest of the forward pass, or of the layer that runs again, is not needed."""


class GramSums:
    """Sums of `x x^T` over the inputs of modules in forward passes, while in context.

    Where a pass computes the last layer for some tokens alone (`Family.narrowing`), that layer runs once more without
    gradients, for all tokens. That changes nothing in the pass itself.

    Args:
        stops: whether a pass ends, by `_AllSeen`, once all inputs were seen; then no pass narrows.
    """

    def __init__(self, loaded: LoadedModel, inputs: Sequence[LinearInput], source: str, *, stops: bool) -> None:
        model, device = loaded.model, loaded.device
        self._totals = {i.name: torch.zeros(i.width, i.width, dtype=torch.float64, device=device) for i in inputs}
        self._counts = dict.fromkeys(self._totals, 0)
        self._source, self._stops = source, stops
        self._batch: Batch | None = None
        self._counted: dict[bool, Tensor] = {}
        self._all_uses = sum(i.uses for i in inputs)
        self._unseen = 0
        self._narrowed = "" if stops else _narrowed_layer(loaded)
        self._calls: Counter[nn.Module] = Counter()
        self._is_again = False
        self._handles = [model.get_submodule(i.module).register_forward_pre_hook(self._seer(i)) for i in inputs]
        narrowed = [i.uses for i in inputs if self._is_narrowed(i)]
        self._unseen_again = self._all_narrowed = len(narrowed)
        if narrowed:
            layer = model.get_submodule(self._narrowed.removesuffix("."))
            self._handles.append(layer.register_forward_hook(self._repeater(max(narrowed)), with_kwargs=True))

    def __enter__(self) -> "GramSums":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """See one forward pass over a batch, while in context; other passes are not seen."""
        self._batch, self._unseen = batch, self._all_uses
        self._counted.clear()
        self._calls.clear()
        try:
            yield
        finally:
            self._batch = None
        if self._unseen:
            raise RuntimeError(f"{self._unseen} of {self._all_uses} uses of modules were not run")

    def means(self) -> dict[str, Tensor]:
        """Return the Gram matrices by name of the input, float32, on the CPU."""
        totals, counts = self._totals, self._counts
        return {name: _mirrored((total / max(1, counts[name])).float()).cpu() for name, total in totals.items()}

    def _is_narrowed(self, seen: LinearInput) -> bool:
        return bool(self._narrowed) and seen.module.startswith(self._narrowed)

    def _seer(self, seen: LinearInput) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._batch is None:
                return
            if self._is_narrowed(seen) and not self._is_again:
                self._calls[module] += 1
                if self._calls[module] == seen.uses:
                    return
            with torch.no_grad():
                tokens = module.tokens if isinstance(module, RoutedLinear) else None
                self._see(seen, inputs[0], self._batch, tokens)
            self._unseen -= 1
            if self._is_again:
                self._unseen_again -= 1
            if (self._stops and not self._unseen) or (self._is_again and not self._unseen_again):
                raise _AllSeen

        return before

    def _repeater(self, uses: int) -> Callable[..., None]:
        """Return a hook that runs a layer again after its last use, with all tokens, as far as there are inputs."""

        def after(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], _: object) -> None:
            if self._batch is None or self._is_again:
                return
            self._calls[module] += 1
            if self._calls[module] == uses:
                self._is_again, self._unseen_again = True, self._all_narrowed
                try:
                    with torch.no_grad(), suppress(_AllSeen):
                        module(*inputs, **named)
                finally:
                    self._is_again = False

        return after

    def _see(self, of: LinearInput, x: Tensor, batch: Batch, tokens: Tensor | None) -> None:
        """Add `x`, (batch, tokens, width) or (batch * tokens, width), or (batch, width) if it is read once a row.

        Args:
            tokens: places in the batch of the tokens that `x` has, (tokens, width), see `RoutedLinear`; None: all.
        """
        name, is_text = of.name, batch.counted_in_decoder if of.of_decoder else batch.counted
        if of.of_decoder not in self._counted:
            self._counted[of.of_decoder] = is_text.flatten().nonzero()[:, 0]
        if tokens is not None:
            counted = is_text.flatten()[tokens]
            places, x = tokens[counted], x[counted]
        elif x.dim() == 3 or len(x) == is_text.numel():
            places, x = self._counted[of.of_decoder], x.reshape(is_text.numel(), -1)
            if len(places) < len(x):
                x = x.index_select(0, places)
        else:
            places = torch.arange(0, is_text.numel(), is_text.shape[1], device=x.device)
        x = x.float()  # (tokens, width); `places` has each token's place in the flattened batch
        total = self._totals[name]
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(total), TILE):
                total[start : start + TILE, start:] += x[:, start : start + TILE].T @ x[:, start:]
        if not bool(torch.isfinite(total.diagonal()).all()):  # each has a column's squares, so that one check is enough
            sizes = x.abs().amax(-1)
            worst = int(torch.where(sizes.isfinite(), sizes, torch.inf).argmax())
            raise not_finite(
                f"the input of {name}", batch.places[batch.row_of(int(places[worst]) // is_text.shape[1])], self._source
            )
        self._counts[name] += len(x)


def _narrowed_layer(loaded: LoadedModel) -> str:
    """Return the prefix of the names in the layer that is computed for some tokens alone; empty if there is none."""
    family, config = loaded.family, loaded.info.config
    return family.layer_path(family.size(config, "layers") - 1) if family.narrowing(config) else ""


def _mirrored(upper: Tensor) -> Tensor:
    """Make a matrix symmetric, in its place, by what is on and above the diagonal."""
    below = upper.triu_().triu(1).T
    return upper.add_(below)


def _measure(work: Measurement, measured: Measured) -> Measured:
    passes = in_passes(work.inputs)
    return work.find_or_compute(measured, work.facts(GRAM, work.rows), _parts(work, passes, work.on_rows), len(passes))


def _parts(
    work: Measurement, passes: Sequence[Sequence[LinearInput]], on_rows: OnRows
) -> Iterator[Mapping[str, Tensor]]:
    for inputs in passes:
        blocks = work.sample.blocks(0, work.rows)
        batches = (batch for block in blocks for batch in plan_batches(block))
        yield grams(work.loaded, inputs, batches, work.precision, work.sample.source, on_rows)


@contextmanager
def _beside(work: Measurement) -> Iterator[Watching]:
    """Take the first pass's matrices from forward passes that another statistic runs, and keep all of them then."""
    facts = work.facts(GRAM, work.rows)
    with work.store.alone_with(facts, lambda: work.on_rows(0)):
        if work.store.get(facts) is not None:
            yield lambda _: nullcontext()
            return
        first, *others = in_passes(work.inputs)
        with GramSums(work.loaded, first, work.sample.source, stops=False) as sums:
            yield sums.watching
        parts = chain([sums.means()], _parts(work, others, lambda _: work.on_rows(0)))
        work.store.put(facts, work.origin(work.rows), parts)


PASS = StatisticPass(
    _measure,
    facts=lambda subject, rows: subject.facts(GRAM, rows),
    passes=lambda inputs: len(in_passes(inputs)),
    beside=_beside,
)
