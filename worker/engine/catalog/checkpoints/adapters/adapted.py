"""Makes the checkpoint that an adapter makes of its base: the adapter's tensors replace the base's, or add to them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from worker.engine.catalog.checkpoints.adapters.checks import check_complete, refuse_tied
from worker.engine.catalog.checkpoints.adapters.folder import Adapter
from worker.engine.catalog.checkpoints.adapters.heads import (
    class_with_head,
    table_of_adapted,
    with_class_head,
    with_table_head,
)
from worker.engine.catalog.checkpoints.adapters.names import target_of, tensors_of
from worker.engine.catalog.checkpoints.adapters.peft import MERGE_IT
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG
from worker.engine.catalog.checkpoints.identity import identify
from worker.engine.catalog.checkpoints.info import CheckpointInfo, LowRank, TensorInfo
from worker.engine.catalog.checkpoints.library import Architecture, architecture, completed, ties
from worker.engine.catalog.checkpoints.patterns import ModulePatterns
from worker.engine.catalog.checkpoints.tensor_names import own_name
from worker.engine.catalog.checkpoints.tokenizer_files import vocabulary_of
from worker.engine.catalog.families import FAMILIES, Family, Fused, Kind, backbone_of
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

CONV1D_TYPES = (
    *("openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"),
    *(
        name
        for name, family in FAMILIES.items()
        if any(isinstance(kind, Fused) and kind.transposed for kind in family.layer_modules.values())
    ),
)
"""Model types whose layers transformers makes of Conv1D, which stores (inputs, outputs): five that have no table, and
those whose table says so."""
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Names of these layers, for what no table has: models without one, cross attention, models within models."""
LARGEST_SCALING = 3.4e38  # largest number of float32, in which it is multiplied


def adapted(adapter: Adapter, path: Path, base: CheckpointInfo) -> CheckpointInfo:
    """Make the adapted checkpoint of the base: the adapter's tensors replace the base's, or are added to them.

    Raises:
        InvalidCheckpoint: the adapter lacks tensors that its configuration names, or files cannot show what it does.
        IncompatibleCheckpoints: the base has no such tensor, or one of another shape.
    """
    family = table_of_adapted(adapter, base)
    config, tensors = base.config, tensors_of(base, family)
    head = class_with_head(adapter, base, tensors) if family is None else None
    known = head or architecture(base.config, base.architecture)
    if family is None and head is None:
        known = known or identify(base).known
        refuse_tied(adapter, base, known)
    replaced = _replaced(adapter, base, family, tensors, head, known)
    if head is not None:
        config = with_class_head(adapter, path, base, replaced, head)
    elif family is not None:
        config = with_table_head(adapter, path, base, family, replaced)
    tensors |= replaced
    for module, (alpha, rank) in _strengths(adapter).items():
        target = target_of(f"{module}.weight", tensors, family, known)
        if target not in tensors:
            raise _unknown(adapter, base, adapter.factors[module]["a"])
        scaling = alpha / (math.sqrt(rank) if adapter.config.use_rslora else rank)
        if not abs(scaling) <= LARGEST_SCALING:
            problem = f"{ADAPTER_CONFIG}: lora_alpha or alpha_pattern gives {module} the scaling {scaling:.3g}"
            raise InvalidCheckpoint(adapter.source, f"{problem}, which float32 cannot hold")
        delta = _low_rank(adapter, module, rank, scaling, base, tensors[target])
        tensors[target] = replace(tensors[target], source=adapter.source, delta=delta)
    check_complete(adapter, base, tensors)
    vocabulary, last = vocabulary_of(path, adapter.source)
    if not vocabulary:
        return CheckpointInfo(
            adapter.source, path, config, tensors, base.vocabulary, base.tokenizer_path, base, base.last_token
        )
    return CheckpointInfo(adapter.source, path, config, tensors, vocabulary, path, base, last)


