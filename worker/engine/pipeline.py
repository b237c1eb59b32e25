"""One merge, from checkpoints and rows to a folder that can be published."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine import artifact
from worker.engine.catalog.errors import InvalidDataset
from worker.engine.catalog.headers import CheckpointInfo, inspect_checkpoint
from worker.engine.catalog.labels import LabelMap
from worker.engine.catalog.methods import AverageParameters, MaskFisherParameters, MethodParameters
from worker.engine.catalog.planning import MergePlan, PlannedTensor, plan_merge
from worker.engine.catalog.report import MergeResult, MetricResult, ModelResult, Timings
from worker.engine.catalog.rows import RowFile
from worker.engine.catalog.spec import DatasetSpec, EvaluationSpec, MergeSpec, ModelSpec
from worker.engine.checkpoints.loading import ModelCache, load
from worker.engine.checkpoints.reader import TensorReader, digest_checkpoint
from worker.engine.checkpoints.writer import write_models
from worker.engine.device import Precision, best_device, peak_memory_bytes, reset_peak_memory, resolve_precision
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import interval, metric_for
from worker.engine.methods import BUILDERS, Merger, ScoredModel
from worker.engine.methods.mask_fisher import node_weights, weight_shares
from worker.engine.scoring.data import Example, tokenize
from worker.engine.scoring.estimators import estimator_for
from worker.engine.scoring.scorer import paper_scores, score

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int, str], None]
"""phase, done, total, unit. May raise to stop the merge."""


@dataclass
class Phase:
    """Counts what is done within a phase and tells the listener."""

    name: str
    total: int
    unit: str
    listener: OnProgress
    done: int = 0

    def __post_init__(self) -> None:
        self.listener(self.name, 0, self.total, self.unit)

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.listener(self.name, self.done, self.total, self.unit)


@dataclass
class ModelScores:
    """Scores of one model. `scored` rows out of `population`."""

    spec: ModelSpec
    digest: str
    scores: dict[str, Tensor] = field(default_factory=dict)
    standard_errors: dict[str, Tensor] = field(default_factory=dict)
    estimator: str | None = None
    scored: int = 0
    seconds: float = 0.0


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
        notes: list[str] = []
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)

        with clock.measure("load_seconds"):
            plan = plan_merge([inspect_checkpoint(m.path, m.source) for m in spec.models], spec.output.dtype)
            loading = Phase("loading", len(spec.models), "models", on_progress)
            results = []
            for model, info in zip(spec.models, plan.checkpoints, strict=True):
                results.append(ModelScores(model, digest_checkpoint(info)))
                self._models.get(info)  # its weights are checked here, before any work is spent
                loading.advance()

        if spec.method.needs_scores:
            with clock.measure("score_seconds"):
                self._score(spec, plan, results, precision, on_progress, notes)

        with clock.measure("merge_seconds"):
            merger, shares = self._merger(spec.method, results)
            folders = artifact.model_folders(spec.folder, [m.name for m in spec.models])
            tensors = len(plan.backbone) + sum(len(head) for head in plan.heads)
            merging = Phase("merging", tensors, "tensors", on_progress)
            with Backbone(plan, [m.weight for m in spec.models], merger) as backbone:
                write_models(plan, folders, backbone.tensor, spec.output.max_shard_bytes, merging.advance)

        metrics = None
        if spec.evaluate and any(m.evaluation for m in spec.models):
            with clock.measure("evaluate_seconds"):
                metrics = self._evaluate(spec, plan, folders, precision, on_progress, notes)

        retentions = [m.retention for m in (metrics or {}).values() if m.retention is not None]
        result = MergeResult(
            models=[
                ModelResult(
                    name=r.spec.name,
                    checkpoint=r.spec.source,
                    digest=r.digest,
                    examples=r.scored,
                    weight_share=share,
                    score_seconds=round(r.seconds, 3),
                    score_cached=False,
                )
                for r, share in zip(results, shares, strict=True)
            ],
            metrics=metrics,
            mean_retention=sum(retentions) / len(retentions) if retentions else None,
            min_retention=min(retentions, default=None),
            method={**spec.method.model_dump(), "precision": precision, **_estimators(results)},
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=notes,
        )
        for scores in results:
            if scores.scores:
                artifact.write_scores(spec.folder, scores.spec.name, scores)
        artifact.write_documents(spec, plan, result)
        return result

    def _score(
        self,
        spec: MergeSpec,
        plan: MergePlan,
        results: list[ModelScores],
        precision: Precision,
        on_progress: OnProgress,
        notes: list[str],
    ) -> None:
        method = spec.method
        if not isinstance(method, MaskFisherParameters):
            raise TypeError(f"{method.name} has no scores")
        paper = method.preset == "paper"
        prepared: list[tuple[ModelScores, CheckpointInfo, list[Example], int]] = []
        for result, info in zip(results, plan.checkpoints, strict=True):
            if result.spec.weight > 0:
                dataset = _required(result.spec)
                rows = RowFile(dataset)
                population = min(len(rows), dataset.limit or len(rows))
                count = None if method.examples == "auto" else method.examples
                examples = self._examples(result.spec.name, dataset, rows, info, notes, count=count, shuffle=not paper)
                prepared.append((result, info, examples, population))
        scoring = Phase("scoring", sum(len(examples) for _, _, examples, _ in prepared), "examples", on_progress)
        for result, info, examples, population in prepared:
            start = time.monotonic()
            loaded = self._models.get(info)
            source = _required(result.spec).source
            if paper:
                result.estimator = "empirical"
                result.scores = paper_scores(loaded, examples, source, scoring.advance)
            else:
                estimator = estimator_for(method.estimator, loaded.task, method.seed)
                statistics = score(loaded, examples, estimator, precision, source, scoring.advance)
                result.estimator = estimator.name
                result.scores = statistics.scores()
                result.standard_errors = statistics.standard_errors(population)
            result.scored = len(examples)
            result.seconds = time.monotonic() - start

    def _merger(self, method: MethodParameters, results: list[ModelScores]) -> tuple[Merger, list[float]]:
        """The method over the models of non-zero weight, and every model's mean merge weight."""
        models = [ScoredModel(r.spec.weight, r.scores) for r in results if r.spec.weight > 0]
        if isinstance(method, MaskFisherParameters):
            shares = iter(weight_shares(models, node_weights(models, method.normalize, method.floor)))
        else:
            total = sum(model.weight for model in models)
            shares = iter([model.weight / total for model in models])
        return BUILDERS[method.name](method, models), [next(shares) if r.spec.weight > 0 else 0.0 for r in results]

    def _evaluate(
        self,
        spec: MergeSpec,
        plan: MergePlan,
        folders: dict[str, Path],
        precision: Precision,
        on_progress: OnProgress,
        notes: list[str],
    ) -> dict[str, MetricResult]:
        """Expert, plain average and merge (loaded from the artifact, as its user will) on the same rows."""
        prepared: list[tuple[ModelSpec, EvaluationSpec, CheckpointInfo, list[Example]]] = []
        for model, info in zip(spec.models, plan.checkpoints, strict=True):
            if model.evaluation is not None:
                rows = RowFile(model.evaluation)
                examples = self._examples(model.name, model.evaluation, rows, info, notes)
                prepared.append((model, model.evaluation, info, examples))
        evaluating = Phase("evaluating", 3 * sum(len(e) for *_, e in prepared), "examples", on_progress)
        average = self._plain_average(spec, plan)
        results = {}
        for model, evaluation, info, examples in prepared:
            loaded = self._models.get(info)
            merged = load(inspect_checkpoint(folders[model.name], f"models/{model.name}"), self._device)
            metric = metric_for(evaluation.metric, loaded.task)
            labels = np.array([e.label for e in examples], dtype=np.float64)
            expert_predictions = predict(loaded, examples, precision, evaluating.advance)
            merged_predictions = predict(merged, examples, precision, evaluating.advance)
            merged.model.load_state_dict(average, strict=False)  # the head stays the expert's own
            average_predictions = predict(merged, examples, precision, evaluating.advance)
            expert, value = metric(labels, expert_predictions), metric(labels, merged_predictions)
            results[model.name] = MetricResult(
                metric=evaluation.metric,
                examples=len(examples),
                expert=expert,
                average=metric(labels, average_predictions),
                merged=value,
                merged_kept_head=value,
                retention=value / expert if expert > 0 else None,
                interval=interval(metric, labels, merged_predictions, evaluation.seed),
            )
        return results

    def _plain_average(self, spec: MergeSpec, plan: MergePlan) -> dict[str, Tensor]:
        """The unweighted average of the models that take part, as a state to load."""
        taking_part = [1.0 if model.weight > 0 else 0.0 for model in spec.models]
        merger = BUILDERS["average"](AverageParameters(), [ScoredModel(w) for w in taking_part if w])
        with Backbone(plan, taking_part, merger) as backbone:
            return {tensor.slot.name: backbone.tensor(tensor) for tensor in plan.backbone}

    def _examples(
        self,
        name: str,
        dataset: DatasetSpec,
        rows: RowFile,
        info: CheckpointInfo,
        notes: list[str],
        *,
        count: int | None = None,
        shuffle: bool = True,
    ) -> list[Example]:
        loaded = self._models.get(info)
        sampled = rows.sample(count, shuffle=shuffle)
        labels = LabelMap(loaded.task, tuple(dataset.label_names) if dataset.label_names else None)
        tokenized = tokenize(sampled, dataset, loaded.tokenizer, loaded.max_length, labels)
        if tokenized.truncated:
            limit = min(loaded.max_length, dataset.max_length or loaded.max_length)
            notes.append(
                f"{name}: {tokenized.truncated} of {len(sampled)} rows of {dataset.source} are longer than "
                f"{limit} tokens and were truncated"
            )
        return tokenized.examples


class Backbone:
    """Merged backbone tensors, computed one at a time from lazily read inputs of the models with weight."""

    def __init__(self, plan: MergePlan, weights: Sequence[float], merger: Merger) -> None:
        self._plan = plan
        self._taking_part = [i for i, weight in enumerate(weights) if weight > 0]
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


def _estimators(results: Sequence[ModelScores]) -> dict[str, Any]:
    """The estimator each model was scored by, with `auto` resolved; a string where they agree."""
    found = {r.spec.name: r.estimator for r in results if r.estimator}
    if not found:
        return {}
    return {"estimator": next(iter(found.values())) if len(set(found.values())) == 1 else found}
