"""Checks whether the machine has the memory that a job needs."""

from dataclasses import replace

import torch

from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec
from worker.engine.catalog.planning.holding import Holding, holdings
from worker.engine.catalog.planning.memory import MemoryNeeds, estimate, most_new_tokens
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.jobs.context import JobContext
from worker.engine.runtime.resources import available_memory, require_memory


def require_memory_of_job(
    plan: MergePlan,
    spec: JobSpec,
    context: JobContext,
    longest_row: int,
    tokens_held: int = 0,
    outputs_held: int = 0,
) -> None:
    """Check that the job's memory is there, and make room by giving up models of earlier jobs.

    Models are held in the first way of `Holding` for which it is enough. On a GPU, activations take none of this
    machine's memory.

    Args:
        longest_row: number of tokens of the job's longest row, as far as it is known.
        tokens_held: number of padded tokens of all rows that layers are refitted to at once.
        outputs_held: number of outputs of all rows that a search holds the inputs of heads for.

    Raises:
        OutOfMemory: the machine has less than the job needs.
    """
    on_gpu = context.device.type == "cuda"
    needs = MemoryNeeds(
        spec.method,
        spec.given_of_all,
        loads_models=spec.loads_models,
        models_beside=spec.models_beside,
        longest_row=longest_row,
        tokens_held=tokens_held,
        outputs_held=outputs_held,
        new_tokens=most_new_tokens(plan, spec.evaluations),
        value_bytes=0 if on_gpu else 2 if context.precision == "bfloat16" else 4,
        publishes=isinstance(spec, MergeSpec),
        threads=torch.get_num_threads(),
    )
    loaded = plan.checkpoints if spec.loads_models else []
    besides, available = context.models.bytes_besides(loaded), available_memory()
    ways = holdings(plan, spec.method) if spec.loads_models else [Holding.WHOLE]
    estimates = {holding: estimate(plan, replace(needs, holding=holding)) for holding in ways}
    holding = next((way for way, needed in estimates.items() if needed <= available), ways[-1])
    if estimates[holding] + besides > available:
        context.models.keep_only(loaded)
    require_memory(estimates[holding])
    context.hold(holding, loaded, estimate(plan, needs), available)
