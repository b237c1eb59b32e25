"""Puts rows of token-indexed tensors at their tokens' places in the output, see `catalog.checkpoints.token_rows`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.checkpoints.token_rows import GivenRow, runs
from worker.engine.catalog.planning.plan import PlannedTensor
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.checkpoints.row_blocks import is_finite, row_blocks
from worker.engine.merging.methods.blocks import Block, TensorRows


def read_by_token(reader: TensorReader, planned: PlannedTensor, taking_part: Sequence[int], rows: slice) -> Block:
    """Read some rows of the output, for each model that takes part and for the base.

    A model's row is its own for the token. Where it has none, it is the base's; where that has none either, the mean
    over the models that take part and have the token, or else over all models that have it. The base's row is the same
    mean where it lacks the token. Means are float64.

    Raises:
        InvalidCheckpoint: an input has NaN or infinity, which the mean would give to others.
    """
    if planned.token_rows is None:
        raise ValueError(f"{planned.slot.name} has no rows by token")
    places = planned.token_rows.models

    def read(index: int) -> tuple[Tensor, Tensor]:
        return _read(reader, planned.sources[index], places[index][rows.start : rows.stop])

    own = [read(index) for index in taking_part]
    base = None
    if planned.base is not None and planned.token_rows.base is not None:
        base = _read(reader, planned.base, planned.token_rows.base[rows.start : rows.stop])
    sums = torch.zeros(own[0][0].shape, dtype=torch.float64)
    counts = torch.zeros(rows.stop - rows.start)
    _add(own, sums, counts)
    orphans = counts == 0
    if base is not None:
        orphans &= ~base[1]
    if bool(orphans.any()):
        for index in set(range(len(places))) - set(taking_part):
            values, has = read(index)
            _add([(values, has & orphans)], sums, counts)
    mean = sums / _as_rows(counts.clamp_min(1), sums)
    instead = mean if base is None else _chosen(base, mean)
    for place, given in planned.token_rows.given.items():
        if rows.start <= place < rows.stop:
            _give(_given_row(reader, planned, given), place - rows.start, given.force, own, base, instead)
    versions = [_chosen(version, instead) for version in own]
    block = Block.of(rows, versions, None if base is None else instead.to(base[0].dtype))
    first_of_padding = planned.shape[0] - planned.token_rows.padding
    if rows.stop > first_of_padding:
        _pad(reader, planned, taking_part, block, first_of_padding)
    return block


def _given_row(reader: TensorReader, planned: PlannedTensor, given: GivenRow) -> Tensor:
    """Read the row that a recipe gives a token, float64."""
    source = planned.base if given.model is None else planned.sources[given.model]
    if given.row is None or source is None:
        return torch.zeros(planned.shape[1:], dtype=torch.float64)
    return _read(reader, source, [given.row])[0][0].double()


def _give(
    value: Tensor,
    row: int,
    force: bool,
    own: Sequence[tuple[Tensor, Tensor]],
    base: tuple[Tensor, Tensor] | None,
    instead: Tensor,
) -> None:
    for values, has in own:
        if force or not has[row]:
            values[row], has[row] = value.to(values.dtype), True
    if base is not None and (force or not base[1][row]):
        instead[row] = value.to(instead.dtype)


def _pad(reader: TensorReader, planned: PlannedTensor, taking_part: Sequence[int], block: Block, first: int) -> None:
    """Give the block's rows from the tensor's row `first` on the mean of all rows before it, in each version."""
    sums = [torch.zeros(planned.shape[1:], dtype=torch.float64) for _ in taking_part]
    of_base = torch.zeros(planned.shape[1:], dtype=torch.float64)
    for rows in row_blocks((first, *planned.shape[1:])):
        before = read_by_token(reader, planned, taking_part, rows)
        for total, version in zip(sums, before.versions, strict=True):
            total += version.sum(0, dtype=torch.float64)
        if before.base is not None:
            of_base += before.base.sum(0, dtype=torch.float64)
    start = max(0, first - block.rows.start)
    for total, version in zip(sums, block.versions, strict=True):
        version[start:] = (total / first).to(version.dtype)
    if block.base is not None:
        block.base[start:] = (of_base / first).to(block.base.dtype)


def _read(reader: TensorReader, source: TensorInfo, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read values, float32 or float64, zero where a place is -1; and mark the rows that are there."""
    has = torch.tensor(places) >= 0
    stored = [source] if source.delta is None else [source, source.delta.a, source.delta.b]
    wide = torch.float64 if any(tensor.dtype == "F64" for tensor in stored) else torch.float32
    values = torch.zeros(len(places), *source.shape[1:], dtype=wide)
    stretches = list(runs(places))
    read = reader.read_runs(source, (slice(own, own + length) for _, own, length in stretches))
    for (row, _, length), found in zip(stretches, read, strict=True):
        values[row : row + length] = found
    if not is_finite(values):
        problem = f"tensor {source.name} has values that are NaN or infinite"
        raise InvalidCheckpoint(source.source, problem, tensor=source.name)
    return values, has


def _add(parts: Sequence[tuple[Tensor, Tensor]], sums: Tensor, counts: Tensor) -> None:
    for values, has in parts:
        sums += values * _as_rows(has, values)
        counts += has


def _chosen(version: tuple[Tensor, Tensor], instead: Tensor) -> Tensor:
    """Take the version's rows where it has them, and else those of `instead`; in the version's dtype."""
    values, has = version
    return torch.where(_as_rows(has, values), values, instead.to(values.dtype))


def _as_rows(factors: Tensor, values: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class RowsByToken:
    """A tensor's statistic, with its rows where the output has their tokens; rows of tokens that it lacks are 0."""

    measured: TensorRows
    places: Sequence[int]
    """The tensor's own rows, by row of the output."""

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.places), *self.measured.shape[1:])

    def __getitem__(self, rows: slice, /) -> Tensor:
        places = self.places[rows]
        found = torch.zeros(len(places), *self.shape[1:])
        for row, own, length in runs(places):
            found[row : row + length] = self.measured[own : own + length]
        return found


class ByToken(Mapping[str, TensorRows]):
    """The statistics of every parameter of a model, by tensor: `RowsByToken` for those in `places`."""

    def __init__(self, measured: Mapping[str, TensorRows], places: Mapping[str, Sequence[int]]) -> None:
        """Wrap statistics; `places` has, for each token-indexed tensor, the model's own rows by row of the output."""
        self._measured = measured
        self._places = places

    def __getitem__(self, name: str) -> TensorRows:
        found = self._measured[name]
        return RowsByToken(found, self._places[name]) if name in self._places else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)
