"""Checks whether tied weights are equal, which headers do not show."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.tensor_names import is_buffer
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.layout import check_layout, unread_tensors
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.checkpoints.row_blocks import row_blocks


def check_plan(plan: MergePlan) -> list[str]:
    """Check what the plan says is tied and, without a table, what transformers would build of slices.

    Returns:
        Notes of tensors that are merged though transformers does not read them.

    Raises:
        InvalidCheckpoint: tensors that are said to be tied differ, or transformers takes no such configuration.
    """
    _check_tied(plan.tied)
    if plan.family is not None or not plan.is_of_slices:
        return []
    [published] = plan.published
    merged = {t.slot.name: t.sources[0] for t in plan.backbone}
    check_layout(replace(published, tensors=merged))
    learned = {name: tensor for name, tensor in merged.items() if not is_buffer(tensor)}
    return _notes_of_unread(replace(published, tensors=learned))


def _notes_of_unread(published: CheckpointInfo) -> list[str]:
    unread = unread_tensors(published)
    if not unread:
        return []
    more = f" (like {len(unread) - 1} more)" if len(unread) > 1 else ""
    return [f"tensor {unread[0]}{more} is not one that {published.architecture} reads; it was merged all the same"]


def _check_tied(pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> None:
    """Check that tied tensors are equal.

    transformers takes unequal ones for two matrices, whatever the configuration says, and one of them would be lost.
    """
    with TensorReader() as reader:
        for copy, original in pairs:
            for rows in row_blocks(original.shape):
                if not torch.equal(reader.read(copy, rows), reader.read(original, rows)):
                    problem = (
                        f"tensor {copy.name} differs from {original.name}, to which its configuration ties it; set "
                        "tie_word_embeddings to false in config.json if it is a matrix of its own, else remove it"
                    )
                    raise InvalidCheckpoint(copy.source, problem, tensor=copy.name)
