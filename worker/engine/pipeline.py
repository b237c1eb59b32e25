"""One job, from checkpoints and rows to a folder that can be published."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine import artifact
from worker.engine.alignment import align_head
from worker.engine.backbone import Backbone, given, plain_average
from worker.engine.catalog.errors import InvalidCheckpoint, InvalidDataset
from worker.engine.catalog.headers import CheckpointInfo, checkpoint_state, inspect_checkpoint
from worker.engine.catalog.labels import LabelMap
from worker.engine.catalog.methods import (
    AlignedRegMeanParameters,
    AutoParameters,
    AverageParameters,
    MeasuringParameters,
    MethodParameters,
    PassthroughParameters,
    ScoringParameters,
    Statistic,
)
from worker.engine.catalog.planning import MergePlan, plan_merge, required_family
from worker.engine.catalog.report import (
    Candidate,
    CandidateMetric,
    MergeResult,
    MetricResult,
    ModelResult,
    ScoredModel,
    ScoreResult,
    ScoresFile,
    Search,
    Stopping,
    Timings,
    Version,
)
from worker.engine.catalog.rows import Row, Rows, sample
from worker.engine.catalog.spec import (
    LEAST_ALIGNMENT_ROWS,
    DatasetSpec,
    EvaluationSpec,
    JobSpec,
    MergeSpec,
    ModelSpec,
    ScoreSpec,
    StoreSpec,
)
from worker.engine.catalog.stacking import copied_shares, plan_job
from worker.engine.checkpoints.checking import check_plan
from worker.engine.checkpoints.layout import check_layout
from worker.engine.checkpoints.loading import LoadedModel, ModelCache, load
from worker.engine.checkpoints.reader import Digests
from worker.engine.checkpoints.tokenizer import check_tokenizers
from worker.engine.checkpoints.writer import rewrite_head, write_models
from worker.engine.device import Precision, best_device, peak_memory_bytes, reset_peak_memory, resolve_precision
from worker.engine.evaluation.evaluate import head_of, predict, predict_with
from worker.engine.evaluation.metrics import Array, compare, likely_permutation
from worker.engine.inputs import Inputs
from worker.engine.layers import Expert, linear_groups, refitted
from worker.engine.methods import BUILDERS, MeasuredModel, Merger
from worker.engine.methods.combine import model_weights
from worker.engine.methods.mask_fisher import node_weights, weight_shares
from worker.engine.phase import OnProgress, Phase
from worker.engine.resources import available_memory, require_memory, require_space
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.data import Example, plan_batches, tokenize
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample, looks
from worker.engine.search.bench import Bench, Side, Tryout
from worker.engine.search.journal import Journal
from worker.engine.search.search import Found, search
from worker.engine.search.space import Proposal, Space
from worker.engine.search.splitting import halves
from worker.engine.search.table import PLAIN_AVERAGE, Line, table
from worker.engine.stopping import Scored, errors_of_models, point, stopping
from worker.engine.store import StatisticsStore
from worker.engine.token_rows import ByToken


@dataclass
class ModelRun:
    """What one job knows of one model: its rows, and then its statistics."""

    spec: ModelSpec
    info: CheckpointInfo
    digest: str
    sample: Sample | None = None
    """Rows to measure."""
    unseen: list[Example] = field(default_factory=list)
    """Rows to fit layers to; none of them is in `evaluation`."""
    truncated: list[str] = field(default_factory=list)
    """A note, where some of `unseen` were."""
    alignment: list[Example] = field(default_factory=list)
    """Rows to align the head on; none of them is in `evaluation`."""
    alignment_rows: list[Row] = field(default_factory=list)
    """The texts of `alignment`, for a merge with another tokenizer."""
    searched: list[Example] = field(default_factory=list)
    """Rows of the evaluation that `auto` searches on; none of them is in `evaluation`."""
    evaluation: list[Example] = field(default_factory=list)
    """Those that the result is judged by."""
    evaluation_rows: list[Row] = field(default_factory=list)
    """The same of `evaluation`, where vocabularies may differ."""
    measured: Measured = field(default_factory=Measured)

    @property
    def takes_part(self) -> bool:
        return self.spec.takes_part

    @property
    def as_measured(self) -> MeasuredModel:
        measured = self.measured
        return MeasuredModel(
            self.spec.weight,
            measured.scores,
            measured.of(Statistic.GRAM),
            measured.of(Statistic.FISHER),
            self.spec.parameters,
        )

    @property
    def scored(self) -> Scored | None:
        """None when it has no scores with errors."""
        if self.sample is None or not self.measured.sums:
            return None
        return Scored(self.spec.weight, self.measured.sums, self.sample.population)


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
        with _begun(spec) as store:
            return self._merge(spec, store, on_progress)

    def _merge(self, spec: MergeSpec, store: StatisticsStore, on_progress: OnProgress) -> MergeResult:
        notes: list[str] = []
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)
        with clock.measure("load_seconds"):
            inputs = Inputs(spec, on_progress)
            base = inputs.checkpoint(spec.base) if spec.base else None
            checkpoints = [inputs.checkpoint(model, base) for model in spec.models]
            names = [model.name for model in spec.models]
            output = spec.output
            plan = plan_job(spec.method, names, checkpoints, output.dtype, base, output.heads, output.vocabulary)
            notes += _vocabulary_notes(plan)
            states = [(info, checkpoint_state(info)) for info in plan.all_checkpoints]
            require_space(spec.folder, plan.bytes_to_write, "the artifact")
            self._require_memory(plan, spec, precision, longest_row=1)
            notes += check_plan(plan, is_stacked=isinstance(spec.method, PassthroughParameters))
            if not spec.loads_models:
                check_tokenizers(plan)
            loading = Phase("loading", len(spec.models), "models", on_progress)
            runs = []
            for model, info in zip(spec.models, plan.checkpoints, strict=True):
                runs.append(self._prepare(spec, model, info, inputs, notes))
                loading.advance()
            on_cpu = self._device.type == "cpu"
            held = sum(map(_padded_tokens, runs)) if spec.method.refits_layers and on_cpu else 0
            self._require_memory(plan, spec, precision, max(map(_longest, runs)), held)

        by_method = [[_measured_by(method, run) for run in runs] for method in spec.method.methods]
        if spec.method.statistics:
            with clock.measure("score_seconds"):
                work = []
                for asked, own in zip(spec.method.methods, by_method, strict=True):
                    if isinstance(asked, MeasuringParameters):
                        measurer = Measurer(asked, plan.linear_inputs, precision, store, self._batches)
                        work.append((asked, [(measurer, run) for run in own]))
                scoring = _scoring([one for _, measured in work for one in measured], on_progress)
                for asked, measured in work:
                    self._measure(asked, measured, plan, scoring)
            for own in by_method:
                for run in own:
                    notes += _truncations(run)

        found, candidates = None, None
        if isinstance(spec.method, AutoParameters):
            with clock.measure("search_seconds"):
                found, candidates = self._search(spec, spec.method, plan, by_method, precision, on_progress)
            runs = by_method[found.chosen.candidate]
            spec = _with_chosen(spec, found.chosen)
            runs = [replace(run, spec=model) for run, model in zip(runs, spec.models, strict=True)]
            notes += _floor_notes(found.search)
        else:
            [runs] = by_method
        [method] = spec.method.methods

        with clock.measure("merge_seconds"):
            merger, shares = _merger(method, runs, plan)
            folders = artifact.model_folders(spec.folder, names, is_one=plan.merges_heads)
            tensors = len(plan.backbone) + sum(len(head) for head in plan.heads)
            refits = len(linear_groups(plan)) if method.refits_layers else 0
            merging = Phase("merging", tensors + refits, "tensors", on_progress)
            taking_part = [run.takes_part for run in runs]
            if isinstance(method, AlignedRegMeanParameters):
                merger = given(self._refitted(method, merger, runs, plan, precision, merging.advance))
            with Backbone(plan, taking_part, merger, partial(method.at, "scale")) as backbone:
                # Alone with its rows, a tensor has a thread; solving for a whole one takes them all.
                threads = torch.get_num_threads() if method.merges_rows else None
                digests = write_models(
                    plan,
                    list(dict.fromkeys(folders.values())),
                    backbone.blocks,
                    spec.output.max_shard_bytes,
                    threads,
                    merging.advance,
                )

        if spec.aligns:
            with clock.measure("align_seconds"):
                digests |= self._align(plan, runs, folders, precision, spec.output.align_ridge, on_progress)

        metrics = None
        if any(run.evaluation for run in runs):
            with clock.measure("evaluate_seconds"):
                metrics = self._evaluate(plan, runs, folders, precision, on_progress, notes)

        _check_unchanged(states)
        known, errors = _stopping(method, runs, plan, notes)
        retentions = [m.retention for m in (metrics or {}).values() if m.retention is not None]
        result = MergeResult(
            models=[_model_result(run, share, error) for run, share, error in zip(runs, shares, errors, strict=True)],
            metrics=metrics,
            mean_retention=sum(retentions) / len(retentions) if retentions else None,
            min_retention=min(retentions, default=None),
            candidates=candidates and _with_published(candidates, metrics),
            search=found and found.search,
            stopping=known,
            method=_as_run(spec, precision, runs),
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=list(dict.fromkeys(notes)),
        )
        for run in runs:
            artifact.write_scores(spec.folder, run.spec.name, run.digest, run.measured)
        scores = {run.spec.name: run.measured.scores for run in runs}
        ancestor = self._digests.of_checkpoint(plan.base) if plan.base else None
        artifact.write_documents(spec, plan, result, ancestor, digests, scores)
        return result

    def score(self, spec: ScoreSpec, on_progress: OnProgress) -> ScoreResult:
        """Compute the method's statistics of every model, keep them, and leave a complete artifact in `spec.folder`.

        Raises:
            EngineError: what was wrong, naming the file, tensor or row. Anything else is a fault of ours.
        """
        with _begun(spec) as store:
            return self._score(spec, store, on_progress)

    def _score(self, spec: ScoreSpec, store: StatisticsStore, on_progress: OnProgress) -> ScoreResult:
        notes: list[str] = []
        clock = Stopwatch()
        precision = resolve_precision(spec.method.precision, self._device)
        if not isinstance(spec.method, MeasuringParameters):
            raise TypeError(f"method {spec.method.name} measures nothing")

        measured = []
        with clock.measure("load_seconds"):
            inputs = Inputs(spec, on_progress)
            plans = [plan_merge([inputs.checkpoint(model)]) for model in spec.models]
            for plan in plans:
                required_family(plan)
            states = [(info, checkpoint_state(info)) for plan in plans for info in plan.checkpoints]
            loading = Phase("loading", len(spec.models), "models", on_progress)
            for model, plan in zip(spec.models, plans, strict=True):
                self._require_memory(plan, spec, precision, longest_row=1)
                run = self._prepare(spec, model, plan.checkpoints[0], inputs, notes)
                self._require_memory(plan, spec, precision, _longest(run))
                measured.append((Measurer(spec.method, plan.linear_inputs, precision, store, self._batches), run))
                loading.advance()

        with clock.measure("score_seconds"):
            scoring = _scoring(measured, on_progress)
            for one, plan in zip(measured, plans, strict=True):
                self._measure(spec.method, [one], plan, scoring)

        _check_unchanged(states)
        runs = [run for _, run in measured]
        for run in runs:
            notes += _truncations(run)
        result = ScoreResult(
            models=[
                _scored_model(run, _stopping(spec.method, [run], plan, notes)[0])
                for run, plan in zip(runs, plans, strict=True)
            ],
            method=_as_run(spec, precision, runs),
            timings=Timings(**clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            device=str(self._device),
            notes=list(dict.fromkeys(notes)),
        )
        for run in runs:
            artifact.write_scores(spec.folder, run.spec.name, run.digest, run.measured)
        artifact.write_score_documents(spec, result, {run.spec.name: run.measured.scores for run in runs})
        return result

    def _require_memory(
        self, plan: MergePlan, spec: JobSpec, precision: Precision, longest_row: int, tokens_held: int = 0
    ) -> None:
        """Of this machine; on a GPU, activations take none of it. Models of earlier merges make room."""
        needed = plan.peak_memory_bytes(
            longest_row,
            statistics=spec.method.statistics,
            models_beside=spec.models_beside,
            tokens_held=tokens_held,
            batch_rows=spec.method.batch_rows,
            batch_tokens=spec.method.most_batch_tokens,
            value_bytes=0 if self._device.type == "cuda" else 2 if precision == "bfloat16" else 4,
            loads_models=spec.loads_models,
            merges_rows=spec.method.merges_rows,
            selects_by_rank=spec.method.selects_by_rank,
            threads=torch.get_num_threads(),
        )
        loaded = plan.checkpoints if spec.loads_models else []
        if needed + self._models.bytes_besides(loaded) > available_memory():
            self._models.keep_only(loaded)
        require_memory(needed)

    def _prepare(
        self, spec: JobSpec, model: ModelSpec, info: CheckpointInfo, inputs: Inputs, notes: list[str]
    ) -> ModelRun:
        """Check a model's weights and read its rows: whatever is wrong with them is found before any work is spent."""
        run = ModelRun(model, info, self._digests.of_checkpoint(info))
        evaluates = isinstance(spec, MergeSpec) and spec.evaluate and model.evaluation is not None
        if not evaluates and not any(spec.rows_wanted(model)):
            check_layout(info)
            if isinstance(spec, MergeSpec) and spec.output.align_heads:
                notes.append(f"the head of {model.name} was kept as it was: no dataset names rows to align it on")
            return run
        loaded = self._models.get(info)
        held_out: set[tuple[str, str | None]] = set()
        if isinstance(spec, MergeSpec) and spec.evaluate and model.evaluation is not None:
            rows = inputs.rows(model.evaluation)
            labels = _label_map(loaded, model.evaluation, rows, notes)
            read = sample(rows, model.evaluation, None)
            run.evaluation, truncated = _examples(loaded, model.evaluation, read, labels)
            if spec.output.vocabulary != "error":
                run.evaluation_rows = read
            notes += truncated
            held_out = {(row.text, row.text_pair) for row in read}
            if isinstance(spec.method, AutoParameters):
                searched, judged = halves(read, spec.method.seed, model.evaluation.source)
                examples = run.evaluation
                run.searched, run.evaluation = [examples[i] for i in searched], [examples[i] for i in judged]
        method, dataset = spec.method, model.dataset
        measured, aligned_on = spec.rows_wanted(model)
        if measured or aligned_on:
            dataset = _required(model)
            rows = inputs.rows(dataset)
            needed = _label_map(loaded, dataset, rows, notes) if measured and method.needs_labels else None
            fitted_on = max(aligned_on, measured if method.refits_layers else 0)
            read, unseen = _read(rows, dataset, measured, fitted_on, held_out, shuffle=method.batch_rows is None)
            if measured:
                population = min(len(rows), dataset.limit or len(rows))
                run.sample = Sample(read[:measured], population, dataset, loaded, needed)
            run.unseen, run.truncated = _examples(loaded, dataset, [read[place] for place in unseen], None)
            run.alignment = run.unseen[:aligned_on]
            run.alignment_rows = [read[place] for place in unseen[:aligned_on]]
            if not unseen and measured and method.refits_layers:
                problem = f"every row is one that {model.name} is evaluated on; method {method.name} needs others"
                raise InvalidDataset(dataset.source, problem)
            distinct = len({(read[place].text, read[place].text_pair) for place in unseen[:aligned_on]})
            if distinct < min(aligned_on, LEAST_ALIGNMENT_ROWS):
                run.alignment = []
                notes.append(
                    f"the head of {model.name} was kept as it was: {dataset.source} has {distinct} rows that it is not "
                    f"evaluated on, and {LEAST_ALIGNMENT_ROWS} are needed to align it"
                )
        elif isinstance(spec, MergeSpec) and spec.output.align_heads:
            notes.append(f"the head of {model.name} was kept as it was: no dataset names rows to align it on")
        return run

    def _measure(
        self,
        method: MeasuringParameters,
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

        if not isinstance(method, ScoringParameters) or method.tolerance is None:
            for measurer, run, sample in samples:
                extend(measurer, run, sample, len(sample), method.statistics)
            return
        for rows in looks(max(len(sample) for _, _, sample in samples)):
            for measurer, run, sample in samples:
                if run.measured.rows < len(sample):
                    extend(measurer, run, sample, min(rows, len(sample)), {Statistic.MASK_FISHER})
            reached = point(method, _scored([run for _, run, _ in samples]), rows, plan.owned)
            if reached is not None and reached.error <= method.tolerance:
                break
        for measurer, run, sample in samples:
            extend(measurer, run, sample, run.measured.rows, method.statistics - {Statistic.MASK_FISHER})

    def _refitted(
        self,
        method: AlignedRegMeanParameters,
        start: Merger,
        runs: list[ModelRun],
        plan: MergePlan,
        precision: Precision,
        on_group: Callable[[], None],
    ) -> dict[str, Tensor]:
        """The backbone that `start` makes, with its layers refitted to the models that take part."""
        experts = [
            Expert(
                self._models.get(run.info),
                run.spec.weight,
                run.unseen[: method.most_examples],
                _required(run.spec).source,
            )
            for run in runs
            if run.takes_part
        ]
        with Backbone(plan, [run.takes_part for run in runs], start) as backbone:
            started = backbone.state()
        return refitted(plan, started, experts, method, precision, on_group)

    def _state(
        self, method: MethodParameters, runs: list[ModelRun], plan: MergePlan, precision: Precision
    ) -> dict[str, Tensor]:
        """The merged backbone, in memory."""
        merger, _ = _merger(method, runs, plan)
        if isinstance(method, AlignedRegMeanParameters):
            merger = given(self._refitted(method, merger, runs, plan, precision, lambda: None))
        with Backbone(plan, [run.takes_part for run in runs], merger, partial(method.at, "scale")) as backbone:
            return backbone.state()

    def _search(
        self,
        spec: MergeSpec,
        auto: AutoParameters,
        plan: MergePlan,
        by_method: Sequence[list[ModelRun]],
        precision: Precision,
        on_progress: OnProgress,
    ) -> tuple[Found, list[Candidate]]:
        """What came of all trials, and the table of what they are worth on the held-out rows."""
        [runs, *_] = by_method  # rows are the same for all
        sides = [
            Side(
                run.spec.name,
                self._models.get(run.info),
                _required_evaluation(run.spec),
                run.searched,
                run.evaluation,
                run.alignment,
                precision,
            )
            for run in runs
        ]
        bench = Bench(plan, sides, precision)
        space = Space(spec, auto, aligns=any(run.alignment for run in runs))
        searching = Phase("searching", auto.trials + len(space) + 1 + len(runs), "merges", on_progress)

        refitted: dict[str, Tryout] = {}

        def made(proposal: Proposal) -> Tryout:
            if not proposal.method.refits_layers:
                return Tryout(bench, merged(proposal))
            key = proposal.method.model_dump_json()
            if key not in refitted:  # it takes as long as dozens of other merges, and trials may differ in heads alone
                refitted[key] = Tryout(bench, merged(proposal))
            return refitted[key]

        def merged(proposal: Proposal) -> dict[str, Tensor]:
            own = by_method[proposal.candidate]
            weighed = [
                replace(run, spec=run.spec.model_copy(update={"weight": weight}))
                for run, weight in zip(own, proposal.weights, strict=True)
            ]
            return self._state(proposal.method, weighed, plan, precision)

        def averaged(takes_part: Sequence[bool]) -> Tryout:
            return Tryout(bench, plain_average(plan, takes_part))

        identity = _identity(spec, auto, runs, precision)
        found = search(spec, auto, space, sides, made, Journal(spec.journal, identity), searching.advance)
        names = [run.spec.name for run in runs]
        lines = [
            Line(
                name=space.names[candidate],
                kind="method",
                method=proposal.method,
                weights=dict(zip(names, proposal.weights, strict=True)),
                align_ridge=proposal.align_ridge,
                trial=number,
                tryout=partial(made, proposal),
            )
            for candidate, (number, proposal) in found.best.items()
        ]
        ridge = spec.output.align_ridge
        backbones = {PLAIN_AVERAGE: [run.takes_part for run in runs]}
        backbones |= {f"expert {name}": [name == other for other in names] for name in names}
        lines += [
            Line(
                name=name,
                kind="average" if name == PLAIN_AVERAGE else "expert",
                method=AverageParameters() if name == PLAIN_AVERAGE else None,
                weights={model: float(takes) for model, takes in zip(names, takes_part, strict=True)},
                align_ridge=ridge,
                trial=None,
                tryout=partial(averaged, takes_part),
            )
            for name, takes_part in backbones.items()
        ]
        return found, table(lines, sides, found.search.chosen, searching.advance)

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
            by_merge, _ = _examples_of(plan, merged, _required(run.spec), run.alignment_rows, run.alignment)
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
                    f"{run.spec.source} fits {evaluation.source} far better when its labels 0 to {len(better) - 1} are "
                    f"read as {', '.join(map(str, better))}; do both mean the same by them?"
                )
        published = "model" if plan.merges_heads else f"models/{run.spec.name}"
        merged = load(inspect_checkpoint(folder, published), self._device)
        examples, truncated = _examples_of(plan, merged, evaluation, run.evaluation_rows, examples)
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
def _begun(spec: JobSpec) -> Iterator[StatisticsStore]:
    """A job with its folder; statistics are looked for and kept, without a place for them until the job is done.

    Several candidates of one job share them, so that none goes before its end.
    """
    reset_peak_memory()
    spec.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        where = spec.store
        if where is None:
            where = StoreSpec(folder=Path(stack.enter_context(TemporaryDirectory())), max_bytes=sys.maxsize)
        yield stack.enter_context(StatisticsStore(where.folder, where.max_bytes))


