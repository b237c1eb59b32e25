"""How much memory a job takes, from its plan and what its method says that it needs. API and engine ask the same."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from worker.engine.catalog.methods import BaseParameters, Statistic
from worker.engine.catalog.planning.plan import MergePlan, required_family

CACHE_BYTES = 2_000_000_000  # models kept loaded
PASSING_ATTENTION_ROWS = 2  # those that only the layer at work holds
GRAM_BYTES = 500_000_000  # sums of Gram matrices held at once; those of a larger model take several passes
GRAM_MATRICES = 6  # in float64, while a layer is merged: the sum, its factor, one model's, and what is between
FISHER_VALUE_BYTES = 16  # for each parameter: its sum, its gradient and what is between
VERSIONS_HELD = 4  # of every model's block and the base's: as read, and what methods make of it; measured up to 3.6
MERGING_COPIES = 6  # of a block in float32, beside these, while it is merged
BLOCK_ELEMENTS = 1 << 18  # of one version, of the rows that are merged at once: in float32 1 MB, which a cache holds
HELD_BLOCKS = 16  # of values among which one of a rank is found: of two models' tensors of no more than half, all are
RUN_BYTES = 256_000_000  # of weights, of a published model that is run once before it is published


def _has_cuda_libraries() -> bool:
    """Whether the PyTorch that is installed here, if there is one, brings CUDA's. It is not imported to tell."""
    spec = find_spec("torch")
    return spec is not None and (Path(spec.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


RUNTIME_BYTES = 1_250_000_000 if _has_cuda_libraries() else 600_000_000
"""torch and transformers loaded: measured 450 to 600 MB, and up to 650 more with CUDA's libraries, used or not."""


@dataclass(frozen=True)
class MemoryNeeds:
    """What a job does that takes memory, beside what its plan says."""

    method: BaseParameters
    loads_models: bool = True
    """Whether models are run; a job that measures, aligns and evaluates nothing merges blocks of rows alone."""
    models_beside: int = 0
    """Number of models that are held beside the experts: the merge, the plain average."""
    longest_row: int | None = None
    """Tokens of the longest row; None: as many as the model takes, since it is not known yet."""
    tokens_held: int = 0
    """Tokens of all rows, with padding, where layers are refitted. That keeps every expert loaded, and every token's
    hidden state in the expert and in the merge."""
    value_bytes: int = 4
    """Bytes of an activation: 4 in float32, 2 in bfloat16, and 0 where they lie on another device."""
    threads: int | None = None
    """Threads, each of which merges a tensor; None: one for each core of this machine."""


def estimate(plan: MergePlan, needs: MemoryNeeds) -> int:
    """The most bytes that one worker on a CPU holds: its libraries, the models, and one batch's activations.

    It was 1.0 to 1.2 times what was measured with two BERT-base and two MiniLM, rows of 32 and of 500 tokens, float32
    and bfloat16.

    Raises:
        InvalidCheckpoint: models are run of an architecture that has no table.
    """
    merging = _merging_bytes(plan, needs)
    if not needs.loads_models:
        return RUNTIME_BYTES + merging + _run_bytes(plan)
    running = _Running(plan, needs)
    measuring = [MEASURING_BYTES[statistic](running) for statistic in needs.method.statistics]
    return RUNTIME_BYTES + running.held + max(running.batch, merging, *measuring)


@dataclass(frozen=True)
class _Running:
    """Bytes of models that are run, and of their activations."""

    plan: MergePlan
    needs: MemoryNeeds

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        family = required_family(self.plan)
        return {what: family.size(self.plan.checkpoints[0].config, what) for what in family.config_names}

    @property
    def models(self) -> list[int]:
        """Bytes of every model, which is held in float32, whatever it is stored in."""
        return [4 * sum(math.prod(t.shape) for t in info.tensors.values()) for info in self.plan.checkpoints]

    @property
    def held(self) -> int:
        """Bytes of the models that are loaded at once, and of the hidden states where layers are refitted."""
        models, beside, tokens = self.models, self.needs.models_beside, self.needs.tokens_held
        cached = sum(models) if tokens else min(sum(models), CACHE_BYTES + max(models))
        merged = 4 * sum(math.prod(tensor.shape) for tensor in self.plan.backbone)
        return cached + beside * max(*models, merged) + tokens * 2 * 4 * self.sizes["hidden"]

    @property
    def longest_row(self) -> int:
        asked = self.needs.longest_row
        family = required_family(self.plan)
        return family.max_tokens(self.plan.checkpoints[0].config) if asked is None else asked

    @property
    def tokens(self) -> int:
        """Padded tokens of the largest batch; a row that is longer is one of its own."""
        method = self.needs.method
        return max(method.most_batch_tokens, self.longest_row * (method.batch_rows or 1))

    @property
    def batch(self) -> int:
        """Bytes of a forward pass; where layers are refitted, of one in the expert and one in the merge together."""
        return (2 if self.needs.tokens_held else 1) * self.activations(self.tokens, layers=1)

    def activations(self, tokens: int, layers: int | None = None) -> int:
        """Bytes that so many layers keep of so many tokens; a backward pass keeps all layers', which is None.

        A layer keeps of each token about 16 vectors of the hidden size, 4 of the feed-forward size, and rows of
        attention.
        """
        sizes = self.sizes
        family = required_family(self.plan)
        attention = sizes["heads"] * self.longest_row
        kept = family.hidden_vectors * sizes["hidden"] + family.neuron_vectors * sizes["neurons"]
        kept += family.attention_rows * attention
        passing = PASSING_ATTENTION_ROWS * attention
        return tokens * ((sizes["layers"] if layers is None else layers) * kept + passing) * self.needs.value_bytes


def _mask_fisher_bytes(running: _Running) -> int:
    """In bfloat16 there are the model's rounded weights beside it."""
    rounded = max(running.models) // 2 if running.needs.value_bytes == 2 else 0
    return running.activations(running.tokens) + rounded


def _fisher_bytes(running: _Running) -> int:
    """A row at a time."""
    return running.activations(running.longest_row) + FISHER_VALUE_BYTES * max(running.models) // 4


def _gram_bytes(running: _Running) -> int:
    """Sums beside a forward pass, or later what solving for the largest layer takes."""
    matrices = [8 * seen.width**2 for seen in running.plan.linear_inputs]
    sums = min(sum(matrices), max(GRAM_BYTES, max(matrices)))
    return max(running.batch + sums, GRAM_MATRICES * max(matrices))


MEASURING_BYTES: Mapping[Statistic, Callable[[_Running], int]] = {
    Statistic.MASK_FISHER: _mask_fisher_bytes,
    Statistic.FISHER: _fisher_bytes,
    Statistic.GRAM: _gram_bytes,
}
"""What measuring a statistic takes beside the models, and merging by it."""

if MEASURING_BYTES.keys() != set(Statistic):
    raise ImportError(f"statistics whose memory is not known: {set(Statistic) - MEASURING_BYTES.keys()}")


def _merging_bytes(plan: MergePlan, needs: MemoryNeeds) -> int:
    """Bytes of every model's version of what is merged at once, the base's, and what methods make of them."""
    method, threads = needs.method, needs.threads or os.cpu_count() or 1
    merged = [tensor for tensor in plan.backbone if not tensor.is_copied]
    value_bytes = 8 if any(source.dtype == "F64" for tensor in merged for source in tensor.sources) else 4
    of_each = VERSIONS_HELD + method.selects_by_rank  # its samples
    versions = of_each * len(plan.all_checkpoints) + MERGING_COPIES
    largest = max((math.prod(tensor.shape) for tensor in merged), default=0)
    if not method.merges_rows:
        return value_bytes * versions * largest
    longest_row = max((math.prod(tensor.shape[1:]) for tensor in merged), default=0)
    held = versions * min(largest, max(BLOCK_ELEMENTS, longest_row))
    if method.selects_by_rank:  # what is held is put together
        held += 2 * HELD_BLOCKS * min(largest, BLOCK_ELEMENTS)
    return value_bytes * threads * held


def _run_bytes(plan: MergePlan) -> int:
    """What it takes to run a published model once, where that is done: its weights, in float32 if in float16."""
    heads = (sum(tensor.nbytes for tensor in head) for head in plan.heads)
    stored = sum(tensor.nbytes for tensor in plan.backbone) + max(heads, default=0)
    return 0 if stored > RUN_BYTES else stored * (3 if plan.dtype == "F16" else 1)
