"""Makes merges in memory, one after the other, and computes the outputs of the experts' heads with each."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.spec import LEAST_ALIGNMENT_ROWS, EvaluationSpec
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.checkpoints.reader import TORCH_DTYPES
from worker.engine.checkpoints.row_blocks import is_finite
from worker.engine.evaluation.evaluate import head_inputs, head_of, predict
from worker.engine.evaluation.outputs import KeptOutputs, logits_of
from worker.engine.inputs.examples import Example
from worker.engine.merging.head_alignment import aligned
from worker.engine.merging.job_models import JobModel
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, rounded_weights
from worker.engine.runtime.placeholders import is_placeholder
from worker.engine.runtime.progress import OnRows
from worker.engine.search.journal import RungOutcome
from worker.engine.tasks import kind_of
from worker.engine.tasks.metrics import Array

SMALLEST = 1e-12
"""Value of a metric below which less is no better."""
State = Mapping[str, Tensor]
"""Tensors of a backbone, by `Slot.name`."""
HeadTensors = tuple[Tensor, Tensor | None] | None
"""Weight, (outputs, width), and bias, (outputs,) or None, float64; None if heads merge with the backbone."""


class ExpertOutputs:
    """An expert's outputs on its rows: to search on, to judge by, and to align its head on, if it is aligned.

    The expert itself is not kept.
    """

    def __init__(
        self, expert: JobModel, loaded: LoadedModel, outputs: KeptOutputs, precision: Precision, on_rows: OnRows
    ) -> None:
        self.name = expert.name
        self._device, self._precision = loaded.device, precision
        self.evaluation = expert.evaluation
        self.kind = kind_of(loaded.task).evaluated(self.evaluation)  # without the model, which is not kept
        rows = expert.rows
        self.searched, self.held_out, self.alignment = rows.searched, rows.evaluation, rows.alignment
        self.labels, self.held_out_labels = map(self.kind.truth, (self.searched, self.held_out))
        self.head = _head(loaded)
        self.targets: Tensor | None = None

        def predicted(rows: Sequence[Example]) -> Array:
            return outputs.predictions(loaded, expert.digest, rows, self.evaluation, on_rows)

        with rounded_weights(loaded.model, precision):
            self.held_out_predicted = predicted(self.held_out)
            if self.head is None:
                self._logits = torch.from_numpy(predicted(self.searched))
            else:
                self._logits = outputs.logits(loaded, expert.digest, self.searched, self.evaluation, on_rows)
        if self.head is not None and self.alignment:  # of the head as it is, as every merge of this expert has it
            self.targets = outputs.head_outputs(loaded, expert.digest, self.alignment, expert.dataset, on_rows)

    def values_of(self, example: Example) -> int:
        """Return the number of a row's values that are computed with a merge: inputs of the head, or predictions."""
        return self.kind.predictions_of(example) if self.head is None else example.outputs

    def held_out_predictions(self, features: Tensor, head: HeadTensors) -> Array:
        return self.kind.predicted(self._of(features, head), self.held_out)

    def _of(self, features: Tensor, head: HeadTensors) -> Tensor:
        """Compute logits; where heads are merged, `features` are what decides predictions already."""
        return features if head is None else logits_of(features, *head, self._precision, self._device)

    @cached_property
    def metric_alone(self) -> float:
        """The expert's metric on all search rows."""
        return self._metric(self._logits, self.searched)

    @cached_property
    def _smoothed_expert(self) -> float:
        return self._smoothed(self._logits, self.searched)

    def kept(self, features: Tensor, head: HeadTensors, rows: int) -> tuple[float, float]:
        """Compute the retention of the metric on the first `rows` search rows, and that of the smoothed metric.

        If the expert's metric on these rows is not positive, its metric on all search rows takes the place; if its
        smoothed metric is not positive on these either, the retention of the metric itself counts.
        """
        logits = self._of(features, head)
        own = self._logits[: len(logits)]
        examples = self.searched[:rows]
        expert = _positive(self._metric(own, examples)) or self.metric_alone
        retention = self._retention(self._metric(logits, examples), expert)
        smoothed_expert = _positive(self._smoothed(own, examples)) or _positive(self._smoothed_expert)
        if not smoothed_expert:
            return retention, retention
        return retention, self._retention(self._smoothed(logits, examples), smoothed_expert)

    def _retention(self, value: float, expert: float) -> float:
        if self.evaluation.metric in self.kind.task.minimised:
            return expert / max(value, SMALLEST)
        return value / expert

    def _metric(self, logits: Tensor, examples: Sequence[Example]) -> float:
        metric = self.kind.metric(self.evaluation.metric)
        return metric(self._labels_of(examples), self.kind.predicted(logits, examples))

    def _smoothed(self, logits: Tensor, examples: Sequence[Example]) -> float:
        return self.kind.smoothed(self.evaluation.metric, self._labels_of(examples), logits, examples)

    def _labels_of(self, first: Sequence[Example]) -> Array:
        """Return the labels of the first search rows."""
        return self.labels[: sum(map(self.kind.predictions_of, first))]


