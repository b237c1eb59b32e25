"""The layout of a merge, from headers alone: what every output tensor is, who owns its slices, where it comes from.

Whatever can be refused is refused here, before a byte of weights is read.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from worker.engine.catalog.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.families import FAMILIES, Family, Kind, Slot
from worker.engine.catalog.headers import DTYPE_BYTES, CheckpointInfo, TensorInfo
from worker.engine.catalog.labels import Task, task_of
from worker.engine.catalog.methods import LARGEST_BATCH_TOKENS, Statistic
from worker.engine.catalog.spec import Dtype, VocabularyPolicy
from worker.engine.catalog.values import Place
from worker.engine.catalog.vocabulary import TokenRows, Vocabulary, align_vocabularies, is_token_indexed

TORCH_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATS = tuple(TORCH_NAMES.values())
CACHE_BYTES = 2_000_000_000  # models kept loaded
PASSING_ATTENTION_ROWS = 2  # those that only the layer at work holds
GRAM_BYTES = 500_000_000  # sums of Gram matrices held at once; those of a larger model take several passes
GRAM_MATRICES = 6  # in float64, while a layer is merged: the sum, its factor, one model's, and what is between
FISHER_VALUE_BYTES = 16  # for each parameter: its sum, its gradient and what is between
MERGING_COPIES = 6  # of a tensor in float32, beside one for each model, while it is merged
VOCABULARY_ADVICE = "output.vocabulary 'base' or 'union' merges them token by token"
RUNTIME_BYTES = 600_000_000  # torch and transformers loaded: measured 450 to 600 MB


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `sources` has the tensor of each model, in the models' order; `base` the ancestor's."""

    slot: Slot
    place: Place
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[TensorInfo, ...]
    base: TensorInfo | None = None
    token_rows: TokenRows | None = None
    """Of a tensor with a row for each token, where vocabularies differ: its rows in `sources` and `base`."""

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LinearInput:
    """What linear layers read, (…, width), seen at the input of `module`; see `Slot.input`."""

    name: str
    module: str
    width: int


@dataclass(frozen=True)
class MergePlan:
    """Output tensors in the order in which they are written: the backbone once, and each model's own head."""

    family: Family
    checkpoints: tuple[CheckpointInfo, ...]
    base: CheckpointInfo | None
    tasks: tuple[Task, ...]
    backbone: tuple[PlannedTensor, ...]
    heads: tuple[tuple[PlannedTensor, ...], ...]
    vocabulary: Vocabulary | None = None
    """None where all models have the same."""

    @property
    def linear_inputs(self) -> list[LinearInput]:
        """Of the backbone's linear layers."""
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
        return sum(t.nbytes for t in self.backbone) + sum(t.nbytes for head in self.heads for t in head)

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
    ) -> int:
        """An estimate for one worker on a CPU: its libraries, the models it holds, and one batch's activations.

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
        """
        config = self.checkpoints[0].config
        sizes = {what: self.family.size(config, what) for what in self.family.config_names}
        longest = self.family.max_tokens(config) if longest_row is None else longest_row
        # Held in float32, whatever they are stored in: the cache's models, and what is evaluated beside them.
        models = [4 * sum(math.prod(t.shape) for t in info.tensors.values()) for info in self.checkpoints]
        held = sum(models) if tokens_held else min(sum(models), CACHE_BYTES + max(models))
        merged = 4 * sum(math.prod(tensor.shape) for tensor in self.backbone)
        held += models_beside * max(*models, merged) + tokens_held * 2 * 4 * sizes["hidden"]
        # Per token and layer about 16 vectors of the hidden size, 4 of the feed-forward size, and rows of attention.
        attention = sizes["heads"] * longest
        per_layer = 16 * sizes["hidden"] + 4 * sizes["neurons"] + self.family.attention_rows * attention
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
        # While a tensor is merged as a whole: every model's version, the base's, and what methods make of them.
        largest = max(math.prod(tensor.shape) for tensor in self.backbone)
        phases.append(4 * largest * (len(self.checkpoints) + MERGING_COPIES))
        return RUNTIME_BYTES + held + max(phases)

    def owners(self) -> Mapping[str, int]:
        """How many backbone tensors are owned by `heads`, by `neurons`, and by no node (`rest`)."""
        return Counter(str(t.slot.owner.nodes) if t.slot.owner else "rest" for t in self.backbone)


