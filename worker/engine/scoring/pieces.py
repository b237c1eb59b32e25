"""Pieces of a sample's blocks, whose sums are added in one order, whoever computed them.

The batches of a block are planned together, and each belongs to a piece by its place among them. The sums of a
block are those of its pieces, in order; the sums of all rows are those of their blocks, in order. So they have the same
bits whether one process computes all pieces, or each process a few of them that it keeps for the one that adds them up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from worker.engine.catalog.contracts.statistics import NODE_SUMS, Facts
from worker.engine.catalog.families import ScoreName
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.scoring.measurement import Measurement, Subject
from worker.engine.scoring.sample import block_ends
from worker.engine.scoring.scorer import Watching, score_each, score_names
from worker.engine.scoring.statistics import NodeStatistics
from worker.engine.scoring.store import StatisticsStore

PIECE_ROWS = 128  # a CPU scores so many rows of BERT-base within 20 s, and their sums are 1 MB
ROWS = "rows"
"""Tensor beside a piece's sums: the rows in the sums, and how many of its block's rows were truncated, and read."""

Block = tuple[int, int]
"""The first row of a block, and the one after its last."""


@dataclass(frozen=True)
class Piece:
    """One of the `count` pieces of a block."""

    block: Block
    number: int
    count: int

    @property
    def rows(self) -> float:
        """Number of rows that pieces of the block have on average."""
        return (self.block[1] - self.block[0]) / self.count


def blocks_between(start: int, stop: int) -> list[Block]:
    """Return the blocks between two of their ends."""
    return list(pairwise([start, *(end for end in block_ends(stop) if end > start)]))


def pieces_of(block: Block) -> list[Piece]:
    count = -(-(block[1] - block[0]) // PIECE_ROWS)
    return [Piece(block, number, count) for number in range(count)]


def pieces(rows: int) -> list[Piece]:
    """Return the pieces of all blocks of so many rows, in order."""
    return [piece for block in blocks_between(0, rows) for piece in pieces_of(block)]


def in_pieces(batches: Sequence[Sequence[Example]], count: int) -> list[list[Sequence[Example]]]:
    """Divide a block's batches into pieces, each batch by the place of its first row. A piece may have none."""
    rows = sum(map(len, batches))
    found: list[list[Sequence[Example]]] = [[] for _ in range(count)]
    first = 0
    for batch in batches:
        found[first * count // rows].append(batch)
        first += len(batch)
    return found


def sums_of_block(
    work: Measurement, block: Block, examples: Sequence[Example], tokens: int, watching: Sequence[Watching] = ()
) -> NodeStatistics:
    """Compute the sums of a block, except for pieces that are kept already, unless others watch every pass."""
    own = pieces_of(block)
    names = score_names(work.loaded)
    kept = [None if watching else _read(work, names, tokens, block, piece) for piece in own]
    work.on_kept(sum(sums.examples for sums in kept if sums is not None))
    computed = _scored(work, examples, tokens, kept, watching)
    return _added(one or other for one, other in zip(kept, computed, strict=True))


def kept_sums_of_block(work: Measurement, block: Block, tokens: int) -> NodeStatistics | None:
    """Return the sums of a block if all of its pieces are kept."""
    names = score_names(work.loaded)
    whole = _read(work, names, tokens, block)
    if whole is not None:
        return whole
    each = []
    for piece in pieces_of(block):
        sums = _read(work, names, tokens, block, piece)
        if sums is None:
            return None
        each.append(sums)
    return _added(each)


def measure_pieces(work: Measurement, first: int, end: int, tokens: int) -> None:
    """Compute a run of pieces and keep their sums: in one entry for each block that is whole in it, else one each.

    What another process computes at the same time is waited for.
    """
    for block, run in groupby(pieces(work.rows)[first:end], key=lambda piece: piece.block):
        own = list(run)
        [*_, last] = own
        with work.store.alone_with(_facts(work, tokens, block, last), lambda: work.on_rows(0)):
            _keep(work, block, own, tokens)


def missing_pieces(subject: Subject, store: StatisticsStore, start: int, rows: int, tokens: int) -> list[int]:
    """Return the numbers, among `pieces`, of those after the row `start` whose sums are not kept."""
    return [
        number
        for number, piece in enumerate(pieces(rows))
        if piece.block[0] >= start
        and not store.holds(_facts(subject, tokens, piece.block))
        and not store.holds(_facts(subject, tokens, piece.block, piece))
    ]


def forget_pieces(work: Measurement, blocks: Iterable[Block], tokens: int) -> None:
    """Remove the sums of pieces of these blocks, which are part of what is kept now."""
    work.store.remove(_facts(work, tokens, block, piece) for block in blocks for piece in (None, *pieces_of(block)))


def _keep(work: Measurement, block: Block, own: Sequence[Piece], tokens: int) -> None:
    is_held = [work.store.holds(_facts(work, tokens, block, piece)) for piece in own]
    if all(is_held) or work.store.holds(_facts(work, tokens, block)):
        work.on_kept(round(sum(piece.rows for piece in own)))
        return
    names = {piece.number for piece, held in zip(own, is_held, strict=True) if not held}
    [examples] = work.sample.blocks(*block)
    skipped = [None if number in names else NodeStatistics() for number in range(own[0].count)]
    found = _scored(work, examples, tokens, skipped)
    if len(names) == own[0].count:
        _write(work, tokens, block, None, _added(found))
        return
    for number in sorted(names):
        _write(work, tokens, block, pieces_of(block)[number], found[number])


def _scored(
    work: Measurement,
    examples: Sequence[Example],
    tokens: int,
    known: Sequence[NodeStatistics | None],
    watching: Sequence[Watching] = (),
) -> list[NodeStatistics]:
    """Compute the sums of each piece of a block that is not known; the others stay empty."""
    each = in_pieces(plan_batches(examples, tokens), len(known))
    groups = [batches if sums is None else [] for batches, sums in zip(each, known, strict=True)]
    source = work.sample.source
    return score_each(work.loaded, groups, work.required_estimator, work.precision, source, work.on_rows, watching)


def _added(each: Iterable[NodeStatistics]) -> NodeStatistics:
    sums = NodeStatistics()
    for one in each:
        sums.merge(one)
    return sums


def _facts(subject: Subject, tokens: int, block: Block, piece: Piece | None = None) -> Facts:
    """Return the facts of the sums of a block, or of one of its pieces."""
    part = "" if piece is None else f" {piece.number + 1}/{piece.count}"
    more = {"piece": f"{block[0]}-{block[1]}{part} of {tokens} tokens"}
    return subject.facts_of_gradients(NODE_SUMS, block[1]).model_copy(update=more)


def _read(
    work: Measurement, names: Sequence[ScoreName], tokens: int, block: Block, piece: Piece | None = None
) -> NodeStatistics | None:
    kept = work.store.read(_facts(work, tokens, block, piece))
    if kept is None:
        return None
    examples, *counted = kept[ROWS].tolist()
    work.sample.was_tokenized(block[0], *counted)
    return NodeStatistics.from_named(examples, names, kept) if examples else NodeStatistics()


def _write(work: Measurement, tokens: int, block: Block, piece: Piece | None, sums: NodeStatistics) -> None:
    rows = torch.tensor([sums.examples, *work.sample.tokenized(block[0])])
    facts = _facts(work, tokens, block, piece)
    work.store.put(facts, work.origin(sums.examples, tokens), [{**sums.named(), ROWS: rows}])