def _merger(method: MethodParameters, runs: list[ModelRun], plan: MergePlan) -> tuple[Merger, list[float | None]]:
    """The method over the models that take part, and every model's mean merge weight; None where it is not known."""
    models = [_by_token(run.as_measured, index, plan) for index, run in enumerate(runs) if run.takes_part]
    shares = iter(_mean_shares(method, models, plan))
    return BUILDERS[method.name](method, models), [next(shares) if run.takes_part else 0.0 for run in runs]


def _mean_shares(method: MethodParameters, models: list[MeasuredModel], plan: MergePlan) -> Sequence[float | None]:
    if isinstance(method, ScoringParameters):  # by what was measured
        return weight_shares(node_weights(models, method), plan.owned)
    if isinstance(method, PassthroughParameters):  # by the tensors' sources
        return copied_shares(plan)
    of_tensors = []
    for tensor in plan.backbone:
        shares = method.shares(model_weights(models, tensor.place).tolist(), tensor.place)
        if shares is None:
            return [None] * len(models)
        of_tensors.append(shares)
    sizes = torch.tensor([math.prod(tensor.shape) for tensor in plan.backbone], dtype=torch.float64)
    mean: list[float] = (sizes @ torch.tensor(of_tensors, dtype=torch.float64) / sizes.sum()).tolist()
    return mean


