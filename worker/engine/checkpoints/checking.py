"""What headers do not tell of a merge's checkpoints: defaults of configurations, and whether tied weights are equal."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from worker.engine.catalog.errors import InvalidCheckpoint
from worker.engine.catalog.headers import CheckpointInfo, TensorInfo
from worker.engine.catalog.layer_settings import keys_of_layers
from worker.engine.catalog.layouts import HARMLESS, check_configs, is_buffer
from worker.engine.catalog.planning import MergePlan
from worker.engine.catalog.vocabulary import token_keys
from worker.engine.checkpoints.configurations import library_config
from worker.engine.checkpoints.known_layouts import known_layout
from worker.engine.checkpoints.layout import check_layout, unread_tensors
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.libraries import transformers
from worker.engine.methods.blocks import row_blocks


def check_plan(plan: MergePlan) -> list[str]:
    """Of a plan without a table; one with a table has had these checks from headers.

    Returns:
        Notes of what is merged though transformers does not read it.

    Raises:
        InvalidCheckpoint: tensors that are said to be tied differ, or transformers takes no such configuration.
        IncompatibleCheckpoints: two configurations differ in a default, or by one.
    """
    if plan.family is not None:
        return []
    stated, *others = plan.all_checkpoints
    for stated_other in others:
        if _say_as_much(stated, stated_other):
            continue
        first, other = _with_defaults(stated), _with_defaults(stated_other)
        besides = set[str]()
        if plan.is_of_slices:
            besides |= {*keys_of_layers(first.config), *keys_of_layers(other.config)}
        if plan.vocabulary is not None:
            besides |= {*token_keys(first.config), *token_keys(other.config)}
        check_configs(first, other, besides)
    [published] = plan.published
    merged = {t.slot.name: t.sources[0] for t in plan.backbone}
    if plan.is_of_slices:
        check_layout(replace(published, tensors=merged))
    _check_tied(plan.tied)
    learned = {name: tensor for name, tensor in merged.items() if not is_buffer(tensor)}
    return _notes_of_unread(replace(published, tensors=learned))


def _notes_of_unread(published: CheckpointInfo) -> list[str]:
    unread = unread_tensors(published)
    if not unread:
        return []
    more = f" (like {len(unread) - 1} more)" if len(unread) > 1 else ""
    return [f"tensor {unread[0]}{more} is not one that {published.architecture} reads; it was merged all the same"]


def _say_as_much(first: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Whether neither leaves a key to its default that the other has; then planning compared all there is."""
    return first.config.keys() ^ other.config.keys() <= HARMLESS and all(
        known_layout(info.config, len(info.tensors)) is not None for info in (first, other)
    )


def _with_defaults(info: CheckpointInfo) -> CheckpointInfo:
    """With the keys that transformers adds; as it is where transformers does not know the kind of model."""
    if info.model_type not in transformers.CONFIG_MAPPING:
        return info
    return replace(info, config=library_config(info.config, info.source).to_dict())


def _check_tied(pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> None:
    """transformers takes unequal ones for two matrices, whatever the configuration says; one of them would be lost."""
    with TensorReader() as reader:
        for copy, original in pairs:
            for rows in row_blocks(original.shape):
                if not torch.equal(reader.read(copy, rows), reader.read(original, rows)):
                    problem = (
                        f"tensor {copy.name} differs from {original.name}, to which its configuration ties it; set "
                        "tie_word_embeddings to false in config.json if it is a matrix of its own, else remove it"
                    )
                    raise InvalidCheckpoint(copy.source, problem, tensor=copy.name)
