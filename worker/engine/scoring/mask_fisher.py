"""Scores mask nodes block by block, with the sums for their errors, so that more rows go on from fewer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from worker.engine.inputs.examples import Example
from worker.engine.runtime.device import rounded_weights
from worker.engine.scoring.batching import CANDIDATES
from worker.engine.scoring.measurement import Measured, Measurement, StatisticPass
from worker.engine.scoring.pieces import Block, blocks_between, forget_pieces, kept_sums_of_block, sums_of_block
from worker.engine.scoring.sample import block_ends, looks
from worker.engine.scoring.scorer import Watching, paper_scores, score_names
from worker.engine.scoring.statistics import STANDARD_ERROR, NodeStatistics


def _measure(work: Measurement, measured: Measured) -> Measured:
    measured = replace(measured, names=tuple(sorted(score_names(work.loaded))))
    if work.method.batch_rows is not None:
        return work.find_or_compute(measured, work.facts_of_scores(work.rows), _published(work))
    return _with_scores(work, measured)


def _published(work: Measurement) -> Iterator[Mapping[str, Tensor]]:
    """Yield the published code's scores, from batches of its own; they have no errors."""
    scores = paper_scores(work.loaded, work.examples, work.sample.source, work.on_rows)
    yield {str(name): of for name, of in scores.items()}


def _with_scores(work: Measurement, measured: Measured) -> Measured:
    """Score the first rows. The longest run of whole blocks whose sums are known is not scored again.

    Every look is kept. If several processes need the same scores, one goes through the rows and the others wait for it.
    Where all rows are scored, further statistics are taken from the same forward passes.
    """
    found = _with_kept(work, measured)
    if found.scored_rows == work.rows:
        work.on_kept(found.scored_rows - measured.scored_rows)
        return found
    alone = work.store.alone_with(work.facts_of_scores(work.rows), lambda: work.on_rows(0))
    # Weights are rounded once here, and not anew for every block.
    with alone, rounded_weights(work.loaded.model, work.precision), ExitStack() as beside:
        found = _with_kept(work, found)
        known = found.scored_rows
        work.on_kept(known - measured.scored_rows)
        sums = NodeStatistics()
        watching: list[Watching] = []
        if known:
            sums.merge(found.sums[known])
        else:
            watching = [beside.enter_context(begin(work)) for begin in work.beside]
        tokens = _chosen_tokens(work, found)
        for look in [look for look in looks(work.rows) if look > known]:
            blocks = blocks_between(sums.examples, look)
            for block, of_block in _kept_or_tokenized(work, blocks, None if watching else tokens):
                if isinstance(of_block, NodeStatistics):
                    work.on_kept(of_block.examples)
                    sums.merge(of_block)
                    continue
                if tokens is None:
                    tokens = _found_tokens(work, of_block, work.rows - known)
                sums.merge(sums_of_block(work, block, of_block, tokens, watching))
            are_all_alike = found.batch_tokens == tokens or not known
            found = replace(found, batch_tokens=tokens if are_all_alike else None)
            errors = sums.standard_errors(work.sample.population)
            named = {f"{site}{STANDARD_ERROR}": error for site, error in errors.items()}
            parts = [sums.scores() | named | sums.named()]
            kept = work.store.put(work.facts_of_scores(look), work.origin(look, found.batch_tokens), parts)
            if tokens is not None and work.store.holds(work.facts_of_scores(look)):
                forget_pieces(work, blocks, tokens)
            found = replace(found.with_scores(look, kept), cached=False)
    return found


def _kept_or_tokenized(
    work: Measurement, blocks: Sequence[Block], tokens: int | None
) -> Iterator[tuple[Block, NodeStatistics | list[Example]]]:
    """Yield the sums of each block, or else its rows; nothing is kept where the number of tokens is not known yet."""
    each = ((block, None if tokens is None else kept_sums_of_block(work, block, tokens)) for block in blocks)
    for is_kept, run in groupby(each, key=lambda of: of[1] is not None):
        if is_kept:
            for block, kept in run:
                if kept is not None:
                    yield block, kept
            continue
        missing = [block for block, _ in run]
        rows = work.sample.blocks(missing[0][0], missing[-1][1])
        yield from zip(missing, rows, strict=True)


def _with_kept(work: Measurement, measured: Measured) -> Measured:
    """Add the longest run of whole blocks that is kept, and the looks before it.

    If the method sets the number of tokens in a batch, only sums that were computed with that number count as kept.
    """
    asked = work.method.asked_batch_tokens
    found = measured
    for end in reversed([end for end in block_ends(work.rows) if end > measured.scored_rows]):
        kept = work.store.get(work.facts_of_scores(end))
        if kept is not None and asked in (None, kept.about.origin.batch_tokens):
            found = replace(found.with_scores(end, kept), batch_tokens=kept.about.origin.batch_tokens)
            break
    sums = dict(found.sums)
    for look in [look for look in looks(found.scored_rows) if look > 0 and look not in sums]:
        kept = work.store.get(work.facts_of_scores(look))
        if kept is not None:
            sums[look] = NodeStatistics.from_named(look, found.names, kept)
    return replace(found, sums=sums)


def _chosen_tokens(work: Measurement, measured: Measured) -> int | None:
    """Return how many padded tokens are computed together, if that is decided: asked for, begun with, or the job's.

    Scores that were begun go on with the same number, unless only another device has the memory for it.
    """
    asked = work.method.asked_batch_tokens
    if asked is not None:
        return asked
    if measured.batch_tokens in CANDIDATES[work.loaded.device.type]:
        return measured.batch_tokens
    return work.batch_tokens.get(work.facts_of_scores(work.rows).address)


def _found_tokens(work: Measurement, block: Sequence[Example], rows: int) -> int:
    """Choose, for the whole job, how many padded tokens are computed together for `rows` rows like the block's."""
    estimator, source = work.required_estimator, work.sample.source
    found = work.batches.find(work.loaded, block, rows, estimator, work.precision, source, work.on_rows)
    work.batch_tokens[work.facts_of_scores(work.rows).address] = found
    return found


PASS = StatisticPass(_measure, lambda subject, rows: subject.facts_of_scores(rows))
