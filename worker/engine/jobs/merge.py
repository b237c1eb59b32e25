"""The job that merges, as a list of steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.licences import licence_notes
from worker.engine.catalog.contracts.report import Candidate, MergeResult, MetricResult, Search, mean_and_least
from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import notes_of_estimates, plan_job
from worker.engine.catalog.planning.templates import check_templates
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import task_of
from worker.engine.checkpoints.checking import check_plan
from worker.engine.checkpoints.reloading import Reloading
from worker.engine.checkpoints.writer import rewrite_head, write_models, write_modules
from worker.engine.checkpoints.written import WrittenFile, check_written
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs import artifact
from worker.engine.jobs.acceptance import missed
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.evaluating import evaluate
from worker.engine.jobs.measuring import Measuring, for_method, measure, truncations
from worker.engine.jobs.memory import require_memory_of_job
from worker.engine.jobs.preparing import (
    InputStates,
    examples_of,
    given_statistics,
    longest_row,
    outputs_searched,
    padded_tokens,
    prepare,
)
from worker.engine.jobs.results import (
    as_run,
    filter_notes,
    model_result,
    notes_of_given,
    stated_licences,
    stopping_of,
    vocabulary_notes,
)
from worker.engine.merging.backbone import Backbone, given
from worker.engine.merging.head_alignment import align_head
from worker.engine.merging.interference import Interference, compared_tensors, interference
from worker.engine.merging.job_models import JobModel, experts_of
from worker.engine.merging.mergers import mean_shares, merger_of, refitted_state, weighted_average
from worker.engine.merging.refits.linear_groups import linear_groups
from worker.engine.runtime.device import peak_memory_bytes
from worker.engine.runtime.resources import require_space
from worker.engine.search.gate import verdict
from worker.engine.search.job import floor_notes, judged_notes, search_job, with_chosen, with_published
from worker.engine.search.trial_merges import State


def merge(spec: MergeSpec, context: JobContext) -> MergeResult:
    """Run the whole merge and leave a complete artifact in `spec.folder`."""
    loaded = load(spec, context)
    by_method = measure_all(spec, loaded, context)
    chosen = choose(spec, loaded.plan, by_method, context)
    written = write(chosen, loaded.plan, context)
    written = align(chosen, loaded.plan, written, context)
    metrics = evaluate(chosen.models, loaded.plan, loaded.base_digest, written.folders, context)
    candidates, accepted = judge(spec, chosen, metrics, context)
    found = compare(chosen, loaded.plan, context)
    check_written(written.files.values(), spec.folder, torch.get_num_threads())
    context.note_first(*loaded.reloading.check_published(written.published))
    loaded.check_unchanged()
    return publish(chosen, loaded, written, Judged(metrics, candidates, accepted, found), context)


@dataclass(frozen=True)
class LoadedInputs:
    """The inputs of a merge, opened and checked."""

    plan: MergePlan
    models: Sequence[JobModel]
    base_digest: str | None
    states: InputStates
    reloading: Reloading

    def check_unchanged(self) -> None:
        """Raise InvalidCheckpoint or InvalidStatistics where a file was changed while the job ran."""
        self.states.check_unchanged()
        for model in self.models:
            for statistic in model.given.values():
                statistic.check_unchanged()


@dataclass(frozen=True)
class ChosenMerge:
    """The merge to make: the one that was asked for, or the one that `auto` chose."""

    spec: MergeSpec
    models: Sequence[JobModel]
    search: Search | None = None
    candidates: Sequence[Candidate] | None = None
    state: State | None = None
    """The merged backbone, if it is already made."""

    @property
    def method(self) -> MethodParameters:
        [method] = self.spec.method.methods
        return method


@dataclass(frozen=True)
class Written:
    """The models in the artifact."""

    folders: Mapping[str, Path]
    """Folder of each model's merge, by model."""
    files: Mapping[Path, WrittenFile]
    """Weight files, by path."""
    shares: Sequence[float | None]
    """Every model's mean merge weight."""

    @property
    def published(self) -> list[Path]:
        """All folders, each once."""
        return list(dict.fromkeys(self.folders.values()))


@dataclass(frozen=True)
class Judged:
    """The merge's metrics, and the interference of its models."""

    metrics: Mapping[str, MetricResult] | None
    """Metrics by model."""
    candidates: Sequence[Candidate] | None
    accepted: bool | None
    """Whether the merge beats what `auto` must beat."""
    interference: Interference | None


