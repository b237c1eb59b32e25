"""Makes a job's result when its work is done."""

from collections.abc import Sequence
from typing import Any

from worker.engine.catalog.contracts.report import (
    GivenStatisticReport,
    ModelResult,
    ScoredModel,
    ScoresFile,
    Stopping,
)
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec
from worker.engine.catalog.methods import BaseParameters, MethodParameters
from worker.engine.catalog.planning.parameters import unmatched_filters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.jobs.context import JobContext
from worker.engine.merging.job_models import JobModel
from worker.engine.merging.stopping import Scored, errors_of_models, stopping
from worker.engine.runtime.device import Precision


def model_result(model: JobModel, weight_share: float | None, weight_error: float | None) -> ModelResult:
    return ModelResult(
        **_measured_fields(model),
        aligned_examples=len(model.rows.alignment),
        weight_share=weight_share,
        weight_error=weight_error,
        parameters=model.spec.parameters,
        statistics={
            name: GivenStatisticReport(source=given.source, digest=given.digest) for name, given in model.given.items()
        },
    )


def scored_model(model: JobModel, stopping: Stopping | None) -> ScoredModel:
    scores = []
    for _, statistics in sorted(model.measured.statistics.items()):
        facts = statistics.about.facts
        href = f"/scores/{facts.address}"
        scores.append(
            ScoresFile(statistic=facts.statistic, digest=facts.address, href=href, bytes=statistics.about.bytes)
        )
    return ScoredModel(**_measured_fields(model), estimator=model.measured.estimator, stopping=stopping, scores=scores)


def _measured_fields(model: JobModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "checkpoint": model.spec.source,
        "commit": model.spec.hub.commit if model.spec.hub else None,
        "digest": model.digest,
        "license": model.spec.licence(model.info),
        "examples": model.measured.rows,
        "batch_tokens": model.measured.batch_tokens,
        "score_seconds": round(model.measured.seconds, 3),
        "score_cached": model.measured.cached,
    }


def stated_licences(spec: MergeSpec, plan: MergePlan) -> dict[str, str | None]:
    """Return the licence that each input of a merge states, by the model's name; that of the base too."""
    named = zip(spec.models, plan.checkpoints, strict=True)
    found = {model.name: model.licence(info) for model, info in named}
    return {**found, "the base": spec.base.licence(plan.base)} if spec.base and plan.base else found


def as_run(spec: JobSpec, precision: Precision, models: Sequence[JobModel]) -> dict[str, Any]:
    """Return the method with `auto` resolved: one value where the models agree, else values by model.

    Precision is that of forward and backward passes, and is left out where there are none.
    """
    resolved = spec.method.model_dump(exclude={"precision"})
    if spec.loads_models:
        resolved["precision"] = precision
    for parameter in ("estimator", "batch_tokens"):
        found = {model.name: getattr(model.measured, parameter) for model in models}
        found = {name: value for name, value in found.items() if value is not None}
        if found:
            resolved[parameter] = next(iter(found.values())) if len(set(found.values())) == 1 else found
    return resolved


def stopping_of(
    method: MethodParameters, models: Sequence[JobModel], plan: MergePlan, context: JobContext
) -> tuple[Stopping | None, list[float | None]]:
    """Compute the errors of the merge weights: their curve, and the error of each model's weights."""
    scored = with_errors(models)
    scoring = method.scoring
    if scoring is None or not scored:
        return None, [None] * len(models)
    found = stopping(scoring, scored, plan.owned)
    if found.reached is False and found.curve:
        whose = "each model" if len(models) > 1 else models[0].name
        context.note(
            f"after {found.curve[-1].examples} rows of {whose} the merge weights are known to "
            f"{found.curve[-1].error:.3f}, not to the tolerance {scoring.tolerance:g}"
        )
    errors = iter(errors_of_models(scoring, scored, plan.owned))
    return found, [next(errors) if model.scored else None for model in models]


def with_errors(models: Sequence[JobModel]) -> list[Scored]:
    """Return the models that have scores with errors."""
    return [scored for model in models if (scored := model.scored) is not None]


def vocabulary_notes(plan: MergePlan) -> list[str]:
    vocabulary = plan.vocabulary
    if vocabulary is None:
        return []
    more = f" and {len(vocabulary.new)} further tokens" if vocabulary.new else ""
    notes = []
    for tensor in plan.backbone:
        rows = tensor.token_rows
        if rows is None or tensor.members is None:
            continue
        sources = [*rows.models, *([rows.base] if rows.base is not None and tensor.base is not None else [])]
        last = tensor.shape[0] - rows.padding
        lacking = sum(all(own[place] < 0 for own in sources) for place in range(last) if place not in rows.given)
        if lacking:
            notes.append(
                f"{lacking} tokens have rows of zeros in {tensor.slot.stored}, since no model of its slice has them"
            )
    return [
        *notes,
        f"the merged models have the tokenizer of {vocabulary.owner.source}{more}, {vocabulary.rows} rows in all",
    ]


def notes_of_given(method: BaseParameters, models: Sequence[JobModel]) -> list[str]:
    """Note which statistics were read from files; a doubt comes first if models of different scales were compared."""
    taking_part = [model for model in models if model.takes_part]
    notes: list[str] = []
    for statistic in sorted({name for model in taking_part for name in model.given}):
        read = [model for model in taking_part if statistic in model.given]
        listed = ", ".join(f"{model.name} ({model.given[statistic].source})" for model in read)
        notes.append(f"{statistic} was read from files, and not measured, of {listed}")
    raw = any(one.counts_scale for one in method.methods)
    if raw and notes and len(taking_part) > 1:
        said = "with normalize false models count by the scale of their Fisher information"
        notes.insert(0, Doubt(f"{said}, which a mean or sum of losses, and any factor, changes in files"))
    return notes


def filter_notes(plan: MergePlan, spec: MergeSpec) -> list[str]:
    """Return notes of filters that match no tensor, which the request allows."""
    own = [model.parameters for model in spec.models]
    found = unmatched_filters(plan, spec.method, [model.weight for model in spec.models], own)
    return [f"{field}: {problem}; it changed nothing" for field, problem in found]
