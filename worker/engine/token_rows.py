"""Rows of token-indexed tensors at the places that their tokens have in the output, see `catalog.vocabulary`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.catalog.errors import InvalidCheckpoint
from worker.engine.catalog.headers import TensorInfo
from worker.engine.catalog.planning import PlannedTensor
from worker.engine.catalog.vocabulary import runs
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.methods.blocks import Block, Rows, is_finite


def read_by_token(reader: TensorReader, planned: PlannedTensor, taking_part: Sequence[int], rows: slice) -> Block:
    """Some rows of the output, of each model that takes part and of the base.

    A model's row is its own for the token; where it has none, the base's; where that has none either, the mean of the
    rows of those models that take part and have the token, or else of all that have it. The base's is the same mean
    where it lacks the token. Means are float64.

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
    versions = [_chosen(version, instead) for version in own]
    return Block.of(rows, versions, None if base is None else instead.to(base[0].dtype))


def _read(reader: TensorReader, source: TensorInfo, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values, zero where a place is -1, float32 or float64; and which rows are there."""
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
    """The version's rows where it has them; in its dtype."""
    values, has = version
    return torch.where(_as_rows(has, values), values, instead.to(values.dtype))


def _as_rows(factors: Tensor, values: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class RowsByToken:
    """What was measured of a tensor, with rows where the output has their tokens; those of tokens it lacks are 0."""

    measured: Rows
    places: Sequence[int]
    """Its own rows by row of the output."""

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.places), *self.measured.shape[1:])

    def __getitem__(self, rows: slice, /) -> Tensor:
        places = self.places[rows]
        found = torch.zeros(len(places), *self.shape[1:])
        for row, own, length in runs(places):
            found[row : row + length] = self.measured[own : own + length]
        return found


class ByToken(Mapping[str, Rows]):
    """What was measured of every parameter of a model, by tensor: `RowsByToken` where there are places for it."""

    def __init__(self, measured: Mapping[str, Rows], places: Mapping[str, Sequence[int]]) -> None:
        """`places` are the model's own rows by row of the output, of each token-indexed tensor."""
        self._measured = measured
        self._places = places

    def __getitem__(self, name: str) -> Rows:
        found = self._measured[name]
        return RowsByToken(found, self._places[name]) if name in self._places else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)
