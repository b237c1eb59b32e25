"""The job that measures one shard of another job's scoring, and keeps what it finds."""

import time

import torch

from worker.engine.catalog.contracts.report import ShardResult
from worker.engine.catalog.contracts.spec import ShardSpec
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.memory import require_memory_of_job
from worker.engine.jobs.preparing import InputStates, longest_row, with_dataset
from worker.engine.merging.job_models import JobModel
from worker.engine.scoring.measure import Measured, Measurer


def measure_shard(spec: ShardSpec, context: JobContext) -> ShardResult:
    """Measure what the shard asks for. What is kept already is not measured again."""
    plan, model, states = load(spec, context)
    work, sample = spec.work, model.rows.sample
    if sample is None:
        raise TypeError(f"the shard has no row of {model.name} to measure")
    scoring = context.phase("scoring", work.examples, "examples")
    common = (context.precision, context.store, context.lasting.batches, context.batch_tokens)
    measurer = Measurer(work.method, plan.linear_inputs, *common)
    loaded = context.models.get(model.info)
    start = time.monotonic()
    if work.pieces is not None and work.batch_tokens is not None:
        first, end = work.pieces
        measurer.measure_pieces(loaded, model.digest, sample, first, end, work.batch_tokens, scoring.advance)
    else:
        rows = len(sample)
        known = Measured()
        measurer.measure(known, loaded, model.digest, sample, rows, scoring.advance, work.statistics, work.also)
    seconds = time.monotonic() - start
    states.check_unchanged()
    return ShardResult(seconds=seconds)


def load(spec: ShardSpec, context: JobContext) -> tuple[MergePlan, JobModel, InputStates]:
    """Open the checkpoint and read its rows, as a job of scores does."""
    inputs = Inputs(spec, context.views, context.on_progress)
    base = inputs.checkpoint(spec.base) if spec.base else None
    [asked] = spec.models
    info = inputs.checkpoint(asked, base)
    plan = plan_merge([info])
    required_family(plan)
    states = InputStates.of([info])
    context.store.may_keep = states.are_untouched
    context.lasting.digests.check_expected(inputs.expected, torch.get_num_threads())
    [digest] = context.lasting.digests.of_checkpoints([info], torch.get_num_threads())
    require_memory_of_job(plan, spec, context, longest_row=1)
    model = with_dataset(spec, JobModel(asked, info, digest), inputs, context)
    require_memory_of_job(plan, spec, context, longest_row(model))
    return plan, model, states