def plan_merge(
    checkpoints: Sequence[CheckpointInfo],
    dtype: Dtype = "auto",
    base: CheckpointInfo | None = None,
    vocabulary: VocabularyPolicy = "error",
) -> MergePlan:
    """Check that the checkpoints fit each other, and their ancestor `base`, and lay out the merge.

    Args:
        vocabulary: of the output, where the tokenizers differ; `error` refuses that.

    Raises:
        InvalidCheckpoint: an unknown architecture, a tensor that no rule owns, a size that contradicts the config.
        IncompatibleCheckpoints: names the tensor or setting that differs, with both values.
    """
    family = _family(checkpoints[0])
    first = checkpoints[0]
    tasks = []
    for info in checkpoints:
        if _family(info) is not family:
            raise IncompatibleCheckpoints(
                first.source, info.source, f"architectures differ: {first.model_type}, {info.model_type}"
            )
        require_tokenizer(info)
        _check_sizes(info, family)
        tasks.append(task_of(info))
        _check_settings(first, info, family, vocabulary)
        if vocabulary == "error":
            _check_vocabulary(first, info)
    ancestor = _ancestor(first, base, family, vocabulary) if base else {}
    aligned = align_vocabularies(vocabulary, checkpoints, base) if vocabulary != "error" else None
    place = partial(_place, family.size(first.config, "layers"))
    slots = [_slots(info, family) for info in checkpoints]
    backbone = []
    for name, (slot, tensor) in slots[0].items():
        if slot.kind in (Kind.HEAD, Kind.UNREAD):
            continue
        by_token = aligned is not None and is_token_indexed(name)
        sources = [
            _counterpart(first, tensor, info, of, name, by_token) for info, of in zip(checkpoints, slots, strict=True)
        ]
        if base is not None:
            _check_base(base, ancestor.get(slot.name), first, tensor, by_token)
        shape, rows = tensor.shape, None
        if aligned is not None and by_token:
            shape, rows = (aligned.rows, *shape[1:]), aligned.token_rows
        output_dtype = _output_dtype(sources, dtype)
        backbone.append(
            PlannedTensor(slot, place(slot), shape, output_dtype, tuple(sources), ancestor.get(slot.name), rows)
        )
    for info, of in zip(checkpoints, slots, strict=True):
        for name, (slot, _) in of.items():
            if slot.kind not in (Kind.HEAD, Kind.UNREAD) and name not in slots[0]:
                raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is in the second only")
    heads = tuple(
        tuple(
            PlannedTensor(slot, place(slot), tensor.shape, _output_dtype([tensor], dtype), (tensor,))
            for slot, tensor in of.values()
            if slot.kind is Kind.HEAD
        )
        for of in slots
    )
    return MergePlan(family, tuple(checkpoints), base, tuple(tasks), tuple(backbone), heads, aligned)


def require_tokenizer(info: CheckpointInfo) -> None:
    """Raises InvalidCheckpoint when there is none: without one, transformers makes up an empty one."""
    if not info.vocabulary:
        raise InvalidCheckpoint(info.source, "no tokenizer is there; save it beside the weights")


def _family(info: CheckpointInfo) -> Family:
    family = FAMILIES.get(info.model_type)
    if family is None:
        raise InvalidCheckpoint(
            info.source, f"model_type '{info.model_type}' is not available; available: {', '.join(FAMILIES)}"
        )
    if info.architecture not in family.architectures:
        raise InvalidCheckpoint(
            info.source,
            f"architecture '{info.architecture}' is not available; available: {', '.join(family.architectures)}",
        )
    if info.config.get("quantization_config"):
        raise InvalidCheckpoint(info.source, "its weights are quantised; merge the checkpoints before quantising them")
    if info.config.get("is_decoder"):
        raise InvalidCheckpoint(info.source, "is_decoder is not available for this family")
    for key, only in family.supported.items():
        value = family.setting(info.config, key)
        if value != only:
            raise InvalidCheckpoint(info.source, f"{key} {value!r} is not available for this family; {only!r} is")
    return family


def _check_sizes(info: CheckpointInfo, family: Family) -> None:
    try:
        sizes = {what: family.size(info.config, what) for what in family.config_names}
        family.max_tokens(info.config)
    except ValueError as error:
        raise InvalidCheckpoint(info.source, str(error)) from error
    if sizes["hidden"] % sizes["heads"]:
        raise InvalidCheckpoint(info.source, f"hidden size {sizes['hidden']} is no multiple of {sizes['heads']} heads")
    owned = {Kind.QUERY: (0, "hidden"), Kind.UP: (0, "neurons"), Kind.DOWN: (1, "neurons")}
    layers: dict[int, set[str]] = {}
    for slot, tensor in _slots(info, family).values():
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


