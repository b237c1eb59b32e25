"""The step that measures statistics of every model, on as many of its rows as they need."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from worker.engine.catalog.methods import GRAM, NODE_FISHER, PARAMETER_FISHER, MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.cutting import Cutter, Part
from worker.engine.jobs.preparing import truncation
from worker.engine.jobs.results import with_errors
from worker.engine.merging.job_models import JobModel
from worker.engine.merging.stopping import point
from worker.engine.runtime.progress import Phase
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import looks

EXPERT_INPUT = re.compile(r"layers\.\d+\.experts\.\d+\.neurons")
LISTED = 3  # number of experts that a note names


@dataclass(frozen=True)
class Measuring:
    """Models that one method measures, and the plan of their merge."""

    method: MethodParameters
    plan: MergePlan
    models: Sequence[JobModel]


def for_method(method: MethodParameters, model: JobModel) -> JobModel:
    """Return the model as one of the job's methods sees it: with the rows that this method measures and fits to."""
    wanted = method.rows_measured(model.given)
    rows = model.rows
    sample = rows.sample.first(wanted) if rows.sample and wanted else None
    return replace(model, rows=replace(rows, sample=sample, fitted=rows.fitted[:wanted]))


def measure(work: Sequence[Measuring], context: JobContext) -> list[list[JobModel]]:
    """Measure the models of every part of the work. The phase's total counts all rows of each."""
    common = (context.precision, context.store, context.lasting.batches, context.batch_tokens)
    measurers = [Measurer(part.method, part.plan.linear_inputs, *common) for part in work]
    totals = Counter[str]()
    for measurer, part in zip(measurers, work, strict=True):
        for model in part.models:
            if model.rows.sample is not None:
                totals[model.name] += measurer.passes(model.given) * len(model.rows.sample)
    scoring = context.phase_of_models("scoring", totals, "examples")
    wanted: dict[object, set[str]] = defaultdict(set)
    for part in work:
        for model in part.models:
            wanted[_rows_of(model)] |= part.method.statistics - model.given.keys()
    found = {}
    # First those that run passes which others can share.
    order = sorted(range(len(work)), key=lambda place: NODE_FISHER not in work[place].method.statistics)
    cutter = Cutter(
        [
            Part(part.method, model, sample, measurer.passes(model.given), also, context.precision)
            for part, measurer in ((work[place], measurers[place]) for place in order)
            for model in part.models
            if (sample := model.rows.sample) is not None and measurer.passes(model.given)
            for also in [frozenset(wanted[_rows_of(model)] - part.method.statistics)]
        ],
        context,
    )
    for place in order:
        found[place] = _measure(work[place], measurers[place], scoring, cutter, wanted, context)
    return [[_with_shards(model, context) for model in found[place]] for place in range(len(work))]


def _with_shards(model: JobModel, context: JobContext) -> JobModel:
    """Count what the job's own shards have measured, which the store has, as measured in this job."""
    seconds = context.shared.seconds.get(model.name)
    if seconds is None:
        return model
    measured = replace(model.measured, cached=False, seconds=model.measured.seconds + seconds)
    return replace(model, measured=measured)


def _rows_of(model: JobModel) -> object:
    """Identify a model and the rows that it is measured on."""
    sample = model.rows.sample
    return None if sample is None else (model.digest, sample.digest(len(sample), with_labels=False))


def _measure(
    work: Measuring,
    measurer: Measurer,
    scoring: Phase,
    cutter: Cutter,
    wanted: Mapping[object, Collection[str]],
    context: JobContext,
) -> list[JobModel]:
    """Measure all statistics of every model that takes part.

    With `examples: "auto"` they are measured on as many rows as are needed to know the weights of the merge. What is
    `wanted` of the same rows elsewhere, by `_rows_of`, is taken from the same passes if it can be.
    """
    method = work.method
    found = [replace(model, measured=Measured()) for model in work.models]
    samples = {index: model.rows.sample for index, model in enumerate(found) if model.rows.sample is not None}

    def extend(index: int, rows: int, statistics: Collection[str], also: Collection[str] = ()) -> None:
        model, sample = found[index], samples[index]
        loaded = context.models.get(model.info)
        on_kept = scoring.advance_of(model.name)

        def on_rows(rows: int) -> None:
            on_kept(rows)
            cutter.computed(rows)

        known = measurer.measure(model.measured, loaded, model.digest, sample, rows, on_rows, statistics, also, on_kept)
        found[index] = replace(model, measured=known)

    stopping = method.scoring
    if stopping is None or stopping.tolerance is None:
        for index, sample in samples.items():
            statistics = method.statistics - found[index].given.keys()
            if statistics:
                extend(index, len(sample), statistics, wanted[_rows_of(found[index])])
        _check(found, context)
        return found
    for rows in looks(max(map(len, samples.values()))):
        for index, sample in samples.items():
            if found[index].measured.rows < len(sample):
                extend(index, min(rows, len(sample)), {NODE_FISHER})
        reached = point(stopping, with_errors([found[index] for index in samples]), rows, work.plan.owned)
        if reached is not None and reached.error <= stopping.tolerance:
            break
    for index in samples:
        extend(index, found[index].measured.rows, method.statistics - {NODE_FISHER})
    _check(found, context)
    return found


def _check(models: Sequence[JobModel], context: JobContext) -> None:
    _check_gradients(models)
    for model in models:
        context.note(*_experts_without_rows(model))


def _experts_without_rows(model: JobModel) -> list[str]:
    """Note which experts of a mixture nothing is known of, because the rows are routed to others."""
    of_nodes = {str(name): scores for name, scores in model.measured.scores.items() if name.expert is not None}
    kept = model.measured.of(GRAM)
    inputs = [name for name in kept if EXPERT_INPUT.fullmatch(name)]
    found = sorted(
        {name.removesuffix(".neurons") for name, scores in of_nodes.items() if not bool(scores.any())}
        | {name.removesuffix(".neurons") for name in inputs if not bool(kept[name].any())}
    )
    if not found:
        return []
    which = ", ".join(found[:LISTED]) + (", …" if len(found) > LISTED else "")
    return [
        f"no row of {model.dataset.source} tells anything of {len(found)} of {len({*of_nodes, *inputs})} experts of "
        f"{model.name} ({which}): what was measured of other models decides there, and where nothing was, the weights "
        "of the models alone"
    ]


def _check_gradients(models: Sequence[JobModel]) -> None:
    """Raise NumericalError where all of a model's gradients are 0: by its scores, it would be left out of the merge."""
    for model in models:
        scores = [*model.measured.scores.values(), *model.measured.of(PARAMETER_FISHER).values()]
        if scores and not any(bool(of_nodes.any()) for of_nodes in scores):
            problem = f"all gradients of {model.name} are 0 on its {model.measured.rows} rows of {model.dataset.source}"
            why = "its predictions do not depend on what merges, so no score can weigh it"
            raise NumericalError(f"{problem}: {why}; look at the weights of its head", source=model.dataset.source)


def truncations(model: JobModel) -> Sequence[str]:
    """Note how many rows were truncated, among those measured in this job, or else those of layers and the head."""
    sample = model.rows.sample
    found = [] if sample is None else truncation(*sample.truncated, sample.spec, sample.max_length)
    return found or model.rows.truncated
