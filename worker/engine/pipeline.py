"""One merge, from checkpoints and rows to a folder that can be published."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine import artifact
from worker.engine.catalog.errors import InvalidCheckpoint, InvalidDataset
from worker.engine.catalog.headers import CheckpointInfo, checkpoint_state, inspect_checkpoint
from worker.engine.catalog.labels import LabelMap
from worker.engine.catalog.methods import AverageParameters, MaskFisherParameters, MethodParameters
from worker.engine.catalog.planning import MergePlan, PlannedTensor, plan_merge
from worker.engine.catalog.report import MergeResult, MetricResult, ModelResult, Timings, Version
from worker.engine.catalog.rows import Row, Rows, sample
from worker.engine.catalog.spec import DatasetSpec, MergeSpec, ModelSpec
from worker.engine.checkpoints.loading import LoadedModel, ModelCache, load
from worker.engine.checkpoints.reader import TensorReader, digest_checkpoint
from worker.engine.checkpoints.writer import write_models
from worker.engine.device import Precision, best_device, peak_memory_bytes, reset_peak_memory, resolve_precision
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import Array, compare, likely_permutation
from worker.engine.inputs import Inputs
from worker.engine.methods import BUILDERS, Merger, ScoredModel
from worker.engine.methods.mask_fisher import node_weights, weight_shares
from worker.engine.phase import OnProgress, Phase
from worker.engine.resources import available_memory, require_memory, require_space
from worker.engine.scoring.data import Example, tokenize
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.scorer import paper_scores, score

logger = logging.getLogger(__name__)


@dataclass
class ModelRun:
    """What one merge knows of one model: its rows, and then its scores."""

    spec: ModelSpec
    info: CheckpointInfo
    digest: str
    examples: list[Example]
    """Rows to score, of `population` in the data set."""
    population: int
    evaluation: list[Example]
    estimator: str | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    standard_errors: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def takes_part(self) -> bool:
        return self.spec.weight > 0


class Engine:
    """Runs merges one after the other, keeping models warm between them."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or best_device()
        self._models = ModelCache(self._device)

    def merge(self, spec: MergeSpec, on_progress: OnProgress) -> MergeResult:
        """Run the whole merge and leave a complete artifact in `spec.folder`.

        Raises:
            EngineError: what was wrong, naming the file, tensor or row. Anything else is a fault of ours.
        """
        reset_peak_memory()
        spec.folder.mkdir(parents=True, exist_ok=True)
        notes: list[str] = []
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)

        with clock.measure("load_seconds"):
            inputs = Inputs(spec, on_progress)
            plan = plan_merge([inputs.checkpoint(model) for model in spec.models], spec.output.dtype)
            states = [checkpoint_state(info) for info in plan.checkpoints]
            require_space(spec.folder, plan.bytes_to_write, "the artifact")
            self._require_memory(plan, spec, precision, longest_row=1)
            loading = Phase("loading", len(spec.models), "models", on_progress)
            runs = []
            for model, info in zip(spec.models, plan.checkpoints, strict=True):
                runs.append(self._prepare(spec, model, info, inputs, notes))
                loading.advance()
            longest = max((e.length for run in runs for e in (*run.examples, *run.evaluation)), default=1)
            self._require_memory(plan, spec, precision, longest)

        if spec.method.needs_scores:
            with clock.measure("score_seconds"):
                self._score(spec.method, runs, precision, on_progress)

        with clock.measure("merge_seconds"):
            merger, shares = self._merger(spec.method, runs)
            folders = artifact.model_folders(spec.folder, [m.name for m in spec.models])
            tensors = len(plan.backbone) + sum(len(head) for head in plan.heads)
            merging = Phase("merging", tensors, "tensors", on_progress)
            with Backbone(plan, [run.takes_part for run in runs], merger) as backbone:
                digests = write_models(plan, folders, backbone.tensor, spec.output.max_shard_bytes, merging.advance)

        metrics = None
        if any(run.evaluation for run in runs):
            with clock.measure("evaluate_seconds"):
                metrics = self._evaluate(plan, runs, folders, precision, on_progress, notes)

        for info, state in zip(plan.checkpoints, states, strict=True):
            if checkpoint_state(info) != state:
                raise InvalidCheckpoint(info.source, "its files were changed while the job ran; post it again")

        retentions = [m.retention for m in (metrics or {}).values() if m.retention is not None]
        result = MergeResult(
            models=[_model_result(run, share) for run, share in zip(runs, shares, strict=True)],
            metrics=metrics,
            mean_retention=sum(retentions) / len(retentions) if retentions else None,
            min_retention=min(retentions, default=None),
            method={**spec.method.model_dump(), "precision": precision, **_estimators(runs)},
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=list(dict.fromkeys(notes)),
        )
        for run in runs:
            if run.scores:
                artifact.write_scores(spec.folder, run)
        artifact.write_documents(spec, plan, result, digests)
        return result

    def _require_memory(self, plan: MergePlan, spec: MergeSpec, precision: Precision, longest_row: int) -> None:
        """Of this machine; on a GPU, activations take none of it. Models of earlier merges make room."""
        needed = plan.peak_memory_bytes(
            longest_row,
            scored=spec.method.needs_scores,
            evaluated=spec.evaluates,
            batch_rows=spec.method.batch_rows,
            value_bytes=0 if self._device.type == "cuda" else 2 if precision == "bfloat16" else 4,
        )
        if needed + self._models.bytes_besides(plan.checkpoints) > available_memory():
            self._models.keep_only(plan.checkpoints)
        require_memory(needed)

    def _prepare(
        self, spec: MergeSpec, model: ModelSpec, info: CheckpointInfo, inputs: Inputs, notes: list[str]
    ) -> ModelRun:
        """Check a model's weights and read its rows: whatever is wrong with them is found before any work is spent."""
        run = ModelRun(model, info, digest_checkpoint(info), [], 0, [])
        loaded = self._models.get(info)
        method = spec.method
        if isinstance(method, MaskFisherParameters) and run.takes_part:
            dataset = _required(model)
            rows = inputs.rows(dataset)
            run.population = min(len(rows), dataset.limit or len(rows))
            count = None if method.examples == "auto" else method.examples
            shuffle = method.preset != "paper"
            labels = _label_map(loaded, dataset, rows, notes) if method.needs_labels else None
            run.examples = _examples(loaded, dataset, sample(rows, dataset, count, shuffle=shuffle), labels, notes)
        if spec.evaluate and model.evaluation is not None:
            rows = inputs.rows(model.evaluation)
            labels = _label_map(loaded, model.evaluation, rows, notes)
            run.evaluation = _examples(loaded, model.evaluation, sample(rows, model.evaluation, None), labels, notes)
        return run

    def _score(
        self, method: MethodParameters, runs: list[ModelRun], precision: Precision, on_progress: OnProgress
    ) -> None:
        if not isinstance(method, MaskFisherParameters):
            raise TypeError(f"{method.name} has no scores")
        scoring = Phase("scoring", sum(len(run.examples) for run in runs), "examples", on_progress)
        for run in runs:
            if not run.takes_part:
                continue
            start = time.monotonic()
            loaded = self._models.get(run.info)
            source = _required(run.spec).source
            if method.preset == "paper":
                run.estimator = "empirical"
                run.scores = paper_scores(loaded, run.examples, source, scoring.advance)
            else:
                estimator = estimator_for(method.estimator, loaded.task, method.seed)
                statistics = score(loaded, run.examples, estimator, precision, source, scoring.advance)
                run.estimator = estimator.name
                run.scores = statistics.scores()
                run.standard_errors = statistics.standard_errors(run.population)
            run.seconds = time.monotonic() - start

    def _merger(self, method: MethodParameters, runs: list[ModelRun]) -> tuple[Merger, list[float]]:
        """The method over the models that take part, and every model's mean merge weight."""
        models = [ScoredModel(run.spec.weight, run.scores) for run in runs if run.takes_part]
        if isinstance(method, MaskFisherParameters):
            shares = iter(weight_shares(models, node_weights(models, method.normalize, method.floor)))
        else:
            total = sum(model.weight for model in models)
            shares = iter([model.weight / total for model in models])
        return BUILDERS[method.name](method, models), [next(shares) if run.takes_part else 0.0 for run in runs]

    def _evaluate(
        self,
        plan: MergePlan,
        runs: list[ModelRun],
        folders: dict[str, Path],
        precision: Precision,
        on_progress: OnProgress,
        notes: list[str],
    ) -> dict[str, MetricResult]:
        """Expert, plain average and merge (loaded from the artifact, as its user will) on the same rows."""
        evaluating = Phase("evaluating", 3 * sum(len(run.evaluation) for run in runs), "examples", on_progress)
        average = self._plain_average(plan, runs)
        return {
            run.spec.name: self._measure(run, folders[run.spec.name], average, precision, evaluating, notes)
            for run in runs
            if run.spec.evaluation is not None
        }

    def _measure(
        self,
        run: ModelRun,
        folder: Path,
        average: dict[str, Tensor],
        precision: Precision,
        evaluating: Phase,
        notes: list[str],
    ) -> MetricResult:
        """One model's rows; its merge is held no longer than this takes."""
        evaluation, examples = run.spec.evaluation, run.evaluation
        if evaluation is None:
            raise TypeError(f"{run.spec.name} has no evaluation")
        loaded = self._models.get(run.info)
        labels = np.array([e.label for e in examples], dtype=np.float64)
        expert_predictions = predict(loaded, examples, precision, evaluating.advance)
        if loaded.task.problem == "classification":
            better = likely_permutation(labels, expert_predictions, loaded.task.outputs)
            if better:
                notes.append(
                    f"{run.spec.source} fits {evaluation.source} far better when its labels 0 to {len(better) - 1} are "
                    f"read as {', '.join(map(str, better))}; do both mean the same by them?"
                )
        merged = load(inspect_checkpoint(folder, f"models/{run.spec.name}"), self._device)
        merged_predictions = predict(merged, examples, precision, evaluating.advance)
        merged.model.load_state_dict(average, strict=False)  # the head stays the expert's own
        average_predictions = predict(merged, examples, precision, evaluating.advance)
        predictions: dict[Version, Array] = {
            "expert": expert_predictions,
            "average": average_predictions,
            "merged_kept_head": merged_predictions,
            "merged": merged_predictions,
        }
        return compare(evaluation, loaded.task, labels, predictions)

    def _plain_average(self, plan: MergePlan, runs: list[ModelRun]) -> dict[str, Tensor]:
        """The unweighted average of the models that take part, as a state to load."""
        equal = [ScoredModel(1.0) for run in runs if run.takes_part]
        merger = BUILDERS["average"](AverageParameters(), equal)
        with Backbone(plan, [run.takes_part for run in runs], merger) as backbone:
            return {tensor.slot.name: backbone.tensor(tensor) for tensor in plan.backbone}


