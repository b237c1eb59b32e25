"""One job, from checkpoints and rows to a folder that can be published."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.headers import CheckpointInfo, checkpoint_state, inspect_checkpoint
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.contracts.report import (
    MergeResult,
    MetricResult,
    ScoreResult,
    Timings,
    Version,
    mean_and_least,
)
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec, OutputSpec, ScoreSpec, StoreSpec
from worker.engine.catalog.methods import MethodParameters, Statistic
from worker.engine.catalog.planning.memory import MemoryNeeds, estimate
from worker.engine.catalog.planning.plan import MergePlan, required_family
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.planning.stacking import plan_job
from worker.engine.catalog.planning.templates import check_templates
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.notes import Doubt, in_order
from worker.engine.catalog.primitives.values import Place
from worker.engine.checkpoints.checking import check_plan
from worker.engine.checkpoints.reader import Digests
from worker.engine.checkpoints.reloading import Reloading
from worker.engine.checkpoints.writer import rewrite_head, write_models, write_modules
from worker.engine.evaluation.evaluate import head_of, predict, predict_with
from worker.engine.evaluation.metrics import Array, compare, likely_permutation
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs import artifact
from worker.engine.jobs.preparing import (
    ModelRun,
    examples_of,
    longest_row,
    measured_by,
    padded_tokens,
    prepare,
    required_dataset,
    truncations,
)
from worker.engine.jobs.results import (
    as_run,
    filter_notes,
    model_result,
    scored_model,
    stopping_of,
    vocabulary_notes,
    with_errors,
)
from worker.engine.merging.backbone import Backbone, given, plain_average
from worker.engine.merging.head_alignment import align_head
from worker.engine.merging.layer_alignment import linear_groups
from worker.engine.merging.mergers import mean_shares, merger_of, refitted_state, weighted_average
from worker.engine.merging.stopping import point
from worker.engine.models.loading import ModelCache, load
from worker.engine.runtime.device import Precision, best_device, peak_memory_bytes, reset_peak_memory, resolve_precision
from worker.engine.runtime.progress import OnProgress, Phase
from worker.engine.runtime.resources import available_memory, require_memory, require_space
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measurer
from worker.engine.scoring.sample import Sample, looks
from worker.engine.scoring.store import StatisticsStore
from worker.engine.search.bench import State
from worker.engine.search.job import floor_notes, judged_notes, search_job, with_chosen, with_published


class Engine:
    """Runs jobs one after the other, keeping models warm between them."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or best_device()
        self._models = ModelCache(self._device)
        self._batches = BatchSizes()
        self._digests = Digests()

    def merge(self, spec: MergeSpec, on_progress: OnProgress) -> MergeResult:
        """Run the whole merge and leave a complete artifact in `spec.folder`.

        Raises:
            EngineError: what was wrong, naming the file, tensor or row. Anything else is a fault of ours.
        """
        with _begun(spec) as (store, views):
            return self._merge(spec, store, views, on_progress)

    def _merge(self, spec: MergeSpec, store: StatisticsStore, views: Views, on_progress: OnProgress) -> MergeResult:
        notes = list(spec.notes)
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)
        with clock.measure("load_seconds"):
            inputs = Inputs(spec, views, on_progress)
            base = inputs.checkpoint(spec.base) if spec.base else None
            checkpoints = [inputs.checkpoint(model, base) for model in spec.models]
            names = [model.name for model in spec.models]
            output = spec.output
            plan = plan_job(
                spec.method,
                names,
                checkpoints,
                output.dtype,
                base,
                output.heads,
                output.vocabulary,
                spec.slices,
                output.config_from,
                output,
                output.chat_template,
            )
            notes += filter_notes(plan, spec) if not spec.strict_filters else []
            notes += [note for info in plan.all_checkpoints for note in info.notes]
            notes += [*plan.notes, *vocabulary_notes(plan)]
            states = [(info, checkpoint_state(info)) for info in plan.all_checkpoints]
            require_space(spec.folder, plan.bytes_to_write, "the artifact")
            self._require_memory(plan, spec, precision, longest_row=1)
            notes += check_templates(plan, output.chat_template)
            notes += check_plan(plan)
            reloading = Reloading(plan)
            reloading.check_descriptions()
            loading = Phase("loading", len(spec.models), "models", on_progress)
            digests = self._digests.of_checkpoints(plan.all_checkpoints, torch.get_num_threads())
            ancestor = digests.pop() if plan.base else None
            runs = []
            for model, info, digest in zip(spec.models, plan.checkpoints, digests, strict=True):
                runs.append(prepare(spec, model, info, digest, inputs, self._models, notes))
                loading.advance()
            on_cpu = self._device.type == "cpu"
            held = sum(map(padded_tokens, runs)) if spec.method.refits_layers and on_cpu else 0
            self._require_memory(plan, spec, precision, max(map(longest_row, runs)), held)

        by_method = [[measured_by(method, spec, run) for run in runs] for method in spec.method.methods]
        if spec.method.statistics:
            with clock.measure("score_seconds"):
                work = []
                for asked, own in zip(spec.method.methods, by_method, strict=True):
                    if asked.statistics:
                        measurer = Measurer(asked, plan.linear_inputs, precision, store, self._batches)
                        work.append((asked, [(measurer, run) for run in own]))
                scoring = _scoring([one for _, measured in work for one in measured], on_progress)
                for asked, measured in work:
                    self._measure(asked, measured, plan, scoring)
            for own in by_method:
                for run in own:
                    notes += truncations(run)

        found, candidates, made = None, None, None
        if spec.method.search is not None:
            with clock.measure("search_seconds"):
                found, candidates, made = search_job(
                    spec, spec.method.search, plan, by_method, self._models, precision, on_progress
                )
            runs = by_method[found.chosen.candidate]
            spec = with_chosen(spec, found.chosen)
            runs = [replace(run, spec=model) for run, model in zip(runs, spec.models, strict=True)]
            notes += floor_notes(found.search)
        else:
            [runs] = by_method
        [method] = spec.method.methods

        with clock.measure("merge_seconds"):
            shares = mean_shares(method, runs, plan)
            folders = artifact.model_folders(spec.folder, names, is_one=plan.merges_heads)
            written = self._write(method, runs, plan, made, folders, spec.output, precision, on_progress)

        if spec.aligns:
            with clock.measure("align_seconds"):
                written |= self._align(plan, runs, folders, precision, spec.output.align_ridge, on_progress)

        metrics = None
        if any(run.evaluation for run in runs):
            with clock.measure("evaluate_seconds"):
                metrics = self._evaluate(plan, runs, folders, precision, on_progress, notes)

        if found is not None and candidates is not None:
            candidates = with_published(candidates, metrics)
            notes += judged_notes(found.search, candidates)
        notes = [*reloading.check_published(list(dict.fromkeys(folders.values()))), *notes]
        _check_unchanged(states)
        known, errors = stopping_of(method, runs, plan, notes)
        mean_retention, min_retention = mean_and_least((metrics or {}).values())
        result = MergeResult(
            models=[model_result(run, share, error) for run, share, error in zip(runs, shares, errors, strict=True)],
            metrics=metrics,
            mean_retention=mean_retention,
            min_retention=min_retention,
            candidates=candidates,
            search=found and found.search,
            stopping=known,
            method=as_run(spec, precision, runs),
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=in_order(notes),
        )
        for run in runs:
            artifact.write_scores(spec.folder, run.spec.name, run.digest, run.measured)
        scores = {run.spec.name: run.measured.scores for run in runs}
        artifact.write_documents(spec, plan, result, ancestor, written, scores)
        return result

    def score(self, spec: ScoreSpec, on_progress: OnProgress) -> ScoreResult:
        """Compute the method's statistics of every model, keep them, and leave a complete artifact in `spec.folder`.

        Raises:
            EngineError: what was wrong, naming the file, tensor or row. Anything else is a fault of ours.
        """
        with _begun(spec) as (store, views):
            return self._score(spec, store, views, on_progress)

    def _score(self, spec: ScoreSpec, store: StatisticsStore, views: Views, on_progress: OnProgress) -> ScoreResult:
        notes: list[str] = []
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)
        [method] = spec.method.methods
        if not method.statistics:
            raise TypeError(f"method {method.name} measures nothing")

        measured = []
        with clock.measure("load_seconds"):
            inputs = Inputs(spec, views, on_progress)
            plans = [plan_merge([inputs.checkpoint(model)]) for model in spec.models]
            for plan in plans:
                required_family(plan)
            states = [(info, checkpoint_state(info)) for plan in plans for info in plan.checkpoints]
            loading = Phase("loading", len(spec.models), "models", on_progress)
            infos = [info for plan in plans for info in plan.checkpoints]
            notes += [note for info in infos for note in info.notes]
            digests = self._digests.of_checkpoints(infos, torch.get_num_threads())
            for model, plan, info, digest in zip(spec.models, plans, infos, digests, strict=True):
                self._require_memory(plan, spec, precision, longest_row=1)
                run = prepare(spec, model, info, digest, inputs, self._models, notes)
                self._require_memory(plan, spec, precision, longest_row(run))
                notes += plan.notes
                measured.append((Measurer(method, plan.linear_inputs, precision, store, self._batches), run))
                loading.advance()

        with clock.measure("score_seconds"):
            scoring = _scoring(measured, on_progress)
            for one, plan in zip(measured, plans, strict=True):
                self._measure(method, [one], plan, scoring)

        _check_unchanged(states)
        runs = [run for _, run in measured]
        for run in runs:
            notes += truncations(run)
        result = ScoreResult(
            models=[
                scored_model(run, stopping_of(method, [run], plan, notes)[0])
                for run, plan in zip(runs, plans, strict=True)
            ],
            method=as_run(spec, precision, runs),
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=in_order(notes),
        )
        for run in runs:
            artifact.write_scores(spec.folder, run.spec.name, run.digest, run.measured)
        artifact.write_score_documents(spec, result, {run.spec.name: run.measured.scores for run in runs})
        return result

    def _require_memory(
        self, plan: MergePlan, spec: JobSpec, precision: Precision, longest_row: int, tokens_held: int = 0
    ) -> None:
        """Of this machine; on a GPU, activations take none of it. Models of earlier merges make room."""
        needs = MemoryNeeds(
            spec.method,
            loads_models=spec.loads_models,
            models_beside=spec.models_beside,
            longest_row=longest_row,
            tokens_held=tokens_held,
            value_bytes=0 if self._device.type == "cuda" else 2 if precision == "bfloat16" else 4,
            threads=torch.get_num_threads(),
        )
        needed = estimate(plan, needs)
        loaded = plan.checkpoints if spec.loads_models else []
        if needed + self._models.bytes_besides(loaded) > available_memory():
            self._models.keep_only(loaded)
        require_memory(needed)

    def _measure(
        self,
        method: MethodParameters,
        measured: Sequence[tuple[Measurer, ModelRun]],
        plan: MergePlan,
        scoring: Phase,
    ) -> None:
        """All statistics of every model that takes part; with `examples: "auto"`, of as many rows as it takes to know
        the weights of their merge."""
        samples = [(measurer, run, run.sample) for measurer, run in measured if run.sample is not None]

        def extend(
            measurer: Measurer, run: ModelRun, sample: Sample, rows: int, statistics: Collection[Statistic]
        ) -> None:
            loaded = self._models.get(run.info)
            measurer.measure(run.measured, loaded, run.digest, sample, rows, scoring.advance, statistics)

        stopping = method.scoring
        if stopping is None or stopping.tolerance is None:
            for measurer, run, sample in samples:
                extend(measurer, run, sample, len(sample), method.statistics)
            return
        for rows in looks(max(len(sample) for _, _, sample in samples)):
            for measurer, run, sample in samples:
                if run.measured.rows < len(sample):
                    extend(measurer, run, sample, min(rows, len(sample)), {Statistic.MASK_FISHER})
            reached = point(stopping, with_errors([run for _, run, _ in samples]), rows, plan.owned)
            if reached is not None and reached.error <= stopping.tolerance:
                break
        for measurer, run, sample in samples:
            extend(measurer, run, sample, run.measured.rows, method.statistics - {Statistic.MASK_FISHER})

    def _write(
        self,
        method: MethodParameters,
        runs: list[ModelRun],
        plan: MergePlan,
        made: State | None,
        folders: Mapping[str, Path],
        output: OutputSpec,
        precision: Precision,
        on_progress: OnProgress,
    ) -> dict[Path, str]:
        """Merge the models that take part, or store what is merged already. See `write_models`."""
        tensors = len(plan.backbone) + sum(len(head) for head in plan.heads)
        refits = len(linear_groups(plan)) if method.refits_layers and made is None else 0
        merging = Phase("merging", tensors + refits, "tensors", on_progress)
        merger = merger_of(method, runs, plan)
        scale: Callable[[Place], float] = method.distance
        if made is not None:  # scaled already
            merger, scale = given(made), lambda place: 1.0
        elif method.refits_layers:
            merger = given(refitted_state(method, merger, runs, plan, self._models, precision, merging.advance))
        # Alone with its rows, a tensor has a thread; solving for a whole one takes them all.
        threads = torch.get_num_threads() if method.merges_rows else None
        published = list(dict.fromkeys(folders.values()))
        takes_part = [run.takes_part for run in runs]
        with Backbone(plan, takes_part, merger, scale) as backbone:
            written = write_models(plan, published, backbone.blocks, output.max_shard_bytes, threads, merging.advance)
        with Backbone(replace(plan, base=None), takes_part, weighted_average(runs, plan)) as modules:
            write_modules(plan, published, modules.blocks)
        return written

    def _align(
        self,
        plan: MergePlan,
        runs: list[ModelRun],
        folders: dict[str, Path],
        precision: Precision,
        ridge: float,
        on_progress: OnProgress,
    ) -> dict[Path, str]:
        """Refit every kept head to the merged backbone, in the artifact; the sha256 of what was written anew."""
        aligning = Phase("aligning", 2 * sum(len(run.alignment) for run in runs), "examples", on_progress)
        digests = {}
        for run, planned in zip(runs, plan.heads, strict=True):
            if not run.alignment:
                continue
            folder = folders[run.spec.name]
            expert = self._models.get(run.info)
            merged = load(inspect_checkpoint(folder, f"models/{run.spec.name}"), self._device)
            by_merge, _ = examples_of(plan, merged, required_dataset(run.spec), run.alignment_rows, run.alignment)
            head = align_head(expert, merged, run.alignment, precision, aligning.advance, ridge, by_merge)
            path, digest = rewrite_head(folder, planned, head)
            digests[path] = digest
        return digests

    def _evaluate(
        self,
        plan: MergePlan,
        runs: list[ModelRun],
        folders: dict[str, Path],
        precision: Precision,
        on_progress: OnProgress,
        notes: list[str],
    ) -> dict[str, MetricResult]:
        """Expert, plain average and merge (loaded from the artifact, as its user will) on the same rows."""
        evaluating = Phase("evaluating", 3 * sum(len(run.evaluation) for run in runs), "examples", on_progress)
        average = plain_average(plan, [run.takes_part for run in runs])
        return {
            run.spec.name: self._compare(plan, run, folders[run.spec.name], average, precision, evaluating, notes)
            for run in runs
            if run.spec.evaluation is not None
        }

    def _compare(
        self,
        plan: MergePlan,
        run: ModelRun,
        folder: Path,
        average: dict[str, Tensor],
        precision: Precision,
        evaluating: Phase,
        notes: list[str],
    ) -> MetricResult:
        """One model's rows; its merge is held no longer than this takes."""
        evaluation, examples = run.spec.evaluation, run.evaluation
        if evaluation is None:
            raise TypeError(f"{run.spec.name} has no evaluation")
        loaded = self._models.get(run.info)
        labels = np.array([e.label for e in examples], dtype=np.float64)
        expert_predictions = predict(loaded, examples, precision, evaluating.advance)
        if loaded.task.problem == "classification":
            better = likely_permutation(labels, expert_predictions, loaded.task.outputs)
            if better:
                notes.append(
                    Doubt(
                        f"{run.spec.source} fits {evaluation.source} far better when its labels 0 to {len(better) - 1} "
                        f"are read as {', '.join(map(str, better))}; do both mean the same by them?"
                    )
                )
        published = "model" if plan.merges_heads else f"models/{run.spec.name}"
        merged = load(inspect_checkpoint(folder, published), self._device)
        examples, truncated = examples_of(plan, merged, evaluation, run.evaluation_rows, examples)
        notes += truncated
        kept = head_of(loaded)
        merged_predictions, kept_predictions = predict_with(merged, kept, examples, precision, evaluating.advance)
        merged.model.load_state_dict(average, strict=False)
        head_of(merged).load_state_dict(kept.state_dict())
        average_predictions = predict(merged, examples, precision, evaluating.advance)
        predictions: dict[Version, Array] = {
            "expert": expert_predictions,
            "average": average_predictions,
            "merged_kept_head": kept_predictions,
            "merged": merged_predictions,
        }
        return compare(evaluation, loaded.task, labels, predictions)


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


@contextmanager
def _begun(spec: JobSpec) -> Iterator[tuple[StatisticsStore, Views]]:
    """A job with its folder, views of its inputs, and its statistics: these are looked for and kept, without a place
    for them until the job is done.

    Several candidates of one job share them, so that none goes before its end.
    """
    reset_peak_memory()
    spec.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        where = spec.store
        if where is None:
            where = StoreSpec(folder=Path(stack.enter_context(TemporaryDirectory())), max_bytes=sys.maxsize)
        views = stack.enter_context(Views())
        yield stack.enter_context(StatisticsStore(where.folder, where.max_bytes)), views


def _scoring(measured: Sequence[tuple[Measurer, ModelRun]], on_progress: OnProgress) -> Phase:
    """Begins the phase: its end is where every model is measured on all of its rows."""
    total = sum(measurer.passes * len(run.sample) for measurer, run in measured if run.sample is not None)
    return Phase("scoring", total, "examples", on_progress)


def _check_unchanged(states: Sequence[tuple[CheckpointInfo, str]]) -> None:
    for info, state in states:
        if checkpoint_state(info) != state:
            raise InvalidCheckpoint(info.source, "its files were changed while the job ran; post it again")
