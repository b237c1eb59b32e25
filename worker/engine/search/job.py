"""`auto` as a part of a job: trials and table over the job's models, and the job with the chosen merge."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from torch import Tensor

from worker.engine.catalog.contracts.report import Candidate, CandidateMetric, MetricResult, Search, mean_and_least
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.data.spec import Generation
from worker.engine.catalog.methods import AVERAGE, METHODS, AutoParameters, MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.values import PerTensor
from worker.engine.evaluation.outputs import KeptOutputs
from worker.engine.inputs.examples import digest_of
from worker.engine.merging.backbone import base_alone, plain_average
from worker.engine.merging.job_models import JobModel, experts_of
from worker.engine.merging.mergers import merged_state
from worker.engine.models.loading import ModelCache
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnProgress, OnRows, Phase
from worker.engine.search.journal import Journal
from worker.engine.search.search import Found, search
from worker.engine.search.space import Proposal, Space
from worker.engine.search.table import TableRow, table
from worker.engine.search.trial_merges import SharedBackbone, State, TriedMerge
from worker.engine.tasks.metrics import Array

FEW_ROWS = 32
"""Least number of a model's held-out rows; fewer say little."""


@dataclass(frozen=True)
class SearchResult:
    """The end of a search over a job's models."""

    found: Found
    candidates: Sequence[Candidate]
    """The table of metrics of each candidate on the held-out rows."""
    state: State | None
    """The chosen backbone, only where layers were refitted: any other is made again, which is quicker than it is worth
    its memory."""
    notes: Sequence[str]
    """Notes of baselines that are not in the table."""


def search_job(
    spec: MergeSpec,
    auto: AutoParameters,
    plan: MergePlan,
    by_method: Sequence[Sequence[JobModel]],
    cache: ModelCache,
    outputs: KeptOutputs,
    precision: Precision,
    on_progress: OnProgress,
) -> SearchResult:
    """Try merges as `auto` asks for, and judge each candidate's best on the held-out rows.

    Args:
        by_method: the job's models as each candidate measured them.
    """
    [models, *_] = by_method  # rows are the same for all
    backbone = SharedBackbone(plan, outputs, precision)
    space = Space(spec, auto, aligns=any(model.rows.alignment for model in models))

    def on_rows(_: int) -> None:
        searching.advance(0)  # which may stop the job

    baselines = _baselines(spec, plan, models, cache, backbone, precision, on_rows)
    searching = Phase("searching", auto.trials + len(space) + len(baselines), "merges", on_progress)
    for model in models:
        backbone.add(model, cache.get(model.info), on_rows)

    refitted: dict[str, TriedMerge] = {}

    def made(proposal: Proposal) -> TriedMerge:
        if not proposal.method.refits_layers:
            return TriedMerge(backbone, merged(proposal))
        key = proposal.method.model_dump_json()
        if key not in refitted:  # it takes as long as dozens of other merges, and trials may differ in heads alone
            refitted[key] = TriedMerge(backbone, merged(proposal))
        return refitted[key]

    def judged(proposal: Proposal) -> Mapping[str, Array]:
        return made(proposal).judged(proposal.align_ridge)

    def merged(proposal: Proposal) -> dict[str, Tensor]:
        own = by_method[proposal.candidate]
        weighed = [
            replace(model, spec=model.spec.model_copy(update={"weight": weight}))
            for model, weight in zip(own, proposal.weights, strict=True)
        ]
        measured = [model.for_method for model in weighed]
        return merged_state(proposal.method, measured, partial(experts_of, weighed, cache), plan, precision)

    identity = _identity(spec, auto, models, precision)
    found = search(spec, auto, space, backbone.experts, made, Journal(spec.journal, identity), searching.advance)
    names = [model.name for model in models]
    lines = [
        TableRow(
            name=space.names[candidate],
            kind="method",
            method=proposal.method,
            weights=dict(zip(names, proposal.weights, strict=True)),
            align_ridge=proposal.align_ridge,
            trial=number,
            judged=partial(judged, proposal),
        )
        for candidate, (number, proposal) in found.best.items()
    ]
    lines += baselines
    searching.advance(len(space) - len(found.best))  # candidates whose merges all failed have no line
    candidates, notes = table(lines, backbone.experts, found.search.chosen, searching.advance)
    state = made(found.chosen).state if found.chosen.method.refits_layers else None
    return SearchResult(found, candidates, state, notes)