def load(spec: MergeSpec, context: JobContext) -> LoadedInputs:
    """Open the checkpoints, plan the merge, check that what it publishes will load, and read the models' rows."""
    context.note(*spec.notes)
    with context.timed("load_seconds"):
        inputs = Inputs(spec, context.views, context.on_progress)
        base = inputs.checkpoint(spec.base) if spec.base else None
        checkpoints = [inputs.checkpoint(model, base) for model in spec.models]
        output = spec.output
        plan = plan_job(
            spec.method,
            [model.name for model in spec.models],
            checkpoints,
            output,
            base,
            spec.slices,
        )
        context.note(*(filter_notes(plan, spec) if not spec.strict_filters else []))
        context.note(*(note for info in plan.all_checkpoints for note in info.notes))
        context.note(*plan.notes, *vocabulary_notes(plan))
        context.note(*licence_notes(stated_licences(spec, plan)))
        states = InputStates.of(plan.all_checkpoints)
        context.store.may_keep = states.are_untouched
        require_space(spec.folder, plan.bytes_to_write, "the artifact")
        require_memory_of_job(plan, spec, context, longest_row=1)
        context.note(*check_templates(plan, output.chat_template))
        context.note(*check_plan(plan))
        reloading = Reloading(plan)
        reloading.check_descriptions()
        loading = context.phase("loading", len(spec.models), "models")
        context.lasting.digests.check_expected(inputs.expected, torch.get_num_threads())
        digests = context.lasting.digests.of_checkpoints(plan.all_checkpoints, torch.get_num_threads())
        base_digest = digests.pop() if plan.base else None
        models = []
        for index, (asked, info, digest) in enumerate(zip(spec.models, plan.checkpoints, digests, strict=True)):
            given = given_statistics(plan, index, asked, inputs, context)
            models.append(prepare(spec, JobModel(asked, info, digest, given), inputs, context))
            loading.advance()
        context.note(*notes_of_given(spec.method, models))
        on_cpu = context.device.type == "cpu"
        held = sum(map(padded_tokens, models)) if spec.method.refits_layers and on_cpu else 0
        read = sum(map(outputs_searched, models)) if spec.method.search and not plan.merges_heads else 0
        require_memory_of_job(plan, spec, context, max(map(longest_row, models)), held, read)
        return LoadedInputs(plan, models, base_digest, states, reloading)


def measure_all(spec: MergeSpec, loaded: LoadedInputs, context: JobContext) -> list[list[JobModel]]:
    """Measure the models for each of the job's methods."""
    methods = spec.method.methods
    by_method = [[for_method(method, model) for model in loaded.models] for method in methods]
    if not spec.method.statistics - spec.given_of_all:
        return by_method
    with context.timed("score_seconds", context.shared.elapsed_seconds):
        work = {
            index: Measuring(method, loaded.plan, by_method[index])
            for index, method in enumerate(methods)
            if method.statistics
        }
        for index, measured in zip(work, measure(list(work.values()), context), strict=True):
            by_method[index] = measured
    for models in by_method:
        for model in models:
            context.note(*truncations(model))
    return by_method


def choose(
    spec: MergeSpec, plan: MergePlan, by_method: Sequence[Sequence[JobModel]], context: JobContext
) -> ChosenMerge:
    """Return the merge that `auto` finds best, or the one that was asked for."""
    auto = spec.method.search
    if auto is None:
        [models] = by_method
        return ChosenMerge(spec, models)
    with context.timed("search_seconds"):
        result = search_job(
            spec, auto, plan, by_method, context.models, context.outputs, context.precision, context.on_progress
        )
    found = result.found
    chosen = with_chosen(spec, found.chosen)
    context.note(*(note for method in chosen.method.methods for note in notes_of_estimates(method)))
    context.note(*floor_notes(found.search), *result.notes)
    if plan.base is not None and plan.lacking_in_base is not None:
        context.note(f"the base {plan.base.source} is not in the table of auto: it lacks tensor {plan.lacking_in_base}")
    models = [
        replace(model, spec=asked)
        for model, asked in zip(by_method[found.chosen.candidate], chosen.models, strict=True)
    ]
    return ChosenMerge(chosen, models, found.search, result.candidates, result.state)


def write(chosen: ChosenMerge, plan: MergePlan, context: JobContext) -> Written:
    """Merge the models that take part into the artifact, or store the backbone that is merged already."""
    method, spec = chosen.method, chosen.spec
    with context.timed("merge_seconds"):
        models = [model.for_method for model in chosen.models]
        shares = mean_shares(method, models, plan)
        names = [model.name for model in chosen.models]
        folders = artifact.model_folders(spec.folder, names, is_one=plan.merges_heads)
        tensors = len(plan.backbone) + sum(len(head) for head in plan.heads)
        refits = len(linear_groups(plan)) if method.refits_layers and chosen.state is None else 0
        merging = context.phase("merging", tensors + refits, "tensors")
        merger = merger_of(method, models, plan)
        takes_part = [model.takes_part for model in models]
        scale: Callable[[TensorPlace], float] = method.distance
        if chosen.state is not None:  # it is scaled already
            merger, scale = given(chosen.state), lambda place: 1.0
        elif method.refits_layers:
            start = Backbone(plan, takes_part, merger)
            experts = partial(experts_of, chosen.models, context.models)  # not held while writing
            merger = given(refitted_state(method, start, experts(), context.precision, merging.advance))
        # A tensor that is merged by rows has one thread; solving for a whole tensor takes all of them.
        threads = torch.get_num_threads() if method.merges_rows else None
        published = list(dict.fromkeys(folders.values()))
        most = spec.output.max_shard_bytes
        with Backbone(plan, takes_part, merger, scale) as backbone:
            files = write_models(plan, published, backbone.blocks, most, threads, merging.advance)
        with Backbone(replace(plan, base=None), takes_part, weighted_average(models, plan)) as modules:
            files += write_modules(plan, published, modules.blocks)
        return Written(folders, {file.path: file for file in files}, shares)