class HeadInputs:
    """Inputs of a head on rows with one merge, (outputs, width), computed as far as they are asked for."""

    def __init__(
        self, examples: Sequence[Example], values_of: Callable[[Example], int], read: Callable[[slice], Tensor]
    ) -> None:
        self._examples = examples
        self._values_of = values_of
        self._read = read
        self._known: list[Tensor] = []
        self._rows = 0

    def first(self, rows: int) -> Tensor:
        if rows > self._rows or not self._known:
            further = self._read(slice(self._rows, rows))
            self._known = [torch.cat([*self._known, further]) if self._known else further]
            self._rows = rows
        [known] = self._known
        return known[: sum(map(self._values_of, self._examples[:rows]))]


class TriedMerge:
    """A merge, with the outputs of each expert's head on its rows."""

    def __init__(self, backbone: "SharedBackbone", state: State) -> None:
        self.state = state
        self._backbone = backbone
        self._experts = backbone.experts

        def seen(index: int, rows: Sequence[Example]) -> HeadInputs:
            values_of = backbone.experts[index].values_of
            return HeadInputs(rows, values_of, partial(backbone.read, state, index, rows))

        self._searched = [seen(index, expert.searched) for index, expert in enumerate(backbone.experts)]
        self._alignment = [seen(index, expert.alignment) for index, expert in enumerate(backbone.experts)]
        self._held_out = [seen(index, expert.held_out) for index, expert in enumerate(backbone.experts)]

    def look(self, share: float, ridge: float) -> RungOutcome:
        """Evaluate on a share of every model's search rows; its head is aligned on the same share of alignment rows."""
        kept: dict[str, tuple[float, float]] = {}
        for index, expert in enumerate(self._experts):
            rows = part(expert.searched, share)
            features = self._searched[index].first(rows)
            kept[expert.name] = expert.kept(features, self._head(index, share, ridge), rows)
        return RungOutcome(
            retentions={name: retention for name, (retention, _) in kept.items()},
            smoothed={name: smoothed for name, (_, smoothed) in kept.items()},
        )

    def judged(self, ridge: float) -> dict[str, Array]:
        """Compute every model's predictions for its held-out rows."""
        return {
            expert.name: expert.held_out_predictions(
                self._held_out[index].first(len(expert.held_out)), self._head(index, 1.0, ridge)
            )
            for index, expert in enumerate(self._experts)
        }

    def _head(self, index: int, share: float, ridge: float) -> HeadTensors:
        expert = self._experts[index]
        if not expert.alignment:
            return self._backbone.stored_head(index, expert.head)
        rows = min(len(expert.alignment), max(LEAST_ALIGNMENT_ROWS, part(expert.alignment, share)))
        features = self._alignment[index].first(rows)
        if expert.targets is None or expert.head is None:
            raise TypeError("a head that merges is not aligned")
        found = aligned(features, expert.targets[: len(features)], *expert.head, ridge)
        return self._backbone.stored_head(index, found)


