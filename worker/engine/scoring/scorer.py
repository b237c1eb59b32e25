"""Scores a model's mask nodes over a data set's rows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from worker.engine.catalog.families import ScoreName, Site
from worker.engine.catalog.methods.mask_fisher import PAPER_BATCH_ROWS
from worker.engine.catalog.primitives.errors import NumericalError, Place
from worker.engine.inputs.examples import Batch, Example, collate, plan_batches
from worker.engine.models.loading import LoadedModel
from worker.engine.models.mask_gradients import MaskGradients
from worker.engine.runtime.device import Precision, computing_in, rounded_weights
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.estimators import Estimator, expected_squares
from worker.engine.scoring.statistics import NodeStatistics

Watching = Callable[[Batch], AbstractContextManager[None]]
"""Takes another statistic's sums from the one forward pass, over this batch, that runs while in context."""


def sites_of(loaded: LoadedModel) -> list[Site]:
    return list(loaded.family.sites(loaded.info.config))


def score_names(loaded: LoadedModel) -> list[ScoreName]:
    return [score for site in sites_of(loaded) for score in site.counts]


def score(
    loaded: LoadedModel,
    examples: Sequence[Example],
    estimator: Estimator,
    precision: Precision,
    source: str,
    on_rows: OnRows,
    batches: Sequence[Sequence[Example]] | None = None,
    watching: Sequence[Watching] = (),
) -> NodeStatistics:
    """Sum each example's squared mask gradients.

    `F_i = 1/n sum_x q_x,i` (METHOD: per-example squares, Kwon et al. 2022, arXiv 2204.09656, section 3.2, with the
    expectation over labels). They do not depend on batch size, order and padding; sums are float64.

    Args:
        batches: rows that are computed together; planned by token budget when absent.
        watching: further statistics, whose sums are taken from the same forward passes.

    Raises:
        NumericalError: a gradient is NaN or infinite; the message names the row.
    """
    groups = [batches or plan_batches(examples)]
    [statistics] = score_each(loaded, groups, estimator, precision, source, on_rows, watching)
    return statistics


def score_each(
    loaded: LoadedModel,
    groups: Sequence[Sequence[Sequence[Example]]],
    estimator: Estimator,
    precision: Precision,
    source: str,
    on_rows: OnRows,
    watching: Sequence[Watching] = (),
) -> list[NodeStatistics]:
    """Sum the squares of each group of batches by itself, in order; see `score`. A group may have no batch."""
    found = []
    with rounded_weights(loaded.model, precision), mask_gradients(loaded) as gradients:
        for batches in groups:
            found.append(statistics := NodeStatistics())
            for batch in collate(batches, loaded.padding, loaded.device):
                with computing_in(precision, loaded.device), ExitStack() as watched:
                    for watch in watching:
                        watched.enter_context(watch(batch))
                    outputs = loaded.kind.run(batch.inputs)
                with computing_in(precision, loaded.device):
                    passes = estimator.passes(loaded, outputs, batch)
                squares = expected_squares(passes, gradients, batch)
                _check_finite(squares, batch, source)
                statistics.add(squares)
                on_rows(len(batch))
    return found


def paper_scores(
    loaded: LoadedModel, examples: Sequence[Example], source: str, on_rows: OnRows
) -> dict[ScoreName, Tensor]:
    """Compute the published code's scores: the squared gradient of each batch's mean loss, summed over batches.

    Batches have 32 rows in the data set's order and are padded to their longest row; the last one may be smaller. All
    is float32. The loss is the model's own, see `HeadKind.loss_per_likelihood`.
    """
    empirical = Estimator("empirical")
    ordered = [examples[i : i + PAPER_BATCH_ROWS] for i in range(0, len(examples), PAPER_BATCH_ROWS)]
    totals: dict[ScoreName, Tensor] = {}
    with mask_gradients(loaded) as gradients:
        for batch in collate(ordered, loaded.padding, loaded.device):
            _, [likelihood] = empirical.passes(loaded, loaded.kind.run(batch.inputs), batch)
            by_example = {site: batch.by_row(g) for site, g in gradients.of(likelihood, last=True).items()}
            _check_finite(by_example, batch, source)
            factor = loaded.kind.loss_per_likelihood(batch)
            for site, g in by_example.items():
                totals[site] = totals.get(site, torch.zeros(())) + (factor * g.mean(0).cpu()) ** 2
            on_rows(len(batch))
    return totals


def mask_gradients(loaded: LoadedModel) -> MaskGradients:
    family, config = loaded.family, loaded.info.config
    return MaskGradients(loaded.model, sites_of(loaded), family.narrowing(config), family.size(config, "uses"))


def _check_finite(values: dict[ScoreName, Tensor], batch: Batch, source: str) -> None:
    for site, value in values.items():
        finite = torch.isfinite(value.sum(-1))  # NaN and infinity stay in a sum
        if not bool(finite.all()):
            raise not_finite(f"the gradient of {site}", batch.places[int((~finite).nonzero()[0])], source)


def not_finite(what: str, place: Place, source: str) -> NumericalError:
    return NumericalError(
        f"{what} is NaN or infinite at {source}, {place}; try precision float32",
        source=source,
        **{place.unit: place.number},
    )