def align(chosen: ChosenMerge, plan: MergePlan, written: Written, context: JobContext) -> Written:
    """Refit every kept head to the merged backbone, in the artifact."""
    if not chosen.spec.aligns:
        return written
    files = dict(written.files)
    with context.timed("align_seconds"):
        totals = {model.name: 2 * len(model.rows.alignment) for model in chosen.models}
        aligning = context.phase_of_models("aligning", totals, "examples")
        for model, planned in zip(chosen.models, plan.heads, strict=True):
            examples = model.rows.alignment
            if not examples:
                continue
            folder = written.folders[model.name]
            expert, on_rows = context.models.get(model.info), aligning.advance_of(model.name)
            wanted = context.outputs.head_outputs(expert, model.digest, examples, model.dataset, on_rows)
            merged = context.models.fresh(inspect_checkpoint(folder, f"models/{model.name}"))
            by_merge, _ = examples_of(plan, merged, model.dataset, model.rows.alignment_texts, examples)
            ridge = chosen.spec.output.align_ridge
            head = align_head(expert, wanted, merged, by_merge, context.precision, on_rows, ridge)
            file = rewrite_head(folder, planned, head)
            files[file.path] = file
    return replace(written, files=files)


def judge(
    spec: MergeSpec, chosen: ChosenMerge, metrics: Mapping[str, MetricResult] | None, context: JobContext
) -> tuple[Sequence[Candidate] | None, bool | None]:
    """Return the table of `auto` with the metrics of the published merge, and whether the merge does what it must."""
    auto = spec.method.search
    if auto is None and spec.accept is None:
        return None, None
    minimised = {model.name: task_of(model.info).minimised for model in chosen.models}
    verdicts = []
    candidates = None
    if auto is not None and chosen.search is not None and chosen.candidates is not None:
        candidates = with_published(chosen.candidates, metrics)
        context.note(*judged_notes(chosen.search, candidates))
        accepted, notes = verdict(auto, candidates, metrics or {}, minimised)
        context.note_first(*notes)
        verdicts.append(accepted)
    if spec.accept is not None:
        found = list(missed(spec.accept, metrics or {}, minimised))
        if found:
            context.note_first(Doubt(f"the merge is not accepted: {'; '.join(found)}"))
        verdicts.append(not found)
    asked = [accepted for accepted in verdicts if accepted is not None]
    return candidates, all(asked) if asked else None


def compare(chosen: ChosenMerge, plan: MergePlan, context: JobContext) -> Interference | None:
    """Compute the interference of the models' task vectors; None where it is not asked for."""
    taking_part = [index for index, model in enumerate(chosen.models) if model.takes_part]
    tensors = compared_tensors(plan, taking_part) if chosen.spec.compares else []
    if not tensors:
        return None
    with context.timed("interference_seconds"):
        comparing = context.phase("comparing", len(tensors), "tensors")
        return interference(tensors, taking_part, on_tensor=comparing.advance)


def publish(
    chosen: ChosenMerge, loaded: LoadedInputs, written: Written, judged: Judged, context: JobContext
) -> MergeResult:
    """Write the scores and all documents to the artifact."""
    spec, models, plan = chosen.spec, chosen.models, loaded.plan
    known, errors = stopping_of(chosen.method, models, plan, context)
    mean_retention, min_retention = mean_and_least((judged.metrics or {}).values())
    result = MergeResult(
        models=[
            model_result(model, share, error)
            for model, share, error in zip(models, written.shares, errors, strict=True)
        ],
        metrics=judged.metrics,
        mean_retention=mean_retention,
        min_retention=min_retention,
        candidates=judged.candidates,
        accepted=judged.accepted,
        search=chosen.search,
        stopping=known,
        method=as_run(spec, context.precision, models),
        timings=context.timings,
        peak_memory_bytes=peak_memory_bytes(),
        device=str(context.device),
        notes=context.notes,
    )
    for model in models:
        artifact.write_scores(spec.folder, model)
    scores = {model.name: model.measured.scores for model in models}
    digests = {path: file.sha256 for path, file in written.files.items()}
    artifact.write_documents(spec, plan, result, loaded.base_digest, digests, scores, judged.interference)
    return result
