"""The job that measures models and keeps their statistics, as a list of steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.engine.catalog.contracts.report import ScoreResult
from worker.engine.catalog.contracts.spec import ScoreSpec
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs import artifact
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.measuring import Measuring, measure, truncations
from worker.engine.jobs.memory import require_memory_of_job
from worker.engine.jobs.preparing import InputStates, longest_row, with_dataset
from worker.engine.jobs.results import as_run, scored_model, stopping_of
from worker.engine.merging.job_models import JobModel
from worker.engine.runtime.device import peak_memory_bytes


def score(spec: ScoreSpec, context: JobContext) -> ScoreResult:
    """Compute the method's statistics of every model, keep them, and leave a complete artifact in `spec.folder`."""
    [method] = spec.method.methods
    if not method.statistics:
        raise TypeError(f"method {method.name} measures nothing")
    loaded = load(spec, context)
    measuring = [Measuring(method, plan, [model]) for plan, model in zip(loaded.plans, loaded.models, strict=True)]
    with context.timed("score_seconds", context.shared.elapsed_seconds):
        models = [model for [model] in measure(measuring, context)]
    loaded.states.check_unchanged()
    return publish(spec, loaded.plans, models, context)


@dataclass(frozen=True)
class LoadedScores:
    """The inputs of a job of scores. Each model has a plan of its own, as if it were merged alone."""

    plans: Sequence[MergePlan]
    models: Sequence[JobModel]
    states: InputStates


def load(spec: ScoreSpec, context: JobContext) -> LoadedScores:
    """Open the checkpoints and read their rows."""
    with context.timed("load_seconds"):
        inputs = Inputs(spec, context.views, context.on_progress)
        plans = [plan_merge([inputs.checkpoint(model)]) for model in spec.models]
        for plan in plans:
            required_family(plan)
        infos = [info for plan in plans for info in plan.checkpoints]
        states = InputStates.of(infos)
        context.store.may_keep = states.are_untouched
        loading = context.phase("loading", len(spec.models), "models")
        context.note(*(note for info in infos for note in info.notes))
        context.lasting.digests.check_expected(inputs.expected, torch.get_num_threads())
        digests = context.lasting.digests.of_checkpoints(infos, torch.get_num_threads())
        models = []
        for asked, plan, info, digest in zip(spec.models, plans, infos, digests, strict=True):
            require_memory_of_job(plan, spec, context, longest_row=1)
            model = with_dataset(spec, JobModel(asked, info, digest), inputs, context)
            require_memory_of_job(plan, spec, context, longest_row(model))
            context.note(*plan.notes)
            models.append(model)
            loading.advance()
        return LoadedScores(plans, models, states)


def publish(
    spec: ScoreSpec, plans: Sequence[MergePlan], models: Sequence[JobModel], context: JobContext
) -> ScoreResult:
    """Write the scores and all documents to the artifact."""
    for model in models:
        context.note(*truncations(model))
    [method] = spec.method.methods
    scored = [
        scored_model(model, stopping_of(method, [model], plan, context)[0])
        for model, plan in zip(models, plans, strict=True)
    ]
    result = ScoreResult(
        models=scored,
        method=as_run(spec, context.precision, models),
        timings=context.timings,
        peak_memory_bytes=peak_memory_bytes(),
        device=str(context.device),
        notes=context.notes,
    )
    for model in models:
        artifact.write_scores(spec.folder, model)
    artifact.write_score_documents(spec, result, {model.name: model.measured.scores for model in models})
    return result
