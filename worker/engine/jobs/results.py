"""What a job says of itself when its work is done."""

from collections.abc import Sequence
from typing import Any

from worker.engine.catalog.contracts.report import ModelResult, ScoredModel, ScoresFile, Stopping
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec
from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.parameters import unmatched_filters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.jobs.preparing import ModelRun
from worker.engine.merging.stopping import Scored, errors_of_models, stopping
from worker.engine.runtime.device import Precision


def model_result(run: ModelRun, weight_share: float | None, weight_error: float | None) -> ModelResult:
    return ModelResult(
        **_measured_fields(run),
        aligned_examples=len(run.alignment),
        weight_share=weight_share,
        weight_error=weight_error,
        parameters=run.spec.parameters,
    )


def scored_model(run: ModelRun, stopping: Stopping | None) -> ScoredModel:
    scores = []
    for statistics in run.measured.statistics.values():
        facts = statistics.about.facts
        href = f"/scores/{facts.address}"
        scores.append(
            ScoresFile(statistic=facts.statistic, digest=facts.address, href=href, bytes=statistics.about.bytes)
        )
    return ScoredModel(**_measured_fields(run), estimator=run.measured.estimator, stopping=stopping, scores=scores)


def _measured_fields(run: ModelRun) -> dict[str, Any]:
    return {
        "name": run.spec.name,
        "checkpoint": run.spec.source,
        "commit": run.spec.hub.commit if run.spec.hub else None,
        "digest": run.digest,
        "examples": run.measured.rows,
        "batch_tokens": run.measured.batch_tokens,
        "score_seconds": round(run.measured.seconds, 3),
        "score_cached": run.measured.cached,
    }


def as_run(spec: JobSpec, precision: Precision, runs: Sequence[ModelRun]) -> dict[str, Any]:
    """The method with `auto` resolved: one value where the models agree, else by model.

    Precision is that of forward and backward passes, and left out where there are none.
    """
    resolved = spec.method.model_dump(exclude={"precision"})
    if spec.loads_models:
        resolved["precision"] = precision
    for parameter in ("estimator", "batch_tokens"):
        found = {run.spec.name: getattr(run.measured, parameter) for run in runs}
        found = {name: value for name, value in found.items() if value is not None}
        if found:
            resolved[parameter] = next(iter(found.values())) if len(set(found.values())) == 1 else found
    return resolved


def stopping_of(
    method: MethodParameters, runs: Sequence[ModelRun], plan: MergePlan, notes: list[str]
) -> tuple[Stopping | None, list[float | None]]:
    """How well the merge weights are known, and for each model its weights' error."""
    models = with_errors(runs)
    scoring = method.scoring
    if scoring is None or not models:
        return None, [None] * len(runs)
    found = stopping(scoring, models, plan.owned)
    if found.reached is False and found.curve:
        whose = "each model" if len(runs) > 1 else runs[0].spec.name
        notes.append(
            f"after {found.curve[-1].examples} rows of {whose} the merge weights are known to "
            f"{found.curve[-1].error:.3f}, not to the tolerance {scoring.tolerance:g}"
        )
    errors = iter(errors_of_models(scoring, models, plan.owned))
    return found, [next(errors) if run.scored else None for run in runs]


def with_errors(runs: Sequence[ModelRun]) -> list[Scored]:
    return [scored for run in runs if (scored := run.scored) is not None]


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
                f"{lacking} tokens have rows of zeros in {tensor.slot.name}, since no model of its slice has them"
            )
    return [
        *notes,
        f"the merged models have the tokenizer of {vocabulary.owner.source}{more}, {vocabulary.rows} rows in all",
    ]


def filter_notes(plan: MergePlan, spec: MergeSpec) -> list[str]:
    """Notes of filters that match no tensor, which the request allows."""
    own = [model.parameters for model in spec.models]
    found = unmatched_filters(plan, spec.method, [model.weight for model in spec.models], own)
    return [f"{field}: {problem}; it changed nothing" for field, problem in found]
