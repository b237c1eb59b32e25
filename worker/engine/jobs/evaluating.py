"""The step that evaluates expert, plain average and merge on the same rows.

The merge is loaded from the artifact, as its user will load it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MetricResult, Version
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.tasks import family_of, task_of
from worker.engine.evaluation.evaluate import head_of, predict, predict_with
from worker.engine.evaluation.metrics import compare
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.preparing import examples_of
from worker.engine.merging.backbone import Backbone, averaged
from worker.engine.merging.job_models import JobModel
from worker.engine.models.loading import LoadedModel
from worker.engine.models.weights import Source, held
from worker.engine.runtime.progress import Phase
from worker.engine.tasks.metrics import Array

BASELINES: Mapping[Version, str] = {"base": "the base", "best_expert": "the best single expert"}


@dataclass(frozen=True)
class Published:
    """The merge in the artifact, and the average that it is compared with."""

    plan: MergePlan
    folders: Mapping[str, Path]
    """Folders by model."""
    average: Mapping[str, Source]
    """The plain average of the models that take part, by names of parameters."""
    experts: Sequence[JobModel]
    base: tuple[CheckpointInfo, str] | None
    """The base and its digest, if it can be evaluated beside the experts."""

    @property
    def baselines(self) -> int:
        """Number of further models that are evaluated on the rows of each."""
        return len(self.experts) - 1 + (self.base is not None) if self.plan.merges_heads else 0


def evaluate(
    models: Sequence[JobModel],
    plan: MergePlan,
    base_digest: str | None,
    folders: Mapping[str, Path],
    context: JobContext,
) -> dict[str, MetricResult] | None:
    """Compute metrics by model; None where no model has rows to be evaluated on.

    Predictions of experts and base are kept for later jobs.

    Args:
        base_digest: digest of the plan's base, if it has one.
    """
    if not any(model.rows.evaluation for model in models):
        return None
    with context.timed("evaluate_seconds"):
        with averaged(plan, [model.takes_part for model in models]) as backbone:
            base = _evaluable_base(plan, base_digest, context)
            published = Published(plan, folders, average_sources(backbone, context), models, base)
            runs = 3 + published.baselines
            totals = {model.name: runs * len(model.rows.evaluation) for model in models}
            evaluating = context.phase_of_models("evaluating", totals, "examples")
            metrics = {
                model.name: _evaluated(model, published, evaluating, context)
                for model in models
                if model.spec.evaluation is not None
            }
        context.note(*_behind(metrics, models))
        return metrics


def average_sources(average: Backbone, context: JobContext) -> Mapping[str, Source]:
    """Compute the plain average once, or, where models are not held whole, again for each part that is at work."""
    if context.models.holding is not Holding.WHOLE:
        return average.sources()
    return {name: held(tensor) for name, tensor in {**average.state(), **average.modules()}.items()}


def _evaluable_base(plan: MergePlan, digest: str | None, context: JobContext) -> tuple[CheckpointInfo, str] | None:
    """Return the base if it predicts as the experts do, which takes the same head and a tokenizer; note why not."""
    base = plan.base
    if base is None or digest is None or not plan.merges_heads:
        return None
    if base.architecture == plan.checkpoints[0].architecture and base.vocabulary and family_of(base) is not None:
        return base, digest
    lacking = f"the head of {plan.checkpoints[0].architecture}" if base.vocabulary else "a tokenizer"
    context.note(f"the base {base.source} was not evaluated: it lacks {lacking}")
    return None


def _behind(metrics: Mapping[str, MetricResult], models: Sequence[JobModel]) -> list[str]:
    """Return notes of the rows on which the merge is worse than the base, or than a single expert."""
    tasks = {model.name: task_of(model.info) for model in models}
    notes = []
    for version, title in BASELINES.items():
        worse = []
        for name, found in metrics.items():
            gain = found.differences.get(version)
            if gain is None:
                continue
            sign = -1 if found.metric in tasks[name].minimised else 1
            if sign * gain.value < 0:
                may_be_chance = max(sign * end for end in gain.interval) >= 0
                value = found.value_of(version)
                chance = ", which may be chance" if may_be_chance else ""
                whose = f" of {found.best_expert.name}" if version == "best_expert" and found.best_expert else ""
                worse.append(f"{name} ({found.metric} {found.merged:.4g}, and {value:.4g}{whose}{chance})")
        if worse:
            notes.append(f"the merge is worse than {title} on the rows of {', '.join(worse)}")
    return notes


def _of_other(
    model: JobModel, other: CheckpointInfo, digest: str, published: Published, evaluating: Phase, context: JobContext
) -> Array:
    """Return the predictions of a model's rows by another model with the same head, whose digest is `digest`."""
    loaded = context.models.get(other)
    examples, _ = examples_of(
        published.plan, loaded, model.evaluation, model.rows.evaluation_texts, model.rows.evaluation
    )
    return context.outputs.predictions(loaded, digest, examples, model.evaluation, evaluating.advance_of(model.name))