def _by_token(model: MeasuredModel, index: int, plan: MergePlan) -> MeasuredModel:
    """What was measured of the plan's model `index`, at the output's rows."""
    places = {t.slot.name: t.token_rows.models[index] for t in plan.backbone if t.token_rows is not None}
    return replace(model, fisher=ByToken(model.fisher, places))


def _measured_by(method: MethodParameters, run: ModelRun) -> ModelRun:
    """The model with what one method knows of it: as yet, the rows that it measures."""
    rows = method.most_examples
    return replace(run, sample=run.sample.first(rows) if run.sample and rows else None, measured=Measured())


def _with_chosen(spec: MergeSpec, chosen: Proposal) -> MergeSpec:
    """The job as if what `auto` chose had been asked for."""
    models = [
        model.model_copy(update={"weight": weight}) for model, weight in zip(spec.models, chosen.weights, strict=True)
    ]
    output = spec.output.model_copy(update={"align_ridge": chosen.align_ridge})
    return spec.model_copy(update={"method": chosen.method, "models": models, "output": output})


def _identity(spec: MergeSpec, auto: AutoParameters, runs: Sequence[ModelRun], precision: Precision) -> str:
    """Of all that the outcomes of trials follow from: a digest."""
    facts: dict[str, Any] = {
        "method": auto.model_dump(mode="json"),
        "models": [run.spec.model_dump(mode="json", include={"name", "weight", "min_retention"}) for run in runs],
        "checkpoints": [run.digest for run in runs],
        "base": spec.base and spec.base.state,
        "align_ridge": spec.output.align_ridge,
        "precision": precision,
        "versions": {name: version(name) for name in ("maskmerge", "optuna", "torch", "transformers")},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for run in runs:
        for examples in (run.searched, run.alignment, run.unseen):
            for example in examples:
                digest.update(json.dumps([dict(example.encoding), example.label]).encode())
        if run.sample is not None:
            digest.update(run.sample.digest(len(run.sample), with_labels=True).encode())
    return digest.hexdigest()


def _floor_notes(found: Search) -> list[str]:
    if found.feasible:
        return []
    kept = found.best.retentions
    lacking = [
        f"{kept[name]:.3f} of {name}, not {floor:g}"
        for name, floor in found.min_retention.items()
        if kept[name] < floor
    ]
    what = f"none of {len(found.trials) + len(found.failed)} merges kept what min_retention asks for"
    return [f"{what}; the nearest, on the rows that were searched on, keeps {' and '.join(lacking)}"]


def _with_published(candidates: Sequence[Candidate], metrics: Mapping[str, MetricResult] | None) -> list[Candidate]:
    """The chosen one with the numbers of what was published, whose storage may round."""
    found = []
    for candidate in candidates:
        if candidate.chosen and metrics is not None:
            published = {
                name: CandidateMetric(metric=m.metric, value=m.merged, interval=m.interval, retention=m.retention)
                for name, m in metrics.items()
            }
            retentions = [m.retention for m in metrics.values() if m.retention is not None]
            candidate = candidate.model_copy(
                update={
                    "metrics": published,
                    "mean_retention": sum(retentions) / len(retentions) if retentions else None,
                    "min_retention": min(retentions, default=None),
                }
            )
        found.append(candidate)
    return found


def _required_evaluation(model: ModelSpec) -> EvaluationSpec:
    if model.evaluation is None:
        raise InvalidDataset(model.name, "no evaluation; method auto needs one for every model")
    return model.evaluation


def _scoring(measured: Sequence[tuple[Measurer, ModelRun]], on_progress: OnProgress) -> Phase:
    """Begins the phase: its end is where every model is measured on all of its rows."""
    total = sum(measurer.passes * len(run.sample) for measurer, run in measured if run.sample is not None)
    return Phase("scoring", total, "examples", on_progress)


def _scored(runs: Sequence[ModelRun]) -> list[Scored]:
    return [scored for run in runs if (scored := run.scored) is not None]


def _stopping(
    method: MethodParameters, runs: Sequence[ModelRun], plan: MergePlan, notes: list[str]
) -> tuple[Stopping | None, list[float | None]]:
    """How well the merge weights are known, and for each model its weights' error."""
    models = _scored(runs)
    if not isinstance(method, ScoringParameters) or not models:
        return None, [None] * len(runs)
    found = stopping(method, models, plan.owned)
    if found.reached is False and found.curve:
        whose = "each model" if len(runs) > 1 else runs[0].spec.name
        notes.append(
            f"after {found.curve[-1].examples} rows of {whose} the merge weights are known to "
            f"{found.curve[-1].error:.3f}, not to the tolerance {method.tolerance:g}"
        )
    errors = iter(errors_of_models(method, models, plan.owned))
    return found, [next(errors) if run.scored else None for run in runs]


def _longest(run: ModelRun) -> int:
    """Tokens of the model's longest row, as far as they are known."""
    lengths = [example.length for example in (*run.unseen, *run.evaluation)]
    return max([*lengths, run.sample.longest() if run.sample else 1])


def _padded_tokens(run: ModelRun) -> int:
    """Of the batches of the rows that layers are fitted to."""
    return sum(len(batch) * batch[-1].length for batch in plan_batches(run.unseen)) if run.takes_part else 0


def _required(model: ModelSpec) -> DatasetSpec:
    if model.dataset is None:
        raise InvalidDataset(model.name, "no data set; the method needs one for every model")
    return model.dataset


def _read(
    rows: Rows,
    dataset: DatasetSpec,
    measured: int,
    fitted_on: int,
    held_out: Collection[tuple[str, str | None]],
    *,
    shuffle: bool,
) -> tuple[list[Row], list[int]]:
    """Rows to measure first, and the places of rows to fit to, which are not held out: more are read to have enough."""
    wanted = max(measured, fitted_on)
    while True:
        read = sample(rows, dataset, wanted, shuffle=shuffle)
        unseen = [place for place, row in enumerate(read) if (row.text, row.text_pair) not in held_out][:fitted_on]
        if len(unseen) == fitted_on or len(read) < wanted:
            return read, unseen
        wanted += max(measured, fitted_on)


def _label_map(loaded: LoadedModel, dataset: DatasetSpec, rows: Rows, notes: list[str]) -> LabelMap:
    """How the rows' labels are the head's; whatever is not plain is noted."""
    if loaded.task.problem == "regression":
        return LabelMap(loaded.task)
    if dataset.label_names:
        labels = LabelMap(loaded.task, tuple(dataset.label_names))
        labels.check_names(dataset.source)
    elif rows.label_names and set(rows.label_names) <= loaded.task.label_ids.keys():
        labels = LabelMap(loaded.task, rows.label_names)
    else:
        if rows.label_names:
            notes.append(
                f"{dataset.source} calls its labels {', '.join(rows.label_names)}, which are not names of "
                f"{loaded.info.source}; its ids were taken as they are"
            )
        return LabelMap(loaded.task)
    if labels.permutation:
        notes.append(
            f"the labels of {dataset.source} are in another order than those of {loaded.info.source}: its ids 0 to "
            f"{len(labels.permutation) - 1} are the checkpoint's {', '.join(map(str, labels.permutation))}"
        )
    return labels


def _examples(
    loaded: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], labels: LabelMap | None
) -> tuple[list[Example], list[str]]:
    """The rows tokenised, and a note where some were truncated."""
    if not rows:  # tokenizers do not take none
        return [], []
    tokenized = tokenize(rows, dataset, loaded.tokenizer, loaded.max_length, labels)
    return tokenized.examples, _truncation(tokenized.truncated, len(rows), dataset, loaded.max_length)