def _replaced(
    adapter: Adapter,
    base: CheckpointInfo,
    family: Family | None,
    tensors: Mapping[str, TensorInfo],
    head: Architecture | None,
    known: Architecture | None,
) -> dict[str, TensorInfo]:
    """Return tensors that are stored whole, by the names that they replace.

    The base may lack a head or a pooler, and the second name of a bias that it has once (`bias: all` stores both).
    """
    replaced = {}
    tied = {} if known is None else dict(ties(known, completed(base.config)))
    for name, tensor in adapter.whole.items():
        target = target_of(name, tensors, family, known)
        slot = family.slot(name) if family is not None else None
        is_new = target not in tensors and (
            (slot is not None and slot.kind is Kind.POOLER)
            or (head is not None and head.reads(name))
            or (known is not None and tied.get(own_name(known, name)) in adapter.whole)
        )
        if not is_new and (slot is None or slot.kind is not Kind.HEAD):
            if target not in tensors:
                raise _unknown(adapter, base, tensor)
            if tensor.shape != tensors[target].shape:
                problem = f"has shape {list(tensor.shape)}, in the base {list(tensors[target].shape)}"
                raise _misfit(adapter, base, tensor, problem)
        replaced[target] = replace(tensor, name=target)
    return replaced


def _low_rank(
    adapter: Adapter, module: str, rank: int, scaling: float, base: CheckpointInfo, matrix: TensorInfo
) -> LowRank:
    """Return the low-rank change of `matrix`, in its shape."""
    a, b = adapter.factors[module]["a"], adapter.factors[module]["b"]
    if a.shape[:1] != (rank,):
        problem = f"has shape {list(a.shape)}, by {ADAPTER_CONFIG} its rank is {rank}"
        raise InvalidCheckpoint(adapter.source, f"tensor {a.name} {problem}")
    if len(matrix.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        problem = f"tensor {a.name} adapts {matrix.name}, which is no matrix; {MERGE_IT}"
        raise InvalidCheckpoint(adapter.source, problem)
    adds = (b.shape[0], a.shape[1])
    # The kind of the layer decides, as in PEFT: the flag fan_in_fan_out is for all layers together.
    transposed = module in adapter.embeddings or _is_transposed(module, base)
    if b.shape[1] != rank or matrix.shape != (adds[::-1] if transposed else adds):
        problem = f"of shape {list(a.shape)}, with lora_B of {list(b.shape)}, does not fit {matrix.name}"
        raise _misfit(adapter, base, a, f"{problem}, {list(matrix.shape)}")
    return LowRank(a, b, scaling, transposed)


def _is_transposed(module: str, base: CheckpointInfo) -> bool:
    """Return whether the base stores the layer as (inputs, outputs), by its table or, where that has none, by name."""
    family = backbone_of(base.model_type)
    weight = f"{module}.weight"
    slot = None if family is None else family.slot(weight) or family.slot(family.prefix + weight)
    if slot is not None:
        return slot.transposed
    parts = [base.config, *(value for value in base.config.values() if isinstance(value, Mapping))]
    return module.rpartition(".")[2] in CONV1D_LAYERS and any(part.get("model_type") in CONV1D_TYPES for part in parts)


def _strengths(adapter: Adapter) -> dict[str, tuple[float, int]]:
    """Return alpha and rank of every adapted module."""
    config = adapter.config
    try:
        alphas, ranks = ModulePatterns(config.alpha_pattern or {}), ModulePatterns(config.rank_pattern or {})
        return {
            module: (alphas.value(module, config.lora_alpha), int(ranks.value(module, config.r)))
            for module in adapter.factors
        }
    except ValueError as error:
        raise InvalidCheckpoint(adapter.source, f"{ADAPTER_CONFIG}: {error}; {MERGE_IT}") from error


def _unknown(adapter: Adapter, base: CheckpointInfo, tensor: TensorInfo) -> IncompatibleCheckpoints:
    return _misfit(adapter, base, tensor, "is for a tensor that is not in the base")


def _misfit(adapter: Adapter, base: CheckpointInfo, tensor: TensorInfo, problem: str) -> IncompatibleCheckpoints:
    return IncompatibleCheckpoints(adapter.source, base.source, f"tensor {tensor.name} {problem}", tensor=tensor.name)