class Backbone:
    """Merged backbone tensors, computed one at a time from lazily read inputs of the models that take part."""

    def __init__(self, plan: MergePlan, takes_part: Sequence[bool], merger: Merger) -> None:
        self._plan = plan
        self._taking_part = [index for index, takes in enumerate(takes_part) if takes]
        self._merger = merger
        self._stack = ExitStack()
        self._readers: dict[int, TensorReader] = {}

    def __enter__(self) -> "Backbone":
        for index in self._taking_part:
            self._readers[index] = self._stack.enter_context(TensorReader(self._plan.checkpoints[index]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, planned: PlannedTensor) -> Tensor:
        versions = [self._readers[index].read(planned.sources[index]) for index in self._taking_part]
        return self._merger(planned.slot, versions)


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


def _required(model: ModelSpec) -> DatasetSpec:
    if model.dataset is None:
        raise InvalidDataset(model.name, "no data set; the method needs one for every model")
    return model.dataset


def _label_map(loaded: LoadedModel, dataset: DatasetSpec, rows: Rows, notes: list[str]) -> LabelMap:
    """How the rows' labels are the head's; whatever is not plain is noted."""
    if loaded.task.problem == "regression":
        return LabelMap(loaded.task)
    if dataset.label_names:
        labels = LabelMap(loaded.task, tuple(dataset.label_names))
        labels.check_names(dataset.source)
    elif rows.label_names and set(rows.label_names) <= loaded.task.label_ids.keys():
        labels = LabelMap(loaded.task, rows.label_names)
    else:
        if rows.label_names:
            notes.append(
                f"{dataset.source} calls its labels {', '.join(rows.label_names)}, which are not names of "
                f"{loaded.info.source}; its ids were taken as they are"
            )
        return LabelMap(loaded.task)
    if labels.permutation:
        notes.append(
            f"the labels of {dataset.source} are in another order than those of {loaded.info.source}: its ids 0 to "
            f"{len(labels.permutation) - 1} are the checkpoint's {', '.join(map(str, labels.permutation))}"
        )
    return labels


def _examples(
    loaded: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], labels: LabelMap | None, notes: list[str]
) -> list[Example]:
    tokenized = tokenize(rows, dataset, loaded.tokenizer, loaded.max_length, labels)
    if tokenized.truncated:
        limit = min(loaded.max_length, dataset.max_length or loaded.max_length)
        notes.append(
            f"{tokenized.truncated} of {len(rows)} rows of {dataset.source} are longer than {limit} tokens "
            "and were truncated"
        )
    return tokenized.examples


def _model_result(run: ModelRun, weight_share: float) -> ModelResult:
    return ModelResult(
        name=run.spec.name,
        checkpoint=run.spec.source,
        commit=run.spec.hub.commit if run.spec.hub else None,
        digest=run.digest,
        examples=len(run.examples),
        weight_share=weight_share,
        score_seconds=round(run.seconds, 3),
        score_cached=False,
    )


def _estimators(runs: Sequence[ModelRun]) -> dict[str, Any]:
    """The estimator each model was scored by, with `auto` resolved; a string where they agree."""
    found = {run.spec.name: run.estimator for run in runs if run.estimator}
    if not found:
        return {}
    return {"estimator": next(iter(found.values())) if len(set(found.values())) == 1 else found}