def _best_expert(
    model: JobModel, own: Array, published: Published, evaluating: Phase, context: JobContext
) -> tuple[str, Array]:
    """Return the name of the expert that is best on a model's rows, the first of equal ones, and its predictions."""
    kind = context.models.get(model.info).kind
    metric, labels = kind.metric(model.evaluation.metric), kind.truth(model.rows.evaluation)
    found = {model.name: own}
    for other in published.experts:
        if other.name != model.name:
            found[other.name] = _of_other(model, other.info, other.digest, published, evaluating, context)
    sign = -1 if model.evaluation.metric in kind.task.minimised else 1
    best = max(found, key=lambda name: sign * metric(labels, found[name]))
    return best, found[best]


def called(name: str, loaded: LoadedModel) -> LoadedModel:
    """Return the same model under a name for messages."""
    return replace(loaded, info=replace(loaded.info, source=name))


def _evaluated(model: JobModel, published: Published, evaluating: Phase, context: JobContext) -> MetricResult:
    """Evaluate on one model's rows. Its merge is only held meanwhile."""
    evaluation, examples, precision = model.evaluation, model.rows.evaluation, context.precision
    loaded = context.models.get(model.info)
    kind, head = loaded.kind, loaded.family.head
    on_rows = evaluating.advance_of(model.name)
    labels, counts = kind.truth(examples), [kind.predictions_of(example) for example in examples]
    expert_predictions = context.outputs.predictions(loaded, model.digest, examples, evaluation, on_rows)
    better = kind.likely_permutation(labels, expert_predictions)
    if better:
        context.note(
            Doubt(
                f"{model.spec.source} fits {evaluation.source} far better when its labels 0 to {len(better) - 1} "
                f"are read as {', '.join(map(str, better))}; do both mean the same by them?"
            )
        )
    undefined = kind.undefined(evaluation.metric, labels, evaluation.source)
    if undefined:
        context.note(Doubt(undefined))
    name = "model" if published.plan.merges_heads else f"models/{model.name}"
    merged = context.models.fresh(inspect_checkpoint(published.folders[model.name], name))
    examples, truncated = examples_of(published.plan, merged, evaluation, model.rows.evaluation_texts, examples)
    context.note(*truncated)
    whose = "" if head.merges else f", with the head of {model.spec.source},"
    merged = called(f"the merge{whose}", merged)
    kept_head_predictions = None
    if head.merges:
        merged_predictions = predict(merged, examples, precision, on_rows, evaluation)
    else:
        kept = head_of(loaded)
        merged_predictions, kept_head_predictions = predict_with(merged, kept, examples, precision, on_rows, evaluation)
    merged.take(published.average)
    if not head.merges:
        head_of(merged).load_state_dict(head_of(loaded).state_dict())
    average = called(f"the plain average{whose}", merged)
    average_predictions = predict(average, examples, precision, on_rows, evaluation)
    predictions: dict[Version, Array] = {"expert": expert_predictions, "average": average_predictions}
    best = None
    if published.plan.merges_heads:
        best, predictions["best_expert"] = _best_expert(model, expert_predictions, published, evaluating, context)
        if published.base is not None:
            predictions["base"] = _of_other(model, *published.base, published, evaluating, context)
    if kept_head_predictions is not None:
        predictions["merged_kept_head"] = kept_head_predictions
    predictions["merged"] = merged_predictions
    found = compare(evaluation, loaded.task, labels, predictions, counts, best)
    if evaluation.metric == "exact_match" and found.expert == 0:
        context.note(
            Doubt(
                f"{model.spec.source} has no row of {evaluation.source} right itself, so nothing can be said of what "
                "the merge keeps; do the rows fit it, and answer, stop and max_new_tokens, where it writes?"
            )
        )
    return found
