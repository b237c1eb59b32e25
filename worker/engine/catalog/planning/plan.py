"""The plan of a merge, from headers alone: each output tensor, the nodes that own its slices, and its sources."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.files import IMAGE_PROCESSOR
from worker.engine.catalog.checkpoints.info import DTYPE_BYTES, FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.modules import Modules
from worker.engine.catalog.checkpoints.token_rows import TokenRows
from worker.engine.catalog.checkpoints.vocabulary import Vocabulary
from worker.engine.catalog.families import Family, ScoreName, Slot
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import Task, family_of, known_architectures, reads_images


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor. `sources` has the tensor of each model, in the models' order; `base` the ancestor's."""

    slot: Slot
    place: TensorPlace
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[TensorInfo, ...]
    base: TensorInfo | None = None
    is_copied: bool = False
    """Whether it is not merged, but a copy of its one source, in the dtype of the plan."""
    token_rows: TokenRows | None = None
    """Rows of each token in `sources` and `base`, if the tensor has a row for each token and vocabularies differ."""
    members: tuple[int, ...] | None = None
    """Positions of the models that have `sources`, if the result has slices; None: all models, in order."""

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
    uses: int = 1
    """How many times a pass runs the module."""
    of_decoder: bool = False
    """Whether its tokens are the decoder's, where a model has an encoder too."""


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
    """Tensors that each published model has besides the backbone."""
    published: tuple[CheckpointInfo, ...]
    """The checkpoint whose configuration each published model has, and whose tokenizer, unless another is set."""
    tied: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    """Pairs: a tensor that is left out, because it must equal another of the same checkpoint, and that other."""
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
    """Notes with which the result begins."""

    def tokens_of(self, info: CheckpointInfo) -> CheckpointInfo:
        """Return the checkpoint whose tokenizer, templates and settings are published with `info`'s configuration."""
        if self.vocabulary is not None:
            return self.vocabulary.owner
        return self.config_from if self.config_from is not None and self.config_from.vocabulary else info

    @property
    def merges_heads(self) -> bool:
        return not any(self.heads)

    @property
    def lacking_in_base(self) -> str | None:
        """Name of the first merged tensor that the base lacks; None if it has all, and so can be evaluated as a merge.

        Without a base it lacks the first tensor.
        """
        return next((t.place.name for t in (*self.backbone, *self.module_tensors) if t.base is None), None)

    @property
    def module_tensors(self) -> list[PlannedTensor]:
        """Tensors of the one published model's modules; none where each model keeps its own."""
        if not self.merges_heads:
            return []
        return [tensor for planned in self.modules if planned for of in planned.tensors.values() for tensor in of]

    @property
    def is_of_slices(self) -> bool:
        """Whether the result has its own number of layers, and its tensors come from only some of the models."""
        return any(tensor.members is not None for tensor in self.backbone)

    @property
    def dtype(self) -> str:
        """Data type of most numbers of the backbone."""
        counts: Counter[str] = Counter()
        for tensor in self.backbone:
            counts[tensor.dtype] += math.prod(tensor.shape) if tensor.dtype in FLOATS else 0
        return counts.most_common(1)[0][0]

    @property
    def linear_inputs(self) -> list[LinearInput]:
        """Inputs of the backbone's linear layers."""
        uses = self.family.size(self.checkpoints[0].config, "uses") if self.family else 1
        return [
            LinearInput(
                t.slot.input,
                t.slot.name.removesuffix(".weight"),
                t.shape[0 if t.slot.transposed else 1],
                1 if t.slot.layer is None else uses,
                t.slot.reads_decoder,
            )
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

    @property
    def layers(self) -> int:
        slots = (tensor.slot for tensor in self.backbone)
        return len({(slot.stack, slot.layer) for slot in slots if slot.layer is not None})

    @property
    def owned(self) -> Mapping[ScoreName, Sequence[TensorPlace]]:
        """Places of the tensors that have slices owned by nodes, by score name."""
        places: dict[ScoreName, list[TensorPlace]] = {}
        for tensor in self.backbone:
            for score in dict.fromkeys(tensor.slot.owner.scores) if tensor.slot.owner is not None else ():
                places.setdefault(score, []).append(tensor.place)
        return places

    def owners(self) -> Mapping[str, int]:
        """Number of backbone tensors that are owned by each kind of node, and by no node (`rest`)."""
        owners = (t.slot.owner.kinds if t.slot.owner else () for t in self.backbone)
        return Counter(name for kinds in owners for name in ([kind.name for kind in kinds] or ["rest"]))


def required_family(plan: MergePlan) -> Family:
    """Return the table that measuring a model needs. Raises InvalidCheckpoint when its architecture has none."""
    if plan.family is None:
        raise _without_table(plan.checkpoints[0])
    return plan.family


def usable_sizes(info: CheckpointInfo, family: Family) -> dict[str, int]:
    """Return the sizes that a table reads from a configuration.

    Raises:
        InvalidCheckpoint: a size, or the number of tokens of a row, is no positive number; the message names the key.
    """
    try:
        sizes = {what: family.size(info.config, what) for what in family.config_names}
        family.max_tokens(info.config)
    except ValueError as error:
        raise InvalidCheckpoint(info.source, str(error)) from error
    return sizes


def required_table(info: CheckpointInfo) -> Family:
    """Return the table of a checkpoint's backbone, under its head. Raises InvalidCheckpoint when there is none."""
    family = family_of(info)
    if family is None:
        raise _without_table(info)
    return family


def _without_table(info: CheckpointInfo) -> InvalidCheckpoint:
    family = family_of(info)
    problem = None if family is None else unavailable_setting(info, family)
    if problem is not None:
        return InvalidCheckpoint(info.source, f"it is not measured: {problem}")
    known = ", ".join(known_architectures())
    return InvalidCheckpoint(info.source, f"{named(info)} has no table to measure it by; available are {known}")


def unavailable_setting(info: CheckpointInfo, family: Family) -> str | None:
    """Say which setting of a checkpoint its table is not of; None if there is none."""
    if info.config.get("is_decoder") and not family.is_causal:
        return "is_decoder is not available for this family"
    if info.config.get("is_encoder_decoder") and family.decoder is None:
        return "is_encoder_decoder True is not available for this family; False is"
    for key, only in family.supported.items():
        value = family.setting(info.config, key)
        if value != only and (value or only):  # null and false say alike that something is off
            return f"{key} {value!r} is not available for this family; {only!r} is"
    return None


def required_task(plan: MergePlan) -> Task:
    """Return the task of a plan with one model. Raises InvalidCheckpoint when its architecture has no table."""
    required_family(plan)
    [task] = [task for task in plan.tasks if task is not None]
    return task


def named(info: CheckpointInfo) -> str:
    return f"architecture '{info.architecture}'" if info.architecture else f"model_type '{info.model_type}'"


def require_reader(info: CheckpointInfo) -> None:
    """Raise InvalidCheckpoint when what makes inputs of rows is missing: its tokenizer, or its image processor.

    transformers would make up an empty tokenizer.
    """
    if reads_images(info):
        if IMAGE_PROCESSOR not in companions(info):
            problem = f"no {IMAGE_PROCESSOR} is there; save the image processor beside the weights"
            raise InvalidCheckpoint(info.source, problem, file=IMAGE_PROCESSOR)
    elif not info.vocabulary:
        raise InvalidCheckpoint(info.source, "no tokenizer is there; save it beside the weights")