def _baselines(
    spec: MergeSpec,
    plan: MergePlan,
    models: Sequence[JobModel],
    cache: ModelCache,
    backbone: SharedBackbone,
    precision: Precision,
    on_rows: OnRows,
) -> list[TableRow]:
    """Return the lines that a search is compared with, whatever its candidates are.

    They are the plain average, task arithmetic with its defaults and the recipe's weights, every single expert, and the
    base. The latter two are backbones under the models' own heads, where heads are kept. Where they merge, an expert's
    predictions are its own, which are kept, unless it would be stored in another format.
    """

    def line(
        name: str,
        kind: Literal["average", "task_arithmetic", "expert", "base"],
        weights: Sequence[PerTensor[float]],
        state: Callable[[], State],
        method: MethodParameters | None = None,
    ) -> TableRow:
        return TableRow(
            name=name,
            kind=kind,
            method=method,
            weights={model.name: weight for model, weight in zip(models, weights, strict=True)},
            align_ridge=spec.output.align_ridge,
            trial=None,
            judged=lambda: TriedMerge(backbone, state()).judged(spec.output.align_ridge),
        )

    def judged_alone(expert: JobModel, state: Callable[[], State]) -> Mapping[str, Array]:
        loaded, stored = cache.get(expert.info), state()
        if not backbone.stores_as_is(loaded, stored):
            return TriedMerge(backbone, stored).judged(spec.output.align_ridge)
        return {
            model.name: backbone.outputs.predictions(
                loaded, expert.digest, model.rows.evaluation, model.evaluation, on_rows
            )
            for model in models
        }

    taking_part = [model.takes_part for model in models]
    sum_of_vectors = METHODS["task_arithmetic"].parameters.model_validate({"name": "task_arithmetic"})
    found = [
        line(
            "plain average",
            "average",
            [float(takes) for takes in taking_part],
            partial(plain_average, plan, taking_part),
            AVERAGE.parameters(),
        )
    ]
    if plan.base is not None:
        measured = [model.for_method for model in models]
        summed = partial(merged_state, sum_of_vectors, measured, lambda: (), plan, precision)
        weights = [model.spec.weight for model in models]
        found.append(line("plain task arithmetic", "task_arithmetic", weights, summed, sum_of_vectors))
    for expert in models:
        alone = [model is expert for model in models]
        state = partial(plain_average, plan, alone)
        own = line(f"expert {expert.name}", "expert", list(map(float, alone)), state)
        if plan.merges_heads:
            own = replace(own, judged=partial(judged_alone, expert, state))
        found.append(own)
    if plan.lacking_in_base is None:
        found.append(line("base", "base", [0.0] * len(models), partial(base_alone, plan)))
    return found


def with_chosen(spec: MergeSpec, chosen: Proposal) -> MergeSpec:
    """Return the job as if the merge that `auto` chose had been asked for."""
    models = [
        model.model_copy(update={"weight": weight}) for model, weight in zip(spec.models, chosen.weights, strict=True)
    ]
    output = spec.output.model_copy(update={"align_ridge": chosen.align_ridge})
    return spec.model_copy(update={"method": chosen.method, "models": models, "output": output})