def _check_settings(first: CheckpointInfo, info: CheckpointInfo, family: Family, vocabulary: VocabularyPolicy) -> None:
    for key in (*family.config_names.values(), *family.settings):
        if key == "vocab_size" and vocabulary != "error":
            continue
        ours, theirs = family.setting(first.config, key), family.setting(info.config, key)
        if ours != theirs:
            what_to_do = f"; {VOCABULARY_ADVICE}" if key == "vocab_size" else ""
            raise IncompatibleCheckpoints(first.source, info.source, f"{key} differs: {ours}, {theirs}{what_to_do}")


def _check_vocabulary(first: CheckpointInfo, info: CheckpointInfo) -> None:
    common = first.vocabulary.keys() & info.vocabulary.keys()
    if not common:
        problem = "their tokenizers are stored in different forms; save both as tokenizer.json, by save_pretrained()"
        raise IncompatibleCheckpoints(first.source, info.source, problem)
    if all(first.vocabulary[form] != info.vocabulary[form] for form in common):
        problem = f"their tokenizers have different vocabularies; {VOCABULARY_ADVICE}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def _ancestor(
    first: CheckpointInfo, base: CheckpointInfo, family: Family, vocabulary: VocabularyPolicy
) -> dict[str, TensorInfo]:
    """The base's backbone by canonical name. It may have any head or none, and names without the family's prefix."""
    if base.model_type != family.model_type:
        raise IncompatibleCheckpoints(
            first.source, base.source, f"architectures differ: {first.model_type}, {base.model_type}"
        )
    if base.config.get("quantization_config"):
        raise InvalidCheckpoint(base.source, "its weights are quantised; name the base before quantising")
    _check_settings(first, base, family, vocabulary)
    if base.vocabulary and vocabulary == "error":
        _check_vocabulary(first, base)
    found = {}
    for tensor in base.tensors.values():
        slot = family.slot(tensor.name) or family.slot(family.prefix + tensor.name)
        if slot is not None and slot.kind not in (Kind.HEAD, Kind.UNREAD):
            if slot.name in found:
                raise InvalidCheckpoint(base.source, f"tensor {slot.name} is there under two spellings")
            found[slot.name] = tensor
    return found


def _check_base(
    base: CheckpointInfo, found: TensorInfo | None, first: CheckpointInfo, tensor: TensorInfo, by_token: bool
) -> None:
    if found is None:
        raise IncompatibleCheckpoints(first.source, base.source, f"tensor {tensor.name} is missing in the base")
    if found.shape[by_token:] != tensor.shape[by_token:]:  # a vocabulary may have any number of rows
        raise IncompatibleCheckpoints(
            first.source,
            base.source,
            f"tensor {tensor.name} has shape {list(tensor.shape)}, in the base {list(found.shape)}",
        )
    if found.dtype not in FLOATS:
        raise InvalidCheckpoint(base.source, f"tensor {found.name} has dtype {found.dtype}, not a float")


def _slots(info: CheckpointInfo, family: Family) -> dict[str, tuple[Slot, TensorInfo]]:
    slots: dict[str, tuple[Slot, TensorInfo]] = {}
    for tensor in info.tensors.values():
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


def _counterpart(
    first: CheckpointInfo,
    tensor: TensorInfo,
    info: CheckpointInfo,
    slots: Mapping[str, tuple[Slot, TensorInfo]],
    name: str,
    by_token: bool,
) -> TensorInfo:
    if name not in slots:
        raise IncompatibleCheckpoints(first.source, info.source, f"tensor {name} is missing in the second")
    found = slots[name][1]
    if found.shape[by_token:] != tensor.shape[by_token:]:
        raise IncompatibleCheckpoints(
            first.source,
            info.source,
            f"tensor {name} has shape {list(tensor.shape)} in the first, {list(found.shape)} in the second",
        )
    return found


def _place(layers: int, slot: Slot) -> Place:
    if slot.layer is not None:
        return Place(slot.name, slot.layer / max(1, layers - 1))
    return Place(slot.name, 0.0 if slot.kind in (Kind.EMBEDDING, Kind.EMBEDDING_PROJECTION) else 1.0)


def _output_dtype(sources: Sequence[TensorInfo], dtype: Dtype) -> str:
    """The asked dtype; for `auto` the inputs' own, and float32 where they disagree (float64 where one is)."""
    if dtype != "auto":
        return TORCH_NAMES[dtype]
    found = {source.dtype for source in sources}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"
