"""Computes Gram matrices of the inputs of a model's linear layers, over its rows' tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

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
from worker.engine.scoring.scorer import not_finite


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
    examples: Sequence[Example],
    precision: Precision,
    source: str,
    on_rows: OnRows,
) -> dict[str, Tensor]:
    """Compute `G = 1/n sum x x^T` over the n non-padding tokens of all rows (Jin et al. 2023, arXiv 2212.09849, 3).

    An input that is read once a row, such as the pooler's first token, has one `x` a row. That of a layer that is run
    several times has one for each use. That of an expert has those of the tokens that are routed to it, and the matrix
    is zero if there are none. Products of a batch are float32, and their sum is float64.

    Returns:
        Gram matrices by name of the input, (width, width), float32.

    Raises:
        NumericalError: an input is NaN or infinite; the message names the row.
    """
    with _Sums(loaded, inputs, source) as sums, torch.inference_mode():
        for batch in collate(plan_batches(examples), loaded.padding, loaded.device):
            with computing_in(precision, loaded.device):
                sums.add(batch)
            on_rows(len(batch))
        return {name: (total / max(1, sums.counts[name])).float().cpu() for name, total in sums.totals.items()}


class _AllSeen(Exception):
    """All inputs were seen, so the rest of the forward pass is not needed."""


class _Sums:
    """Sums of `x x^T` over the inputs of modules in forward passes, while in context."""

    def __init__(self, loaded: LoadedModel, inputs: Sequence[LinearInput], source: str) -> None:
        model, device = loaded.model, loaded.device
        self.totals = {i.name: torch.zeros(i.width, i.width, dtype=torch.float64, device=device) for i in inputs}
        self.counts = dict.fromkeys(self.totals, 0)
        self._model, self._kind = model, loaded.kind
        self._source = source
        self._batch: Batch | None = None
        self._uses = sum(i.uses for i in inputs)
        self._unseen = 0
        self._handles = [model.get_submodule(i.module).register_forward_pre_hook(self._seer(i.name)) for i in inputs]

    def __enter__(self) -> "_Sums":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, batch: Batch) -> None:
        self._batch, self._unseen = batch, self._uses
        with suppress(_AllSeen):
            self._model(**self._kind.arguments(batch.inputs))
        if self._unseen:
            raise RuntimeError(f"{self._unseen} of {self._uses} uses of modules were not run")

    def _seer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._see(name, inputs[0], module.tokens if isinstance(module, RoutedLinear) else None)
            self._unseen -= 1
            if not self._unseen:
                raise _AllSeen

        return before

    def _see(self, name: str, x: Tensor, tokens: Tensor | None) -> None:
        """Add `x`, (batch, tokens, width) or (batch * tokens, width), or (batch, width) if it is read once a row.

        Args:
            tokens: places in the batch of the tokens that `x` has, (tokens, width), see `RoutedLinear`; None: all.
        """
        if self._batch is None:
            raise TypeError("no batch")
        batch = self._batch
        is_text = batch.counted
        rows = torch.arange(len(is_text), device=x.device)  # of the batch's sequences
        if tokens is not None:
            counted = is_text.flatten()[tokens]
            rows, x = rows[tokens[counted] // is_text.shape[1]], x[counted]
        elif x.dim() == 3 or len(x) == is_text.numel():
            rows = rows[:, None].expand_as(is_text)[is_text]
            x = x.reshape(*is_text.shape, -1)[is_text]
        x = x.float()  # (tokens, width); `rows` has each token's row
        finite = torch.isfinite(x).all(-1)
        if not bool(finite.all()):
            raise not_finite(f"the input of {name}", batch.places[batch.row_of(int(rows[~finite][0]))], self._source)
        with torch.autocast(x.device.type, enabled=False):
            product = x.T @ x
        self.totals[name] += product
        self.counts[name] += len(x)


def _measure(work: Measurement, measured: Measured) -> Measured:
    passes = in_passes(work.inputs)
    return work.find_or_compute(measured, work.facts(GRAM, work.rows), _parts(work, passes), len(passes))


def _parts(work: Measurement, passes: Sequence[Sequence[LinearInput]]) -> Iterator[Mapping[str, Tensor]]:
    examples = work.examples
    for inputs in passes:
        yield grams(work.loaded, inputs, examples, work.precision, work.sample.source, work.on_rows)


PASS = StatisticPass(_measure, lambda inputs: len(in_passes(inputs)))
