"""Computes the merged backbone, a run of rows at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.checkpoints.row_blocks import is_finite, row_blocks
from worker.engine.merging.methods import MeasuredModel, Merger
from worker.engine.merging.methods.average import average
from worker.engine.merging.methods.blocks import Block, BlockMerge, Versions, required_base
from worker.engine.merging.token_rows import read_by_token
from worker.engine.models.weights import Source


class Backbone:
    """Merged backbone tensors, computed from lazily read inputs of the models that take part. Threads may share it.

    Args:
        scale: gives s in `theta_0 + s (theta - theta_0)` for the place of a tensor, with theta_0 the base and theta
            the method's result.
    """

    def __init__(
        self,
        plan: MergePlan,
        takes_part: Sequence[bool],
        merger: Merger,
        scale: Callable[[TensorPlace], float] = lambda place: 1.0,
    ) -> None:
        self.plan = plan
        self._takes_part = takes_part
        self._merger = merger
        self._scale = scale
        self._reader = TensorReader()

    def __enter__(self) -> "Backbone":
        self._reader.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__(None)

    def blocks(self, planned: PlannedTensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of rows and the merged tensor's values, float32 or better; a copied tensor has its own dtype.

        Raises:
            InvalidCheckpoint: an input has NaN or infinity.
        """
        if planned.is_copied:
            yield from self._copied(planned)
            return
        sources, versions, merge = self._prepared(planned)
        for block in versions.blocks():
            merged = merge(block)
            if not is_finite(merged):
                _blame(block, sources, planned.base)
            yield block.rows, merged
            del block, merged  # freed before the next is read

    def sources(self) -> dict[str, Source]:
        """Return backbone and modules, computed when they are read; the method must merge rows by themselves."""
        tensors = (*self.plan.backbone, *self.plan.module_tensors)
        return {tensor.slot.name: partial(self._some, tensor) for tensor in tensors}

    def _some(self, planned: PlannedTensor, rows: slice | None) -> Tensor:
        if rows is None:
            return self._whole(planned)
        if planned.is_copied:
            [source] = planned.sources
            return self._reader.read(source, rows)
        _, versions, merge = self._prepared(planned)
        return merge(versions.some(rows))

    def _prepared(self, planned: PlannedTensor) -> tuple[Sequence[TensorInfo], Versions, BlockMerge]:
        """Return the tensors to merge, their blocks, and the method's function of these."""
        taking_part = self._taking_part(planned)
        sources = [planned.sources[index] for index in taking_part]
        versions = self._versions(planned, sources, taking_part)
        has_base = planned.base is not None or self.plan.base is None
        return sources, versions, self._scaled(self._merger(versions), self._scale(planned.place) if has_base else 1.0)

    def state(self) -> dict[str, Tensor]:
        """Compute the whole backbone, to be loaded into a model."""
        return {tensor.slot.name: self._whole(tensor) for tensor in self.plan.backbone}

    def modules(self) -> dict[str, Tensor]:
        """Compute the modules of sentence-transformers that are published with the model, by `Slot.name`."""
        return {tensor.slot.name: self._whole(tensor) for tensor in self.plan.module_tensors}

    def _whole(self, planned: PlannedTensor) -> Tensor:
        parts = [part for _, part in self.blocks(planned)]
        return torch.cat(parts) if planned.shape else parts[0]

    def _copied(self, planned: PlannedTensor) -> Iterator[tuple[slice, Tensor]]:
        [source] = planned.sources
        for rows in row_blocks(planned.shape):
            values = self._reader.read(source, rows if planned.shape else None)
            if not is_finite(values):
                raise _not_finite(source)
            yield rows, values

    def _taking_part(self, planned: PlannedTensor) -> list[int]:
        """Return the positions, among the tensor's sources, of the models that take part."""
        models = range(len(self._takes_part)) if planned.members is None else planned.members
        return [index for index, model in enumerate(models) if self._takes_part[model]]

    def _versions(self, planned: PlannedTensor, sources: Sequence[TensorInfo], taking_part: Sequence[int]) -> Versions:
        origin = planned.base if self.plan.base is not None else None

        def read(rows: slice) -> Block:
            if planned.token_rows is not None:
                return read_by_token(self._reader, planned, taking_part, rows)
            some = rows if planned.shape else None
            versions = [self._reader.read(source, some) for source in sources]
            return Block.of(rows, versions, self._reader.read(origin, some) if origin else None)

        return Versions(planned.slot, planned.place, planned.shape, read)

    @staticmethod
    def _scaled(merge: BlockMerge, scale: float) -> BlockMerge:
        if scale == 1:
            return merge

        def scaled(block: Block) -> Tensor:
            base = required_base(block.base)
            return torch.add(base, merge(block) - base, alpha=scale)

        return scaled


def _blame(block: Block, sources: Sequence[TensorInfo], base: TensorInfo | None) -> None:
    """Raise InvalidCheckpoint where a version has NaN or infinity; otherwise the method or the dtype is at fault."""
    for source, values in [*zip(sources, block.versions, strict=True), (base, block.base)]:
        if source is not None and values is not None and not is_finite(values):
            raise _not_finite(source)


def _not_finite(source: TensorInfo) -> InvalidCheckpoint:
    problem = f"tensor {source.name} has values that are NaN or infinite"
    return InvalidCheckpoint(source.source, problem, tensor=source.name)


def given(state: Mapping[str, Tensor]) -> Merger:
    """Make a method of a backbone that is merged already: tensors by `Slot.name`."""

    def prepare(versions: Versions) -> BlockMerge:
        merged = state[versions.slot.name]
        return lambda block: merged[block.rows] if merged.dim() else merged

    return prepare


def averaged(plan: MergePlan, takes_part: Sequence[bool]) -> Backbone:
    """Return the unweighted average of the models that take part."""
    equal = [MeasuredModel(1.0) for takes in takes_part if takes]
    return Backbone(replace(plan, base=None), takes_part, average(equal))  # an average does not read the base


def plain_average(plan: MergePlan, takes_part: Sequence[bool]) -> dict[str, Tensor]:
    """Compute the unweighted average of the models that take part, to be loaded into a model."""
    with averaged(plan, takes_part) as backbone:
        return {**backbone.state(), **backbone.modules()}


def base_alone(plan: MergePlan) -> dict[str, Tensor]:
    """Return the backbone of the base, which has all of its tensors, to be loaded into a model."""
    own = [replace(t, sources=(t.base,), base=None) for t in plan.backbone if t.base is not None]
    return plain_average(replace(plan, backbone=tuple(own)), [True])