def _examples_of(
    plan: MergePlan, merged: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], examples: list[Example]
) -> tuple[list[Example], list[str]]:
    """An expert's examples as the merged model reads them, the same unless vocabularies differ; and notes."""
    return (examples, []) if plan.vocabulary is None else _examples(merged, dataset, rows, None)


def _vocabulary_notes(plan: MergePlan) -> list[str]:
    vocabulary = plan.vocabulary
    if vocabulary is None:
        return []
    more = f" and {len(vocabulary.new)} further tokens" if vocabulary.new else ""
    return [f"the merged models have the tokenizer of {vocabulary.owner.source}{more}, {vocabulary.rows} rows in all"]


def _truncation(truncated: int, rows: int, dataset: DatasetSpec, max_length: int) -> list[str]:
    if not truncated:
        return []
    limit = min(max_length, dataset.max_length or max_length)
    return [f"{truncated} of {rows} rows of {dataset.source} are longer than {limit} tokens and were truncated"]


def _truncations(run: ModelRun) -> list[str]:
    """Of the rows that were measured in this job, or else of those that the head is aligned on."""
    measured = run.sample
    found = [] if measured is None else _truncation(*measured.truncated, measured.spec, measured.max_length)
    return found or run.truncated


def _check_unchanged(states: Sequence[tuple[CheckpointInfo, str]]) -> None:
    for info, state in states:
        if checkpoint_state(info) != state:
            raise InvalidCheckpoint(info.source, "its files were changed while the job ran; post it again")


def _model_result(run: ModelRun, weight_share: float | None, weight_error: float | None) -> ModelResult:
    return ModelResult(
        **_measured_fields(run),
        aligned_examples=len(run.alignment),
        weight_share=weight_share,
        weight_error=weight_error,
        parameters=run.spec.parameters,
    )


def _scored_model(run: ModelRun, stopping: Stopping | None) -> ScoredModel:
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


def _as_run(spec: JobSpec, precision: Precision, runs: Sequence[ModelRun]) -> dict[str, Any]:
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
