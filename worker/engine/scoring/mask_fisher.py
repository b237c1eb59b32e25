"""Scores mask nodes block by block, with the sums for their errors, so that more rows go on from fewer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from worker.engine.catalog.contracts.statistics import Facts
from worker.engine.catalog.methods import NODE_FISHER
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.runtime.device import rounded_weights
from worker.engine.scoring.batching import CANDIDATES
from worker.engine.scoring.measurement import Measured, Measurement, StatisticPass
from worker.engine.scoring.sample import block_ends, looks
from worker.engine.scoring.scorer import Watching, paper_scores, score, score_names
from worker.engine.scoring.statistics import STANDARD_ERROR, NodeStatistics


def _measure(work: Measurement, measured: Measured) -> Measured:
    measured = replace(measured, names=tuple(sorted(score_names(work.loaded))))
    if work.method.batch_rows is not None:
        return work.find_or_compute(measured, _facts(work, work.rows), _published(work))
    return _with_scores(work, measured)


def _published(work: Measurement) -> Iterator[Mapping[str, Tensor]]:
    """Yield the published code's scores, from batches of its own; they have no errors."""
    scores = paper_scores(work.loaded, work.examples, work.sample.source, work.on_rows)
    yield {str(name): of for name, of in scores.items()}


def _facts(work: Measurement, rows: int) -> Facts:
    more = {"population": work.sample.population, "paper": work.method.batch_rows is not None}
    return work.facts_of_gradients(NODE_FISHER, rows).model_copy(update=more)


def _with_scores(work: Measurement, measured: Measured) -> Measured:
    """Score the first rows. The longest run of whole blocks whose sums are known is not scored again.

    Every look is kept. If several processes need the same scores, one goes through the rows and the others wait for it.
    Where all rows are scored, further statistics are taken from the same forward passes.
    """
    found = _with_kept(work, measured)
    if found.scored_rows == work.rows:
        work.on_rows(found.scored_rows - measured.scored_rows)
        return found
    alone = work.store.alone_with(_facts(work, work.rows), lambda: work.on_rows(0))
    # Weights are rounded once here, and not anew for every block.
    with alone, rounded_weights(work.loaded.model, work.precision), ExitStack() as beside:
        found = _with_kept(work, found)
        known = found.scored_rows
        work.on_rows(known - measured.scored_rows)
        sums = NodeStatistics()
        tokens = 0
        watching: list[Watching] = []
        if known:
            sums.merge(found.sums[known])
        else:
            watching = [beside.enter_context(begin(work)) for begin in work.beside]
        for look in [look for look in looks(work.rows) if look > known]:
            for block in work.sample.blocks(sums.examples, look):
                if not tokens:
                    tokens = _tokens(work, found, block, work.rows - known)
                    are_all_alike = found.batch_tokens == tokens or not known
                    found = replace(found, batch_tokens=tokens if are_all_alike else None)
                sums.merge(_scored(work, block, tokens, watching))
            errors = sums.standard_errors(work.sample.population)
            named = {f"{site}{STANDARD_ERROR}": error for site, error in errors.items()}
            parts = [sums.scores() | named | sums.named()]
            kept = work.store.put(_facts(work, look), work.origin(look, found.batch_tokens), parts)
            found = replace(found.with_scores(look, kept), cached=False)
    return found


def _scored(work: Measurement, block: Sequence[Example], tokens: int, watching: Sequence[Watching]) -> NodeStatistics:
    batches = plan_batches(block, tokens)
    source = work.sample.source
    return score(work.loaded, block, work.required_estimator, work.precision, source, work.on_rows, batches, watching)


def _with_kept(work: Measurement, measured: Measured) -> Measured:
    """Add the longest run of whole blocks that is kept, and the looks before it.

    If the method sets the number of tokens in a batch, only sums that were computed with that number count as kept.
    """
    asked = work.method.asked_batch_tokens
    found = measured
    for end in reversed([end for end in block_ends(work.rows) if end > measured.scored_rows]):
        kept = work.store.get(_facts(work, end))
        if kept is not None and asked in (None, kept.about.origin.batch_tokens):
            found = replace(found.with_scores(end, kept), batch_tokens=kept.about.origin.batch_tokens)
            break
    sums = dict(found.sums)
    for look in [look for look in looks(found.scored_rows) if look > 0 and look not in sums]:
        kept = work.store.get(_facts(work, look))
        if kept is not None:
            sums[look] = NodeStatistics.from_named(look, found.names, kept)
    return replace(found, sums=sums)


def _tokens(work: Measurement, measured: Measured, block: Sequence[Example], rows: int) -> int:
    """Choose how many padded tokens are computed together for `rows` rows like those of the block.

    Scores that were begun go on with the same number, unless only another device has the memory for it.
    """
    asked = work.method.asked_batch_tokens
    if asked is not None:
        return asked
    if measured.batch_tokens in CANDIDATES[work.loaded.device.type]:
        return measured.batch_tokens
    return work.batches.find(
        work.loaded, block, rows, work.required_estimator, work.precision, work.sample.source, work.on_rows
    )


PASS = StatisticPass(_measure)
