"""The step that evaluates expert, plain average and merge on the same rows.

The merge is loaded from the artifact, as its user will load it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MetricResult, Version
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.evaluation.evaluate import head_of, predict, predict_with
from worker.engine.evaluation.metrics import compare
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.preparing import examples_of
from worker.engine.merging.backbone import plain_average
from worker.engine.merging.job_models import JobModel
from worker.engine.models.loading import load
from worker.engine.runtime.progress import Phase
from worker.engine.tasks.metrics import Array


@dataclass(frozen=True)
class Published:
    """The merge in the artifact, and the average that it is compared with."""

    plan: MergePlan
    folders: Mapping[str, Path]
    """Folders by model."""
    average: Mapping[str, Tensor]
    """The plain average of the models that take part."""


def evaluate(
    models: Sequence[JobModel], plan: MergePlan, folders: Mapping[str, Path], context: JobContext
) -> dict[str, MetricResult] | None:
    """Compute metrics by model; None where no model has rows to be evaluated on."""
    if not any(model.rows.evaluation for model in models):
        return None
    with context.timed("evaluate_seconds"):
        evaluating = context.phase("evaluating", 3 * sum(len(model.rows.evaluation) for model in models), "examples")
        published = Published(plan, folders, plain_average(plan, [model.takes_part for model in models]))
        return {
            model.name: _evaluated(model, published, evaluating, context)
            for model in models
            if model.spec.evaluation is not None
        }


def _evaluated(model: JobModel, published: Published, evaluating: Phase, context: JobContext) -> MetricResult:
    """Evaluate on one model's rows. Its merge is only held meanwhile."""
    evaluation, examples, precision = model.evaluation, model.rows.evaluation, context.precision
    loaded = context.models.get(model.info)
    kind, head = loaded.kind, loaded.family.head
    labels, counts = kind.truth(examples), [kind.predictions_of(example) for example in examples]
    expert_predictions = predict(loaded, examples, precision, evaluating.advance, evaluation)
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
    merged = load(inspect_checkpoint(published.folders[model.name], name), context.device)
    examples, truncated = examples_of(published.plan, merged, evaluation, model.rows.evaluation_texts, examples)
    context.note(*truncated)
    kept_head_predictions = None
    if head.merges:
        merged_predictions = predict(merged, examples, precision, evaluating.advance, evaluation)
    else:
        kept = head_of(loaded)
        merged_predictions, kept_head_predictions = predict_with(merged, kept, examples, precision, evaluating.advance)
    merged.model.load_state_dict(published.average, strict=False)
    if not head.merges:
        head_of(merged).load_state_dict(head_of(loaded).state_dict())
    average_predictions = predict(merged, examples, precision, evaluating.advance, evaluation)
    predictions: dict[Version, Array] = {"expert": expert_predictions, "average": average_predictions}
    if kept_head_predictions is not None:
        predictions["merged_kept_head"] = kept_head_predictions
    predictions["merged"] = merged_predictions
    return compare(evaluation, loaded.task, labels, predictions, counts)