class SharedBackbone:
    """One backbone that all experts' heads read, and that merges are put into.

    Parts of a model that are not merged, such as its head, stay the expert's own; nothing else of experts is kept. All
    values are rounded as they would be stored, so that a tried merge is the one that would be published.
    """

    def __init__(self, plan: MergePlan, outputs: KeptOutputs, precision: Precision) -> None:
        self.experts: list[ExpertOutputs] = []
        self.outputs = outputs
        self._precision = precision
        self._dtypes = _dtypes((*plan.backbone, *plan.module_tensors))
        # Heads that merge are in the backbone, and there is one published model, not one for each expert.
        heads = [()] * len(plan.checkpoints) if plan.merges_heads else plan.heads
        self._head_dtypes = [_dtypes(head) for head in heads]
        self._backbone: dict[str, nn.Parameter] = {}
        self._models: list[LoadedModel] = []
        self._present: State | None = None

    def add(self, expert: JobModel, loaded: LoadedModel, on_rows: OnRows) -> None:
        """Add an expert with its rows, whose outputs are computed unless they are kept."""
        self.experts.append(ExpertOutputs(expert, loaded, self.outputs, self._precision, on_rows))
        if not self._backbone:
            self._backbone = {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in loaded.model.named_parameters()
                if name in self._dtypes
            }
        self._models.append(self._with_backbone(len(self._models), loaded))

    def stores_as_is(self, loaded: LoadedModel, state: State) -> bool:
        """Return whether a model would be stored with the values that it has; `state` has its tensors.

        Raises:
            NumericalError: a value is beyond the dtype in which it would be stored.
        """
        own = dict(loaded.model.named_parameters())
        return all(
            not is_placeholder(own[name]) and torch.equal(_stored(name, state[name], dtype).float(), own[name].cpu())
            for name, dtype in self._dtypes.items()
            if name in self._backbone
        )

    def read(self, state: State, index: int, rows: Sequence[Example], wanted: slice) -> Tensor:
        """Compute what the head of expert `index` reads on some rows with a merge, see `_read`.

        Raises:
            NumericalError: a value is beyond the dtype in which it would be stored, or an input is not finite.
        """
        if state is not self._present:
            self._present = None
            with torch.no_grad():
                for name, parameter in self._backbone.items():
                    parameter.copy_(_stored(name, state[name], self._dtypes[name]))
            self._present = state
        model = self._models[index]
        with rounded_weights(model.model, self._precision):
            evaluation = self.experts[index].evaluation
            return _read(model, rows[wanted], self._precision, evaluation)

    def stored_head(self, index: int, head: HeadTensors) -> HeadTensors:
        """Return the last layer of expert `index` as it would be stored."""
        if head is None:
            return None
        logits = self._models[index].family.head.logits

        def stored(part: str, values: Tensor) -> Tensor:
            name = f"{logits}.{part}"
            return _stored(name, values, self._head_dtypes[index][name]).double()

        weight, bias = head
        return stored("weight", weight), None if bias is None else stored("bias", bias)

    def _with_backbone(self, index: int, loaded: LoadedModel) -> LoadedModel:
        """Return a copy of the expert with the shared backbone in place of its own, which error messages mention."""
        own = dict(loaded.model.named_parameters())
        instead: dict[int, object] = {id(own[name]): parameter for name, parameter in self._backbone.items()}
        model = copy.deepcopy(loaded.model, instead)
        for name, parameter in model.named_parameters():
            if name in self._head_dtypes[index]:
                parameter.data = _stored(name, parameter.data, self._head_dtypes[index][name]).to(parameter.dtype)
        info = replace(loaded.info, source=f"the merge, with the head of {loaded.info.source},")
        return replace(loaded, info=info, model=model)


def _positive(value: float) -> float:
    return max(value, 0.0)


def part(rows: Sequence[object], share: float) -> int:
    """Return the number of rows in a share of them."""
    return math.ceil(len(rows) * share)


def _dtypes(tensors: Sequence[PlannedTensor]) -> dict[str, torch.dtype]:
    return {tensor.slot.name: TORCH_DTYPES[tensor.dtype] for tensor in tensors}


def _stored(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    if not is_finite(stored):
        raise NumericalError(f"tensor {name} has values beyond {str(dtype).removeprefix('torch.')}", tensor=name)
    return stored


def _read(model: LoadedModel, examples: Sequence[Example], precision: Precision, evaluation: EvaluationSpec) -> Tensor:
    """Compute the inputs of the model's own head, (outputs, width), float32, or what decides its predictions."""
    if not model.family.head.merges:
        return head_inputs(model, examples, precision, lambda _: None)
    return torch.from_numpy(predict(model, examples, precision, lambda _: None, evaluation))


def _head(loaded: LoadedModel) -> HeadTensors:
    if loaded.family.head.merges:
        return None
    head = head_of(loaded)
    return head.weight.detach().cpu().double(), None if head.bias is None else head.bias.detach().cpu().double()