def _identity(spec: MergeSpec, auto: AutoParameters, models: Sequence[JobModel], precision: Precision) -> str:
    """Compute a digest of everything that the outcomes of trials depend on."""
    facts: dict[str, Any] = {
        "method": auto.model_dump(mode="json"),
        "models": [m.spec.model_dump(mode="json", include={"name", "weight", "min_retention"}) for m in models],
        "metrics": [m.evaluation.model_dump(mode="json", include={"metric", *Generation.model_fields}) for m in models],
        "checkpoints": [model.digest for model in models],
        "given": [{name: given.digest for name, given in model.given.items()} for model in models],
        "base": spec.base and spec.base.state,
        "output": spec.output.model_dump(mode="json", include={"dtype", "align_ridge"}),
        "precision": precision,
        "versions": {name: version(name) for name in ("maskmerge", "optuna", "torch", "transformers")},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for model in models:
        rows = model.rows
        for examples in (rows.searched, rows.alignment, rows.fitted):
            digest.update(digest_of(examples).encode())
        if rows.sample is not None:
            digest.update(rows.sample.digest(len(rows.sample), with_labels=True).encode())
    return digest.hexdigest()


def floor_notes(found: Search) -> list[str]:
    if found.feasible:
        return []
    kept = found.best.retentions
    lacking = [
        f"{kept[name]:.3f} of {name}, not {floor:g}"
        for name, floor in found.min_retention.items()
        if kept[name] < floor
    ]
    tried = sum(not trial.pruned for trial in found.trials)
    what = f"none of the {tried} merges that were tried on all search rows keeps what min_retention asks for"
    return [f"{what}; the nearest keeps {' and '.join(lacking)}"]


def judged_notes(found: Search, candidates: Sequence[Candidate]) -> list[str]:
    """Return notes of facts in the table that a reader should not overlook."""
    notes = []
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    notes += _gains(chosen, candidates)
    few = {name: rows for name, rows in found.held_out_rows.items() if rows < FEW_ROWS}
    if few:
        listed = ", ".join(f"{name} on {rows}" for name, rows in few.items())
        notes.append(
            f"auto is judged on half of the evaluation rows, which are few: {listed}; read intervals with care"
        )
    kept = {name: metric.retention for name, metric in chosen.metrics.items()}
    unknown = [name for name in found.min_retention if kept[name] is None]
    if unknown:
        notes.append(
            f"on the held-out rows the metric of {' and '.join(unknown)} itself is not positive: whether the merge "
            "keeps what min_retention asks for is not known"
        )
    short = [
        f"{retention:.3f} of {name}, not {floor:g}"
        for name, floor in found.min_retention.items()
        if (retention := kept[name]) is not None and retention < floor
    ]
    if short:
        notes.append(f"on the held-out rows what was chosen keeps {' and '.join(short)} that min_retention asks for")
    ahead = [c.name for c in candidates if c.behind is not None and c.behind.interval[1] < 0]
    if ahead:
        notes.append(f"on the held-out rows {', '.join(ahead)} kept more than what was chosen, beyond chance")
    return notes


def _gains(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return a note if the chosen merge is not ahead of what needs less.

    It is a doubt if that is the plain average, which needs nothing to be measured, or else the cheapest candidate.
    """
    average = next((line for line in candidates if line.kind == "average"), None)
    if average is not None and (doubt := _nothing_gained("the plain average", average)) is not None:
        return [doubt]
    tried = [line for line in candidates if line.kind == "method"]
    least = min(map(_demand, tried))
    cheapest = max((line for line in tried if _demand(line) == least), key=lambda line: line.mean_retention or 0)
    if _demand(chosen) > least:
        doubt = _nothing_gained(f"{cheapest.name}, the cheapest of its candidates", cheapest)
        return [] if doubt is None else [doubt]
    if all(_demand(line) == least for line in tried):
        return []
    return [f"what auto chose, {chosen.name}, is the cheapest of its candidates: those that need more did not gain"]


def _nothing_gained(title: str, line: Candidate) -> Doubt | None:
    """Return a doubt if the chosen merge is not ahead of a line of the table beyond chance."""
    if line.behind is None or line.behind.interval[0] > 0:
        return None
    low, high = line.behind.interval
    gained = f"the search gained {line.behind.value:+z.4f} of mean retention ({low:+z.4f} to {high:+z.4f})"
    judged = "which is worse" if high < 0 else "which is nothing beyond chance"
    return Doubt(f"on the held-out rows {gained} over {title}, {judged}")


def _demand(candidate: Candidate) -> tuple[bool, bool, bool, bool]:
    """Return what a candidate's method needs, the most expensive first: rows, refits of layers, whole matrices, a base.

    Of two candidates the one whose demand is less is the cheaper one.
    """
    if candidate.method is None:
        raise TypeError(f"{candidate.name} has no method")
    method = METHODS[candidate.method["name"]].parameters.model_validate(candidate.method)
    return method.most_examples > 0, method.refits_layers, not method.merges_rows, method.needs_base


def with_published(candidates: Sequence[Candidate], metrics: Mapping[str, MetricResult] | None) -> list[Candidate]:
    """Give the chosen candidate the metrics of the published merge, whose storage may round."""
    found = []
    for candidate in candidates:
        if candidate.chosen and metrics is not None:
            published = {
                name: CandidateMetric(
                    metric=m.metric,
                    value=m.merged,
                    interval=m.interval,
                    retention=m.retention,
                    answer_tokens=m.answer_tokens["merged"] if m.answer_tokens else None,
                )
                for name, m in metrics.items()
            }
            mean, least = mean_and_least(published.values())
            candidate = candidate.model_copy(
                update={"metrics": published, "mean_retention": mean, "min_retention": least}
            )
        found.append(candidate)
    return found
