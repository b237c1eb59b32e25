"""The layout of a merge, from headers alone: what every output tensor is, who owns its slices, where it comes from.

Whatever can be refused is refused here, before a byte of weights is read.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from worker.engine.catalog.checkpoints import layouts
from worker.engine.catalog.checkpoints.headers import DTYPE_BYTES, FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.identity import Identity, check_present, check_tensors, identify, own_names
from worker.engine.catalog.checkpoints.library import completed, value_at
from worker.engine.catalog.checkpoints.modules import Modules
from worker.engine.catalog.checkpoints.settings import check_settings
from worker.engine.catalog.checkpoints.tied import tied_in_base, without_copies
from worker.engine.catalog.checkpoints.vocabulary import (
    Choices,
    TokenRows,
    Vocabulary,
    align_vocabularies,
    check_names_tell_tokens,
    check_rows,
    is_token_indexed,
    pads_differ,
    token_keys,
    vocabulary_size,
)
from worker.engine.catalog.contracts.spec import Dtype, Heads, VocabularyPolicy
from worker.engine.catalog.data.labels import Task, task_of
from worker.engine.catalog.families import FAMILIES, Family, Kind, Slot
from worker.engine.catalog.methods import LARGEST_BATCH_TOKENS, Statistic
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint, InvalidRequest
from worker.engine.catalog.primitives.values import Place

TORCH_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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
VOCABULARY_ADVICE = "output.vocabulary 'base' or 'union' merges them token by token"


def _has_cuda_libraries() -> bool:
    """Whether the PyTorch that is installed here, if there is one, brings CUDA's. It is not imported to tell."""
    spec = find_spec("torch")
    return spec is not None and (Path(spec.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


RUNTIME_BYTES = 1_250_000_000 if _has_cuda_libraries() else 600_000_000
"""torch and transformers loaded: measured 450 to 600 MB, and up to 650 more with CUDA's libraries, used or not."""


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `sources` has the tensor of each model, in the models' order; `base` the ancestor's."""

    slot: Slot
    place: Place
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[TensorInfo, ...]
    base: TensorInfo | None = None
    is_copied: bool = False
    """Not merged: it is its one source, in the dtype of the plan."""
    token_rows: TokenRows | None = None
    """Rows in `sources` and `base` of a tensor with a row for each token, if vocabularies differ."""
    members: tuple[int, ...] | None = None
    """Positions of the models that `sources` are of, where the result is of slices; None: all, in order."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PlannedModules:
    """The modules of sentence-transformers that are published with one model."""

    modules: Modules
    """The checkpoint whose settings they have."""
    tensors: Mapping[str, tuple[PlannedTensor, ...]]
    """Tensors by the module's folder; they are merged by the models' weights, whatever the method."""


@dataclass(frozen=True)
class LinearInput:
    """The input of linear layers, (…, width), seen at the input of `module`; see `Slot.input`."""

    name: str
    module: str
    width: int


@dataclass(frozen=True)
class MergePlan:
    """Output tensors in the order in which they are written: the backbone once, and each model's own head.

    Where heads are merged too, they are in the backbone, and one model is published.
    """

    family: Family | None
    """The family's table; None means that tensors are merged by name."""
    checkpoints: tuple[CheckpointInfo, ...]
    base: CheckpointInfo | None
    tasks: tuple[Task | None, ...]
    """The task of each model's head; None without a table."""
    backbone: tuple[PlannedTensor, ...]
    heads: tuple[tuple[PlannedTensor, ...], ...]
    """Tensors that each published model has beside the backbone."""
    published: tuple[CheckpointInfo, ...]
    """The checkpoint whose configuration each published model has, and whose tokenizer if nothing else says so."""
    tied: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    """Tensors that are left out, since they must equal others of the same checkpoint, and these."""
    vocabulary: Vocabulary | None = None
    """The output's vocabulary; None if all models have the same."""
    config_from: CheckpointInfo | None = None
    """The checkpoint whose settings all published models have, and whose tokenizer if it has one."""
    chat_template: str | None = None
    """The published chat template; None means the published tokenizer's own."""
    modules: tuple[PlannedModules | None, ...] = ()
    """The modules of each published model; empty if none has any."""
    companion_bytes: int = 0
    """Bytes of all files that are copied beside the weights."""
    notes: tuple[str, ...] = ()
    """Notes that the result begins with."""

    def tokens_of(self, info: CheckpointInfo) -> CheckpointInfo:
        """The checkpoint whose tokenizer, templates and settings are published with the configuration of `info`."""
        if self.vocabulary is not None:
            return self.vocabulary.owner
        return self.config_from if self.config_from is not None and self.config_from.vocabulary else info

    @property
    def merges_heads(self) -> bool:
        return not any(self.heads)

    @property
    def is_of_slices(self) -> bool:
        """Whether the result has layers of its own number, and its tensors are of some of the models."""
        return any(tensor.members is not None for tensor in self.backbone)

    @property
    def dtype(self) -> str:
        """The dtype of most numbers of the backbone."""
        counts: Counter[str] = Counter()
        for tensor in self.backbone:
            counts[tensor.dtype] += math.prod(tensor.shape) if tensor.dtype in FLOATS else 0
        return counts.most_common(1)[0][0]

    @property
    def linear_inputs(self) -> list[LinearInput]:
        """Inputs of the backbone's linear layers."""
        return [
            LinearInput(t.slot.input, t.slot.name.removesuffix(".weight"), t.shape[1])
            for t in self.backbone
            if t.slot.input and t.slot.shows_input
        ]

    @property
    def all_checkpoints(self) -> list[CheckpointInfo]:
        return [*self.checkpoints, *([self.base] if self.base else ())]

    @property
    def bytes_to_read(self) -> int:
        return sum(tensor.nbytes for info in self.all_checkpoints for tensor in info.tensors.values())

    @property
    def bytes_to_write(self) -> int:
        of_modules = [tensors for planned in self.modules if planned for tensors in planned.tensors.values()]
        return self.companion_bytes + sum(t.nbytes for part in (self.backbone, *self.heads, *of_modules) for t in part)

    def peak_memory_bytes(
        self,
        longest_row: int | None = None,
        *,
        statistics: Collection[Statistic] = (),
        models_beside: int = 0,
        tokens_held: int = 0,
        batch_rows: int | None = None,
        batch_tokens: int = LARGEST_BATCH_TOKENS,
        value_bytes: int = 4,
        loads_models: bool = True,
        merges_rows: bool = True,
        selects_by_rank: bool = False,
        threads: int | None = None,
    ) -> int:
        """An estimate for one worker on a CPU: its libraries, the models it holds, and one batch's activations.

        A merge that measures, aligns and evaluates nothing loads no model: it holds blocks of rows.

        It was 1.0 to 1.2 times what was measured with two BERT-base and two MiniLM, rows of 32 and of 500 tokens,
        float32 and bfloat16.

        Args:
            longest_row: tokens; the most that the model takes when it is not known yet.
            statistics: what is measured; Fisher information takes a backward pass, which keeps the activations of
                every layer.
            models_beside: those held beside the experts: the merge, the plain average.
            tokens_held: of all rows, with padding, where layers are refitted: that keeps every expert loaded, and the
                hidden states of every token in the expert and in the merge.
            batch_rows: of a batch that keeps to no budget of tokens.
            batch_tokens: with padding, of any other batch; a longer row is one of its own.
            value_bytes: of an activation: 4 in float32, 2 in bfloat16.
            merges_rows: whether tensors are merged by blocks, else whole, one after the other.
            selects_by_rank: whether the method looks for values of a rank among a tensor's.
            threads: each of which merges a tensor; by default one for each core of this machine.
        """
        if not loads_models:
            merging = self._merging_bytes(merges_rows, selects_by_rank, threads or os.cpu_count() or 1)
            return RUNTIME_BYTES + merging + self._run_bytes
        family = required_family(self)
        config = self.checkpoints[0].config
        sizes = {what: family.size(config, what) for what in family.config_names}
        longest = family.max_tokens(config) if longest_row is None else longest_row
        # Held in float32, whatever they are stored in: the cache's models, and what is evaluated beside them.
        models = [4 * sum(math.prod(t.shape) for t in info.tensors.values()) for info in self.checkpoints]
        held = sum(models) if tokens_held else min(sum(models), CACHE_BYTES + max(models))
        merged = 4 * sum(math.prod(tensor.shape) for tensor in self.backbone)
        held += models_beside * max(*models, merged) + tokens_held * 2 * 4 * sizes["hidden"]
        # Per token and layer about 16 vectors of the hidden size, 4 of the feed-forward size, and rows of attention.
        attention = sizes["heads"] * longest
        per_layer = 16 * sizes["hidden"] + 4 * sizes["neurons"] + family.attention_rows * attention
        tokens = max(batch_tokens, longest * (batch_rows or 1))
        passing = PASSING_ATTENTION_ROWS * attention
        one_pass = tokens * (per_layer + passing) * value_bytes
        # Where layers are refitted, a batch's activations in the expert and in the merge are there side by side.
        phases = [2 * one_pass if tokens_held else one_pass]
        if Statistic.MASK_FISHER in statistics:
            # In bfloat16 beside the model's weights, rounded.
            rounded = max(models) // 2 if value_bytes == 2 else 0
            phases.append(tokens * (sizes["layers"] * per_layer + passing) * value_bytes + rounded)
        if Statistic.FISHER in statistics:
            activations = longest * (sizes["layers"] * per_layer + passing) * value_bytes
            phases.append(activations + FISHER_VALUE_BYTES * max(models) // 4)
        if Statistic.GRAM in statistics:
            matrices = [8 * seen.width**2 for seen in self.linear_inputs]
            phases[0] += min(sum(matrices), max(GRAM_BYTES, max(matrices)))
            phases.append(GRAM_MATRICES * max(matrices))
        phases.append(self._merging_bytes(merges_rows, selects_by_rank, threads or os.cpu_count() or 1))
        return RUNTIME_BYTES + held + max(phases)

    @property
    def layers(self) -> int:
        return len({tensor.slot.layer for tensor in self.backbone if tensor.slot.layer is not None})

    @property
    def owned(self) -> Mapping[str, Sequence[Place]]:
        """The places of the tensors that nodes own slices of, by score name."""
        places: dict[str, list[Place]] = {}
        for tensor in self.backbone:
            if tensor.slot.owner is not None:
                places.setdefault(tensor.slot.owner.score, []).append(tensor.place)
        return places

    @property
    def _run_bytes(self) -> int:
        """What it takes to run a published model once, where that is done: its weights, in float32 if in float16."""
        heads = (sum(tensor.nbytes for tensor in head) for head in self.heads)
        stored = sum(tensor.nbytes for tensor in self.backbone) + max(heads, default=0)
        return 0 if stored > RUN_BYTES else stored * (3 if self.dtype == "F16" else 1)

    def _merging_bytes(self, merges_rows: bool, selects_by_rank: bool, threads: int) -> int:
        """Every model's version of what is merged at once, the base's, and what methods make of them."""
        merged = [tensor for tensor in self.backbone if not tensor.is_copied]
        value_bytes = 8 if any(source.dtype == "F64" for tensor in merged for source in tensor.sources) else 4
        of_each = VERSIONS_HELD + selects_by_rank  # its samples
        versions = of_each * len(self.all_checkpoints) + MERGING_COPIES
        largest = max((math.prod(tensor.shape) for tensor in merged), default=0)
        if not merges_rows:
            return value_bytes * versions * largest
        longest_row = max((math.prod(tensor.shape[1:]) for tensor in merged), default=0)
        held = versions * min(largest, max(BLOCK_ELEMENTS, longest_row))
        if selects_by_rank:  # what is held is put together
            held += 2 * HELD_BLOCKS * min(largest, BLOCK_ELEMENTS)
        return value_bytes * threads * held

    def owners(self) -> Mapping[str, int]:
        """How many backbone tensors are owned by `heads`, by `neurons`, and by no node (`rest`)."""
        return Counter(str(t.slot.owner.nodes) if t.slot.owner else "rest" for t in self.backbone)


def plan_merge(
    checkpoints: Sequence[CheckpointInfo],
    dtype: Dtype = "auto",
    base: CheckpointInfo | None = None,
    heads: Heads | None = None,
    vocabulary: VocabularyPolicy = "error",
    config_from: CheckpointInfo | None = None,
    choices: Choices | None = None,
) -> MergePlan:
    """Check that the checkpoints fit each other, and their ancestor `base`, and lay out the merge.

    Args:
        heads: whether each model keeps its own; by default it does where a table tells heads from the backbone.
        vocabulary: of the output, where the tokenizers differ; `error` refuses that.
        config_from: the one of them whose configuration and tokenizer are published; None: the first's, and models
            that differ in settings that no shape shows are refused.
        choices: what a recipe says of single tokens.

    Raises:
        InvalidRequest: heads cannot be kept.
        InvalidCheckpoint: a tensor that no rule of the architecture's table owns, a size that contradicts the config.
        IncompatibleCheckpoints: names the tensor or setting that differs, with both values.
    """
    identities = [identify(info) for info in checkpoints]
    if base is not None and config_from is base:
        check_settings(base)
    whose = next((i.info for i, info in zip(identities, checkpoints, strict=True) if info is config_from), config_from)
    checkpoints = [identity.info for identity in identities]
    first = checkpoints[0]
    tables = [_table_of(info) for info in checkpoints]
    for info in checkpoints[1:]:
        layouts.check_architectures(first, info)
    notes = list(dict.fromkeys(note for identity in identities for note in identity.notes))
    owner = None
    if vocabulary == "error" and pads_differ(checkpoints, base):
        vocabulary, owner = "base", whose or first
        notes.append(_note_of_padding(checkpoints, base, owner))
    asked = _Asked(dtype, base, heads == "merged", vocabulary, whose, choices, owner)
    if tables[0] is None:
        if heads == "per_model":
            problem = f"no table tells the head of {_named(first)} from the rest: all tensors are merged"
            raise InvalidRequest(f"{problem}; leave output.heads out, or say merged", field="output.heads")
        plan = _planned_by_name(identities, asked)
    else:
        plan = _planned_by_table(tables[0], identities, asked)
    for identity in identities:
        check_tensors(identity)
    return replace(plan, notes=(*notes, *plan.notes))


@dataclass(frozen=True)
class _Asked:
    """The settings of a merge in a request, beside its models."""

    dtype: Dtype
    base: CheckpointInfo | None
    merges_heads: bool
    vocabulary: VocabularyPolicy
    config_from: CheckpointInfo | None
    choices: Choices | None
    rows_of: CheckpointInfo | None
    """The model whose number of rows the output has, if only the padding of matrices differs."""

    def aligned(self, checkpoints: Sequence[CheckpointInfo]) -> Vocabulary | None:
        if self.vocabulary == "error":
            return None
        return align_vocabularies(self.vocabulary, checkpoints, self.base, self.rows_of, self.choices)


def _note_of_padding(checkpoints: Sequence[CheckpointInfo], base: CheckpointInfo | None, owner: CheckpointInfo) -> str:
    rows = {info.source: vocabulary_size(info.config) for info in (*checkpoints, *([base] if base else ()))}
    listed = ", ".join(f"{count} in {source}" for source, count in rows.items())
    return (
        f"embedding matrices have different numbers of rows for the same tokens ({listed}): those beyond the tokens "
        f"are padding, and the merge has the rows of {owner.source}"
    )


def _planned_by_table(family: Family, identities: Sequence[Identity], asked: _Asked) -> MergePlan:
    checkpoints, base, vocabulary = [identity.info for identity in identities], asked.base, asked.vocabulary
    first, everyone = checkpoints[0], [*checkpoints, *([base] if base else ())]
    tasks, differing, notes = [], set[str](), list[str]()
    slots = [_slots(identity, family) for identity in identities]
    for info, of in zip(checkpoints, slots, strict=True):
        require_tokenizer(info)
        _check_sizes(info, of, family)
        tasks.append(task_of(info))
        differing |= _check_settings(first, info, family, asked)
        if vocabulary == "error":
            check_vocabulary(first, info)
        if asked.merges_heads:
            layouts.check_labels(first, info)
            if tasks[-1].problem != tasks[0].problem:
                problem = f"their heads have different tasks: {tasks[0].problem}, {tasks[-1].problem}"
                raise IncompatibleCheckpoints(first.source, info.source, problem)
    ancestor: dict[str, TensorInfo] = {}
    if base is not None:
        ancestor = _ancestor(
            first, base, family, (Kind.UNREAD,) if asked.merges_heads else (Kind.HEAD, Kind.UNREAD), vocabulary
        )
        differing |= _differences_from_base(first, base, family, asked, notes)
    # A base that was pre-trained without a pooler is the ancestor of none: each began at random, like the heads.
    kept = {Kind.HEAD}
    if base is not None and Kind.POOLER not in {slot.kind for name in ancestor if (slot := family.slot(name))}:
        kept.add(Kind.POOLER)
    apart = {Kind.UNREAD} if asked.merges_heads else {*kept, Kind.UNREAD}
    aligned = asked.aligned(checkpoints)
    place = partial(_place, family.size(first.config, "layers"))
    named = [{name: tensor for name, (_, tensor) in of.items()} for of in slots]
    backbone, alone = [], []
    for name, (slot, tensor) in slots[0].items():
        if slot.kind in apart:
            continue
        origin = None
        if base is not None:
            found = ancestor.get(slot.name)
            if slot.kind in kept and (found is None or found.shape != tensor.shape):
                alone.append(name)
            else:
                origin = (base, found)
        backbone.append(merged_tensor(slot, place(slot), checkpoints, named, name, origin, asked.dtype, aligned))
    for info, of in zip(checkpoints, slots, strict=True):
        for name, (slot, _) in of.items():
            if slot.kind not in apart and name not in slots[0]:
                raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is in the second only")
    if base is not None:
        notes += _notes_of_heads(base, alone)
    more = notes_of_settings(everyone, differing, asked.config_from)
    published = [with_settings_of(info, asked.config_from) for info in checkpoints]
    whole = MergePlan(
        family,
        tuple(checkpoints),
        base,
        tuple(tasks),
        tuple(backbone),
        ((),),
        tuple(published[:1]),
        vocabulary=aligned,
        config_from=asked.config_from,
        notes=(*notes, *more),
    )
    if asked.merges_heads:
        return whole
    if Kind.POOLER in kept and (poolers := [name for name, (slot, _) in slots[0].items() if slot.kind is Kind.POOLER]):
        note = f"{base.source if base else ''} has no {_listed(poolers)}: every model kept its own, with its head"
        whole = replace(whole, notes=(*whole.notes, note))
    heads = tuple(
        tuple(
            PlannedTensor(
                slot, place(slot), tensor.shape, output_dtype([tensor], asked.dtype), (tensor,), is_copied=True
            )
            for slot, tensor in of.values()
            if slot.kind in kept
        )
        for of in slots
    )
    return replace(whole, heads=heads, published=tuple(published))


def _planned_by_name(identities: Sequence[Identity], asked: _Asked) -> MergePlan:
    """Every tensor is merged with those of its name; buffers are copied, and copies of tied weights left out."""
    checkpoints, base, vocabulary = [identity.info for identity in identities], asked.base, asked.vocabulary
    first, notes, differing = checkpoints[0], list[str](), set[str]()
    everyone = [*checkpoints, *([base] if base else ())]
    if base is not None and base.model_type != first.model_type:
        layouts.check_architectures(first, base)
    for identity in identities:
        if identity.known is None or identity.known.converted:  # of others, `check_tensors` knows better
            layouts.check_checkpoint(identity.info)
        else:
            check_present(identity)
    for info in everyone:
        layouts.check_weights(info)
        besides: set[str] = set()
        if vocabulary == "error":
            _check_vocabulary_size(first, info)
            if first.vocabulary and info.vocabulary:
                check_vocabulary(first, info)
        else:
            check_names_tell_tokens(info)
            besides = {*token_keys(first.config), *token_keys(info.config)}
        if base is not None and info is base:
            differing |= _differences_from_base(first, info, None, asked, notes, besides)
        else:
            differing |= {*layouts.check_configs(first, info, besides, settles=asked.config_from is not None)}
    aligned = asked.aligned(checkpoints)
    read = [
        replace(i.info, tensors={n: t for n, t in i.info.tensors.items() if n not in i.leftovers}) for i in identities
    ]
    states = [layouts.tensors_by_name(info, read[0]) for info in (*read, *([base] if base else ()))]
    own, tied = without_copies(identities[0], states, len(checkpoints))
    versions, ancestor = own[: len(checkpoints)], own[-1] if base else {}
    notes += _left_out_unread(identities, versions)
    stacks = layouts.stacks_of(versions[0])
    backbone, alone = [], []
    for name, tensor in versions[0].items():
        slot, place = layouts.slot_of(name), layouts.place_of(name, stacks)
        if layouts.is_buffer(tensor) or _is_unsaved(identities[0], name):
            for info, other in zip(everyone, own, strict=True):
                if name in other:
                    _check_shape(first, tensor, info, other[name])
            source = ancestor.get(name, tensor)
            backbone.append(PlannedTensor(slot, place, tensor.shape, source.dtype, (source,), is_copied=True))
            continue
        origin = None
        if base is not None:
            found = ancestor.get(name) or tied_in_base(identities[0], name, base.config, ancestor)
            if _is_head(identities[0], name) and (found is None or found.shape[1:] != tensor.shape[1:]):
                alone.append(name)
            else:
                origin = (base, found)
        backbone.append(merged_tensor(slot, place, checkpoints, versions, name, origin, asked.dtype, aligned))
    for info, state in zip(checkpoints, versions, strict=True):
        for name, tensor in state.items():
            is_derived = layouts.is_buffer(tensor) or _is_unsaved(identities[0], name)
            if name not in versions[0] and not is_derived:
                raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is in the second only")
    if not any(t.dtype in FLOATS for t in backbone):
        raise InvalidCheckpoint(first.source, "it has no tensor of floats to merge")
    if base is not None:
        notes += _notes_of_heads(base, alone)
    more = notes_of_settings(everyone, differing, asked.config_from)
    published = (with_settings_of(first, asked.config_from),)
    nothing = tuple(None for _ in checkpoints)
    return MergePlan(
        None,
        tuple(checkpoints),
        base,
        nothing,
        tuple(backbone),
        ((),),
        published,
        tuple(tied),
        aligned,
        asked.config_from,
        notes=(*notes, *more),
    )


def _is_head(first: Identity, name: str) -> bool:
    """Whether a tensor is what fine-tuning may have started from scratch, so that a base may lack it."""
    if layouts.layer_of(name) is not None:
        return False
    if "pooler" in name.split(".") or first.known is None or first.known.converted:
        return layouts.ends_with(name, (*layouts.OUTPUT_EMBEDDINGS, *layouts.HEADS)) or "pooler" in name.split(".")
    own = own_names(first.known, [name])[name]
    is_body = first.known.name.endswith("Model") and not first.known.is_pre_training
    return (
        not is_body
        and not own.startswith(f"{first.known.prefix}.")
        and not layouts.ends_with(name, (*layouts.EMBEDDINGS, *layouts.SHARED_EMBEDDINGS))
    )


def _is_unsaved(first: Identity, name: str) -> bool:
    """Whether the library computes the tensor from the configuration, and does not save it."""
    known = first.known
    return known is not None and bool(known.unsaved) and own_names(known, [name])[name] in known.unsaved


def _left_out_unread(identities: Sequence[Identity], states: Sequence[dict[str, TensorInfo]]) -> list[str]:
    """Notes of tensors that the class does not read; those that only some models have are removed."""
    notes = []
    known = identities[0].known
    if known is None or known.converted:
        return []
    unread = {name for i in identities for name in (*i.unread, *(i.names[one] for one in i.unread))}
    unread = {name for state in states for name in state if name in unread and not layouts.is_buffer(state[name])}
    for name in sorted(unread):
        if not all(name in state for state in states):
            for state in states:
                state.pop(name, None)
            notes.append(f"tensor {name} was left out: only some models have it, and {known.name} does not read it")
    merged = sorted(name for name in unread if all(name in state for state in states))
    if merged:
        notes.append(f"{_listed(merged)} is not one that {known.name} reads; it was merged all the same")
    return notes


def _notes_of_heads(base: CheckpointInfo, alone: Sequence[str]) -> list[str]:
    if not alone:
        return []
    return [f"{base.source} has no {_listed(alone)} to compare with: it was averaged by the models' weights"]


def _listed(names: Sequence[str]) -> str:
    more = f" (like {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


def _differences_from_base(
    first: CheckpointInfo,
    base: CheckpointInfo,
    family: Family | None,
    asked: _Asked,
    notes: list[str],
    besides: Collection[str] = (),
) -> set[str]:
    """Settings in which the base differs, if it is the one whose settings count. A base is never run, so that those
    which only matter then are noted.

    Raises:
        IncompatibleCheckpoints: a size or another setting that says what tensors are for.
    """
    found = set()
    compared = {*family.config_names.values(), *family.settings} - {family.padding_position} if family else None
    for key, ours, theirs in layouts.differences(completed(first.config), completed(base.config)):
        if key in besides or key.endswith("_token_id") or key in layouts.STRUCTURAL:
            continue
        if compared is not None and key not in compared:
            continue
        if not layouts.shows_in_no_shape(key, ours, theirs):
            problem = f"{key} differs in config.json: {layouts.short(ours)}, {layouts.short(theirs)}"
            raise IncompatibleCheckpoints(first.source, base.source, problem)
        found.add(key)
        if asked.config_from is not base:
            values = f"{layouts.short(ours)} in the models, {layouts.short(theirs)} in {base.source}"
            notes.append(f"{key} differs from the base's: {values}; the base is not run, so that of the models counts")
    return found if asked.config_from is base else set()


def with_settings_of(
    info: CheckpointInfo, whose: CheckpointInfo | None, besides: Collection[str] = ()
) -> CheckpointInfo:
    """A checkpoint as it is published where another one's configuration counts. See `layouts.with_settings_of`."""
    if whose is None:
        return info
    return replace(info, config=layouts.with_settings_of(info.config, whose.config, besides))


def notes_of_settings(
    everyone: Sequence[CheckpointInfo], keys: Collection[str], whose: CheckpointInfo | None
) -> list[str]:
    """Notes of settings that differ and change what a model computes, with the values of all."""
    if whose is None:
        return []
    notes = []
    for key in sorted(keys):
        values = {info.source: layouts.short(value_at(completed(info.config), key)) for info in everyone}
        listed = ", ".join(f"{value} in {source}" for source, value in values.items())
        notes.append(f"{key} differs: {listed}; that of {whose.source} counts, whose configuration is published")
    return notes


def merged_tensor(
    slot: Slot,
    place: Place,
    checkpoints: Sequence[CheckpointInfo],
    named: Sequence[Mapping[str, TensorInfo]],
    name: str,
    origin: tuple[CheckpointInfo, TensorInfo | None] | None,
    dtype: Dtype,
    vocabulary: Vocabulary | None,
) -> PlannedTensor:
    """The tensor `name` of every checkpoint, with the base's.

    Args:
        named: tensors of each checkpoint.
        origin: the base, and the tensor in it.
    """
    tensor = named[0][name]
    shape, rows = tensor.shape, None
    of_first = vocabulary_size(checkpoints[0].config)
    if vocabulary is not None and of_first is not None and is_token_indexed(name, shape, of_first):
        shape, rows = (vocabulary.rows, *shape[1:]), vocabulary.token_rows
    by_token = rows is not None
    sources = _sources(checkpoints, named, name, by_token)
    if by_token:
        for info, source in zip(checkpoints, sources, strict=True):
            check_rows(info, source)
    if origin is None:
        return PlannedTensor(slot, place, shape, output_dtype(sources, dtype), tuple(sources), token_rows=rows)
    base, found = origin
    _check_base(base, found, checkpoints[0], tensor, by_token)
    if by_token and found is not None:
        check_rows(base, found)
    return PlannedTensor(slot, place, shape, output_dtype(sources, dtype), tuple(sources), found, token_rows=rows)


def required_family(plan: MergePlan) -> Family:
    """The table that measuring a model needs. Raises InvalidCheckpoint when its architecture has none."""
    if plan.family is None:
        info = plan.checkpoints[0]
        known = ", ".join(family.head.architecture for family in FAMILIES.values())
        raise InvalidCheckpoint(info.source, f"{_named(info)} has no table to measure it by; available are {known}")
    return plan.family


def required_task(plan: MergePlan) -> Task:
    """Of a plan of one model. Raises InvalidCheckpoint when its architecture has no table."""
    required_family(plan)
    [task] = [task for task in plan.tasks if task is not None]
    return task


def _named(info: CheckpointInfo) -> str:
    return f"architecture '{info.architecture}'" if info.architecture else f"model_type '{info.model_type}'"


def require_tokenizer(info: CheckpointInfo) -> None:
    """Raises InvalidCheckpoint when there is none: without one, transformers makes up an empty one."""
    if not info.vocabulary:
        raise InvalidCheckpoint(info.source, "no tokenizer is there; save it beside the weights")


def _table_of(info: CheckpointInfo) -> Family | None:
    """Raises InvalidCheckpoint where there is one, and the checkpoint says what is not available of it."""
    family = FAMILIES.get(info.model_type)
    if family is None or info.architecture != family.head.architecture:
        return None
    if info.config.get("quantization_config"):
        raise InvalidCheckpoint(info.source, "its weights are quantised; merge the checkpoints before quantising them")
    if info.config.get("is_decoder"):
        raise InvalidCheckpoint(info.source, "is_decoder is not available for this family")
    for key, only in family.supported.items():
        value = family.setting(info.config, key)
        if value != only:
            raise InvalidCheckpoint(info.source, f"{key} {value!r} is not available for this family; {only!r} is")
    return family


def _check_sizes(info: CheckpointInfo, slots: Mapping[str, tuple[Slot, TensorInfo]], family: Family) -> None:
    try:
        sizes = {what: family.size(info.config, what) for what in family.config_names}
        family.max_tokens(info.config)
    except ValueError as error:
        raise InvalidCheckpoint(info.source, str(error)) from error
    if sizes["hidden"] % sizes["heads"]:
        raise InvalidCheckpoint(info.source, f"hidden size {sizes['hidden']} is no multiple of {sizes['heads']} heads")
    owned = {Kind.QUERY: (0, "hidden"), Kind.UP: (0, "neurons"), Kind.DOWN: (1, "neurons")}
    layers: dict[int, set[str]] = {}
    for slot, tensor in slots.values():
        if slot.layer is not None:
            layers.setdefault(slot.layer, set()).add(slot.name.removeprefix(family.layer_path(slot.layer)))
        if slot.kind in owned and not slot.is_bias:
            axis, what = owned[slot.kind]
            if len(tensor.shape) != 2 or tensor.shape[axis] != sizes[what]:
                raise InvalidCheckpoint(
                    info.source,
                    f"tensor {tensor.name} has shape {list(tensor.shape)}, config.json says {sizes[what]} {what}",
                )
    if len(layers) != sizes["layers"] or max(layers) != sizes["layers"] - 1:
        raise InvalidCheckpoint(info.source, f"{len(layers)} layers are there, config.json says {sizes['layers']}")
    everywhere = set.union(*layers.values())
    for layer, names in layers.items():
        for name in sorted(everywhere - names):
            raise InvalidCheckpoint(info.source, f"no tensor {family.layer_path(layer)}{name}; other layers have it")


def _check_settings(first: CheckpointInfo, info: CheckpointInfo, family: Family, asked: _Asked) -> set[str]:
    """Settings in which they may differ, since it is said whose count, and do.

    Raises:
        IncompatibleCheckpoints: names the setting and both values.
    """
    differing = set()
    for key in (*family.config_names.values(), *family.settings):
        if key == "vocab_size" and asked.vocabulary != "error":
            continue
        ours, theirs = family.setting(first.config, key), family.setting(info.config, key)
        if layouts.same(ours, theirs):
            continue
        is_size = key in (*family.config_names.values(), family.padding_position)
        is_free = not is_size and layouts.shows_in_no_shape(key, ours, theirs)
        if not is_free or asked.config_from is None:
            advice = f"; {VOCABULARY_ADVICE}" if key == "vocab_size" else ""
            advice = f"; {layouts.SETTINGS_ADVICE}" if is_free else advice
            raise IncompatibleCheckpoints(first.source, info.source, f"{key} differs: {ours!r}, {theirs!r}{advice}")
        differing.add(key)
    return differing


def _check_vocabulary_size(first: CheckpointInfo, info: CheckpointInfo) -> None:
    ours, theirs = vocabulary_size(first.config), vocabulary_size(info.config)
    if None not in (ours, theirs) and ours != theirs:
        problem = f"vocab_size differs: {ours!r}, {theirs!r}; {VOCABULARY_ADVICE}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def check_vocabulary(first: CheckpointInfo, info: CheckpointInfo, advice: str = VOCABULARY_ADVICE) -> None:
    """Raises IncompatibleCheckpoints where their tokenizers have other tokens, or other ids of them."""
    common = first.vocabulary.keys() & info.vocabulary.keys()
    if not common:
        problem = "their tokenizers are stored in different forms; save both as tokenizer.json, by save_pretrained()"
        raise IncompatibleCheckpoints(first.source, info.source, problem)
    if all(first.vocabulary[form] != info.vocabulary[form] for form in common):
        problem = f"their tokenizers have different vocabularies; {advice}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def _ancestor(
    first: CheckpointInfo,
    base: CheckpointInfo,
    family: Family,
    apart: Collection[Kind],
    vocabulary: VocabularyPolicy,
) -> dict[str, TensorInfo]:
    """The base's backbone by canonical name, without what is `apart`: where heads are kept, it may have any or none.
    Its names may lack the family's prefix."""
    if base.model_type != family.model_type:
        raise IncompatibleCheckpoints(
            first.source, base.source, f"architectures differ: {first.model_type}, {base.model_type}"
        )
    if base.config.get("quantization_config"):
        raise InvalidCheckpoint(base.source, "its weights are quantised; name the base before quantising")
    for key in family.config_names.values():
        ours, theirs = first.config.get(key), base.config.get(key)
        if not layouts.same(ours, theirs):
            raise IncompatibleCheckpoints(first.source, base.source, f"{key} differs: {ours!r}, {theirs!r}")
    if vocabulary == "error":
        _check_vocabulary_size(first, base)
    if base.vocabulary and vocabulary == "error":
        check_vocabulary(first, base)
    found = {}
    for tensor in base.tensors.values():
        slot = family.slot(tensor.name) or family.slot(family.prefix + tensor.name)
        if slot is not None and slot.kind not in apart:
            if slot.name in found:
                raise InvalidCheckpoint(base.source, f"tensor {slot.name} is there under two spellings")
            found[slot.name] = tensor
    return found


def _check_base(
    base: CheckpointInfo, found: TensorInfo | None, first: CheckpointInfo, tensor: TensorInfo, by_token: bool
) -> None:
    if found is None:
        raise IncompatibleCheckpoints(first.source, base.source, f"tensor {tensor.name} is missing in the base")
    if found.shape[by_token:] != tensor.shape[by_token:]:
        raise IncompatibleCheckpoints(
            first.source,
            base.source,
            f"tensor {tensor.name} has shape {list(tensor.shape)}, in the base {list(found.shape)}",
        )
    if found.dtype not in FLOATS:
        raise InvalidCheckpoint(base.source, f"tensor {found.name} has dtype {found.dtype}, not a float")


def _slots(identity: Identity, family: Family) -> dict[str, tuple[Slot, TensorInfo]]:
    info, slots = identity.info, dict[str, tuple[Slot, TensorInfo]]()
    for tensor in info.tensors.values():
        if tensor.name in identity.leftovers:
            continue
        slot = family.slot(tensor.name)
        if slot is None:
            raise InvalidCheckpoint(
                info.source, f"tensor {tensor.name} is unknown in {family.model_type}; nothing is averaged by guess"
            )
        if slot.kind is not Kind.UNREAD and tensor.dtype not in FLOATS:
            raise InvalidCheckpoint(info.source, f"tensor {tensor.name} has dtype {tensor.dtype}, not a float")
        if slot.name in slots:
            raise InvalidCheckpoint(info.source, f"tensor {slot.name} is there under two spellings")
        slots[slot.name] = (slot, tensor)
    return slots


def _sources(
    checkpoints: Sequence[CheckpointInfo], named: Sequence[Mapping[str, TensorInfo]], name: str, by_token: bool
) -> list[TensorInfo]:
    """The tensor of each checkpoint. Raises IncompatibleCheckpoints where one has none, or one of another shape."""
    first, tensor = checkpoints[0], named[0][name]
    for info, tensors in zip(checkpoints, named, strict=True):
        if name not in tensors:
            raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is missing in the second")
        _check_shape(first, tensor, info, tensors[name], by_token)
        if tensors[name].dtype not in FLOATS:
            raise InvalidCheckpoint(info.source, f"tensor {name} has dtype {tensors[name].dtype}, not a float")
    return [tensors[name] for tensors in named]


def _check_shape(
    first: CheckpointInfo, tensor: TensorInfo, info: CheckpointInfo, found: TensorInfo, by_token: bool = False
) -> None:
    if found.shape[by_token:] != tensor.shape[by_token:]:  # a vocabulary may have any number of rows
        raise IncompatibleCheckpoints(
            first.source,
            info.source,
            f"tensor {tensor.name} has shape {list(tensor.shape)} in the first, {list(found.shape)} in the second",
        )


def _place(layers: int, slot: Slot) -> Place:
    if slot.layer is not None:
        return Place(slot.name, slot.layer / max(1, layers - 1), slot.layer, layers)
    return Place(slot.name, 0.0 if slot.kind in (Kind.EMBEDDING, Kind.EMBEDDING_PROJECTION) else 1.0)


def output_dtype(sources: Sequence[TensorInfo], dtype: Dtype) -> str:
    """The asked dtype; for `auto` the inputs' own, and float32 where they disagree (float64 where one is)."""
    if dtype != "auto":
        return TORCH_NAMES[dtype]
    found = {source.dtype for source in sources}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"
