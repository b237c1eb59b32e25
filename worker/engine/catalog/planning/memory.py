"""Estimates the memory of a job, from its plan and the needs of its method. API and engine ask the same."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from worker.engine.catalog.checkpoints.info import TensorInfo
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.data.spec import NEW_TOKENS
from worker.engine.catalog.families import DECODER, Kind
from worker.engine.catalog.methods import BaseParameters
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.planning.plan import MergePlan, required_family

CACHE_BYTES = 2_000_000_000  # size of the models that are kept loaded
PASSING_ATTENTION_ROWS = 2  # rows of attention that only the layer at work holds
ROUTED_VECTORS = 3  # further vectors of the hidden size that an expert keeps of each of its tokens
VERSIONS_HELD = 4  # copies of every model's block and the base's: as read, and from methods; measured up to 3.6
MERGING_COPIES = 6  # further copies of a block in float32 while it is merged
BLOCK_ELEMENTS = 1 << 18  # elements of one version that are merged at once: 1 MB in float32, which a cache holds
HELD_BLOCKS = 16  # blocks of values in which a rank is found; two models' tensors of half the size are held whole
HELD_TOKENS = 8192  # of a batch that a model writes, with those to come; their keys and values are held at once
LOGITS_COPIES = 3  # of the next token's, while it is chosen
KEPT_BYTES = 150_000_000  # what the allocator keeps of parts of models that were at work; measured up to 140 MB
MATRIX_AXES = 2
KEPT_VECTORS = 10  # of the hidden size, per token, that spare passes while layers are refitted
MOST_FINISHED = 5  # of these are outputs of the merge's modules
MOST_KEPT_BYTES = 4_000_000_000  # of these; for further tokens passes are run again instead
RUN_BYTES = 256_000_000  # largest weights of a model that is run once before it is published


def _has_cuda_libraries() -> bool:
    """Return whether the PyTorch that is installed here, if any, has CUDA's libraries. It is not imported for that."""
    spec = find_spec("torch")
    return spec is not None and (Path(spec.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


RUNTIME_BYTES = 1_250_000_000 if _has_cuda_libraries() else 650_000_000
"""Size of the loaded torch and transformers: measured 450 to 640 MB, and up to 650 more with CUDA's libraries."""


class Writing(Protocol):
    """What an evaluation says of what is written."""

    @property
    def metric(self) -> str | None: ...

    @property
    def max_new_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class MemoryNeeds:
    """The facts about a job, besides its plan, on which its memory depends."""

    method: BaseParameters
    given: frozenset[str] = frozenset()
    """Names of the statistics that no model is measured for, because files have them."""
    loads_models: bool = True
    """Whether models are run; a job that measures, aligns and evaluates nothing only merges blocks of rows."""
    models_beside: int = 0
    """Number of models that are held beside the experts: the merge, the plain average."""
    longest_row: int | None = None
    """Number of tokens of the longest row; None: it is not known yet, and counts as the most that the model takes."""
    tokens_held: int = 0
    """Number of tokens of all rows, with padding, where layers are refitted. That keeps every expert loaded, and every
    token's hidden state in the expert and in the merge, beside what spares passes."""
    outputs_held: int = 0
    """Number of outputs of all rows that a search holds the inputs of heads for."""
    new_tokens: int = 0
    """Largest number of tokens that a model writes after a row; 0: nothing is written."""
    value_bytes: int = 4
    """Bytes of an activation: 4 in float32, 2 in bfloat16, and 0 where they lie on another device."""
    holding: Holding = Holding.WHOLE
    """Way of holding the weights of models that are run."""
    publishes: bool = True
    """Whether a merge is published, and may be run once before."""
    threads: int | None = None
    """Number of threads, each of which merges a tensor; None: one for each core of this machine."""


def most_tokens_kept(hidden: int) -> int:
    """Return the number of padded tokens for which passes are spared while layers are refitted.

    Args:
        hidden: size of a hidden state.
    """
    return MOST_KEPT_BYTES // (4 * KEPT_VECTORS * hidden)


def estimate(plan: MergePlan, needs: MemoryNeeds) -> int:
    """Estimate the most bytes that one worker on a CPU holds: its libraries, the models, and one batch's activations.

    The estimate was 1.0 to 1.2 times the measured memory with two BERT-base and two MiniLM, rows of 32 and of 500
    tokens, float32 and bfloat16.

    Raises:
        InvalidCheckpoint: models are run whose architecture has no table.
    """
    merging = _merging_bytes(plan, needs)
    if not needs.loads_models:
        return RUNTIME_BYTES + merging + _run_bytes(plan)
    running = _Running(plan, needs)
    statistics = needs.method.statistics - needs.given
    # One of them is measured, and others may be taken from its passes.
    measuring = [
        one.measuring_bytes(running) + sum(other.beside_bytes(running) for other in statistics if other is not one)
        for one in statistics
    ]
    # A model that is run once before it is published takes less than those that are held whole.
    published = _run_bytes(plan) if needs.publishes and needs.holding is not Holding.WHOLE else 0
    return RUNTIME_BYTES + running.held + max(running.batch, running.writing, merging, published, *measuring)


def most_new_tokens(plan: MergePlan, evaluations: Sequence[Writing | None]) -> int:
    """Return the largest number of tokens that a model writes after a row; 0 if no metric is of what it writes.

    Args:
        evaluations: that of each model, if it has one; empty where no model is evaluated.
    """
    return max(
        (
            asked.max_new_tokens or NEW_TOKENS
            for task, asked in zip(plan.tasks, evaluations, strict=False)
            if task is not None and asked is not None and asked.metric in task.writing_metrics
        ),
        default=0,
    )


@dataclass(frozen=True)
class _Running:
    """Counts the bytes of models that are run, and of their activations."""

    plan: MergePlan
    needs: MemoryNeeds

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        family = required_family(self.plan)
        return {what: family.size(self.plan.checkpoints[0].config, what) for what in family.config_names}

    @property
    def models(self) -> list[int]:
        """Bytes of every model that are held all the time.

        Where heads are merged, the base is evaluated beside the others.
        """
        evaluates = self.plan.merges_heads and self.needs.models_beside
        infos = self.plan.all_checkpoints if evaluates else self.plan.checkpoints
        return [sum(map(self._held_of, info.tensors.values())) for info in infos]

    def _held_of(self, tensor: TensorInfo) -> int:
        wide = 4 * math.prod(tensor.shape)
        if self.needs.holding is Holding.WHOLE or not self._is_of_part(tensor):
            return wide
        if self.needs.holding is Holding.STREAMED:
            return 0
        return wide if tensor.delta is not None else min(wide, tensor.nbytes)

    def _is_of_part(self, tensor: TensorInfo) -> bool:
        """Return whether the model has the tensor only while a part of it is at work: a layer, or a vocabulary."""
        slot = required_family(self.plan).slot(tensor.name)
        if slot is None or slot.layer is not None:
            return slot is not None
        of_tokens = slot.kind in (Kind.EMBEDDING, Kind.MERGED_HEAD)
        return of_tokens and tensor.shape[0] == vocabulary_size(self.plan.checkpoints[0].config)

    @property
    def at_work(self) -> int:
        """Bytes of the largest part of a model while it is at work, and of a tensor of it that is read or averaged."""
        if self.needs.holding is Holding.WHOLE:
            return 0
        family = required_family(self.plan)
        layers: Counter[int] = Counter()
        output = largest = 0
        for tensor in self.plan.checkpoints[0].tensors.values():
            slot, wide = family.slot(tensor.name), 4 * math.prod(tensor.shape)
            if slot is None or not self._is_of_part(tensor):
                continue
            largest = max(largest, wide)
            if slot.layer is not None:
                layers[slot.layer] += wide
            elif family.head.merges:
                output = max(output, wide)
        return KEPT_BYTES + max([output, *layers.values()]) + (2 if self.needs.models_beside else 1) * largest

    @property
    def input_widths(self) -> list[int]:
        return [seen.width for seen in self.plan.linear_inputs]

    @property
    def value_bytes(self) -> int:
        return self.needs.value_bytes

    @property
    def held(self) -> int:
        """Bytes of the models that are loaded at once, and of the hidden states where layers are refitted."""
        models, beside, tokens = self.models, self.needs.models_beside, self.needs.tokens_held
        cached = sum(models) if tokens else min(sum(models), CACHE_BYTES + max(models))
        merged = 4 * sum(math.prod(tensor.shape) for tensor in self.plan.backbone)
        if self.needs.holding is not Holding.WHOLE:  # the average is computed for the part at work
            merged = 0
        read = (
            2 + self.needs.method.refits_layers
        ) * self.needs.outputs_held  # of one merge, a copy, and refitted ones
        hidden = self.sizes["hidden"]
        stacks = len(required_family(self.plan).stacks) if tokens else 1  # an encoder's output is held to the end
        states = (2 * stacks * tokens + KEPT_VECTORS * min(tokens, most_tokens_kept(hidden)) + read) * 4 * hidden
        return cached + beside * max(*models, merged) + self.at_work + states

    @property
    def longest_row(self) -> int:
        asked = self.needs.longest_row
        family = required_family(self.plan)
        return family.max_tokens(self.plan.checkpoints[0].config) if asked is None else asked

    @property
    def tokens(self) -> int:
        """Number of padded tokens of the largest batch; a row that is longer is a batch of its own."""
        method = self.needs.method
        return max(method.most_batch_tokens, self.longest_row * (method.batch_rows or 1))

    @property
    def batch(self) -> int:
        """Bytes of a forward pass; where layers are refitted, of passes in the expert and the merge together."""
        return (2 if self.needs.tokens_held else 1) * self.activations(self.tokens, layers=1)

    @property
    def writing(self) -> int:
        """Bytes of a batch that a model writes: keys and values of all layers, one layer's twice, and logits."""
        new = self.needs.new_tokens
        if not new or not self.needs.value_bytes:
            return 0
        family, config = required_family(self.plan), self.plan.checkpoints[0].config
        tokens = max(HELD_TOKENS, self.longest_row + new)
        width = family.size(config, "kv_heads") * family.size(config, "head_size")
        cache = 4 * tokens * 2 * width * (self.sizes["layers"] + 1)
        logits = 4 * LOGITS_COPIES * (HELD_TOKENS // (new + 1)) * (vocabulary_size(config) or 0)
        return cache + logits + self.activations(tokens, layers=1)

    def activations(self, tokens: int, layers: int | None = None) -> int:
        """Return the bytes that `layers` layers keep of `tokens` tokens; None: all layers, as a backward pass does.

        A layer keeps for each token about 16 vectors of the hidden size, 4 of the feed-forward size, and rows of
        attention. Where weights are read from files, only one layer does, and the others keep their input in float32.
        """
        if layers is None and self.needs.holding is Holding.STREAMED:
            inputs = self.sizes["layers"] * self.sizes["hidden"] * tokens * min(4, 4 * self.value_bytes)
            return inputs + self.activations(tokens, layers=1)
        sizes = self.sizes
        family = required_family(self.plan)
        heads, neurons = (max(sizes[what], sizes.get(f"{DECODER}_{what}", 0)) for what in ("heads", "neurons"))
        attention = heads * min(self.longest_row, family.max_tokens(self.plan.checkpoints[0].config))
        routed = sizes.get("experts_per_token", 0)
        kept = (family.hidden_vectors + ROUTED_VECTORS * routed) * sizes["hidden"]
        kept += family.neuron_vectors * neurons * max(1, routed)
        kept += family.attention_rows * attention
        passing = PASSING_ATTENTION_ROWS * attention
        all_layers = sizes["layers"] * sizes.get("uses", 1) + sizes.get(f"{DECODER}_layers", 0)
        return tokens * ((all_layers if layers is None else layers) * kept + passing) * self.value_bytes


def _merging_bytes(plan: MergePlan, needs: MemoryNeeds) -> int:
    """Count the bytes of the blocks that are merged at once: every model's, the base's, and those made from them."""
    method, threads = needs.method, needs.threads or os.cpu_count() or 1
    merged = [tensor for tensor in plan.backbone if not tensor.is_copied]
    value_bytes = 8 if any(source.dtype == "F64" for tensor in merged for source in tensor.sources) else 4
    of_each = VERSIONS_HELD + method.selects_by_rank  # for its samples
    versions = of_each * len(plan.all_checkpoints) + MERGING_COPIES
    largest = max((math.prod(tensor.shape) for tensor in merged), default=0)
    longest_row = max((math.prod(tensor.shape[1:]) for tensor in merged), default=0)
    held = versions * min(largest, max(BLOCK_ELEMENTS, longest_row))
    if method.selects_by_rank:  # held values are joined
        held += 2 * HELD_BLOCKS * min(largest, BLOCK_ELEMENTS)
    by_rows = value_bytes * threads * held
    if method.merges_rows:
        return by_rows
    # Linear layers are solved for, and held whole; a matrix of hundreds of thousands of tokens is not.
    whole = (
        value_bytes * versions * math.prod(tensor.shape)
        + method.solving_bytes(*(tensor.shape[::-1] if tensor.slot.transposed else tensor.shape))
        for tensor in merged
        if tensor.slot.is_linear and len(tensor.shape) == MATRIX_AXES
    )
    return max(by_rows, *whole)


def _run_bytes(plan: MergePlan) -> int:
    """Count the bytes of running a published model, if that is done: its weights twice, or with those in float32."""
    heads = (sum(tensor.nbytes for tensor in head) for head in plan.heads)
    stored = sum(tensor.nbytes for tensor in plan.backbone) + max(heads, default=0)
    return 0 if stored > RUN_BYTES else stored * (3 if plan.dtype == "F16" else 2)
