"""A job's models with their rows, read and tokenised before any work is spent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from worker.engine.catalog.checkpoints.headers import CheckpointInfo
from worker.engine.catalog.contracts.spec import (
    LEAST_ALIGNMENT_ROWS,
    DatasetSpec,
    EvaluationSpec,
    JobSpec,
    MergeSpec,
    ModelSpec,
)
from worker.engine.catalog.data.labels import LabelMap, label_map
from worker.engine.catalog.data.rows import Row, Rows, sample
from worker.engine.catalog.methods import MethodParameters, Statistic
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.checkpoints.layout import check_layout
from worker.engine.inputs.examples import Example, plan_batches, tokenize
from worker.engine.inputs.fetching import Inputs
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.stopping import Scored
from worker.engine.models.loading import LoadedModel, ModelCache
from worker.engine.scoring.measure import Measured
from worker.engine.scoring.sample import Sample
from worker.engine.search.splitting import halves


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


def prepare(
    spec: JobSpec,
    model: ModelSpec,
    info: CheckpointInfo,
    digest: str,
    inputs: Inputs,
    models: ModelCache,
    notes: list[str],
) -> ModelRun:
    """Check a model's weights and read its rows: whatever is wrong with them is found before any work is spent."""
    run = ModelRun(model, info, digest)
    evaluates = isinstance(spec, MergeSpec) and spec.evaluate and model.evaluation is not None
    if not evaluates and not any(spec.rows_wanted(model)):
        check_layout(info)
        if isinstance(spec, MergeSpec) and spec.output.align_heads:
            notes.append(f"the head of {model.name} was kept as it was: no dataset names rows to align it on")
        return run
    loaded = models.get(info)
    held_out: set[tuple[str, str | None]] = set()
    if isinstance(spec, MergeSpec) and spec.evaluate and model.evaluation is not None:
        rows = inputs.rows(model.evaluation)
        labels = _label_map(loaded, model.evaluation, rows, notes)
        read = sample(rows, model.evaluation, None)
        run.evaluation, truncated = examples_from(loaded, model.evaluation, read, labels)
        notes += [*rows.notes, *_from_one(labels, model.evaluation, read), *_whose_f1(labels, model.evaluation)]
        if spec.output.vocabulary != "error":
            run.evaluation_rows = read
        notes += truncated
        held_out = {(row.text, row.text_pair) for row in read}
        if spec.method.search is not None:
            searched, judged = halves(read, spec.method.search.seed, model.evaluation.source)
            examples = run.evaluation
            run.searched, run.evaluation = [examples[i] for i in searched], [examples[i] for i in judged]
    method, dataset = spec.method, model.dataset
    measured, aligned_on = spec.rows_wanted(model)
    if measured or aligned_on:
        dataset = required_dataset(model)
        rows = inputs.rows(dataset)
        needed = _label_map(loaded, dataset, rows, notes) if measured and method.needs_labels else None
        fitted_on = max(aligned_on, measured if method.refits_layers else 0)
        read, unseen = _read(rows, dataset, measured, fitted_on, held_out, shuffle=method.batch_rows is None)
        notes += rows.notes
        if measured:
            population = min(len(rows), dataset.limit or len(rows))
            run.sample = Sample(read[:measured], population, dataset, loaded, needed)
            notes += [] if needed is None else _from_one(needed, dataset, read[:measured])
        looked_at = unseen[-1] + 1 if len(unseen) == fitted_on and unseen else len(read)
        if fitted_on and looked_at > len(unseen):
            notes.append(
                f"{looked_at - len(unseen)} rows of {dataset.source} are rows that {model.name} is evaluated on; "
                "nothing was fitted to them"
            )
        run.unseen, run.truncated = examples_from(loaded, dataset, [read[place] for place in unseen], None)
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


def measured_by(method: MethodParameters, spec: JobSpec, run: ModelRun) -> ModelRun:
    """The model as one of the job's methods sees it: with the rows that this one measures and fits to."""
    rows = method.most_examples
    _, aligned_on = spec.rows_wanted(run.spec)
    return replace(
        run,
        sample=run.sample.first(rows) if run.sample and rows else None,
        unseen=run.unseen[: max(aligned_on, rows)],
        measured=Measured(),
    )


def longest_row(run: ModelRun) -> int:
    """Tokens of the model's longest row, as far as they are known."""
    lengths = [example.length for example in (*run.unseen, *run.searched, *run.evaluation)]
    return max([*lengths, run.sample.longest() if run.sample else 1])


def padded_tokens(run: ModelRun) -> int:
    """Of the batches of the rows that layers are fitted to."""
    return sum(len(batch) * batch[-1].length for batch in plan_batches(run.unseen)) if run.takes_part else 0


def required_dataset(model: ModelSpec) -> DatasetSpec:
    if model.dataset is None:
        raise InvalidDataset(model.name, "no data set; the method needs one for every model")
    return model.dataset


def required_evaluation(model: ModelSpec) -> EvaluationSpec:
    if model.evaluation is None:
        raise InvalidDataset(model.name, "no evaluation; method auto needs one for every model")
    return model.evaluation


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
    labels, found = label_map(loaded.task, dataset.source, dataset.label_names, rows.label_names, loaded.info.source)
    notes += found
    return labels


def _whose_f1(labels: LabelMap, evaluation: EvaluationSpec) -> list[str]:
    """A doubt if F1 of two labels is that of another label than the data set's authors would take."""
    order = labels.permutation
    if evaluation.metric != "f1" or labels.task.problem != "classification" or labels.task.outputs > 2 or not order:
        return []
    name = next((name for name, index in labels.task.label_ids.items() if index == 1), "1")
    return [
        Doubt(f"f1 of {evaluation.source} is of the checkpoint's label 1, {name}, which is not the data set's label 1")
    ]


def _from_one(labels: LabelMap, dataset: DatasetSpec, rows: Sequence[Row]) -> list[str]:
    """A doubt if ids that were taken as they are may be one too high."""
    if not labels.begins_at_one(row.label for row in rows):
        return []
    last = labels.task.outputs - 1
    return [
        Doubt(
            f"of the labels 0 to {last} no row of {dataset.source} has 0, and each other occurs: do its ids begin at 1?"
        )
    ]


def examples_from(
    loaded: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], labels: LabelMap | None
) -> tuple[list[Example], list[str]]:
    """The rows tokenised, and a note where some were truncated."""
    if not rows:  # tokenizers do not take none
        return [], []
    tokenized = tokenize(rows, dataset, loaded.tokenizer, loaded.max_length, labels)
    return tokenized.examples, _truncation(tokenized.truncated, len(rows), dataset, loaded.max_length)


def examples_of(
    plan: MergePlan, merged: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], examples: list[Example]
) -> tuple[list[Example], list[str]]:
    """An expert's examples as the merged model reads them, the same unless vocabularies differ; and notes."""
    return (examples, []) if plan.vocabulary is None else examples_from(merged, dataset, rows, None)


def _truncation(truncated: int, rows: int, dataset: DatasetSpec, max_length: int) -> list[str]:
    if not truncated:
        return []
    limit = min(max_length, dataset.max_length or max_length)
    return [f"{truncated} of {rows} rows of {dataset.source} are longer than {limit} tokens and were truncated"]


def truncations(run: ModelRun) -> list[str]:
    """Of the rows that were measured in this job, or else of those that the head is aligned on."""
    measured = run.sample
    found = [] if measured is None else _truncation(*measured.truncated, measured.spec, measured.max_length)
    return found or run.truncated
