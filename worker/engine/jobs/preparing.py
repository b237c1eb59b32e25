"""The step that reads and tokenises a model's rows before any work is spent, and checks that inputs do not change."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import checkpoint_state
from worker.engine.catalog.contracts.spec import LEAST_ALIGNMENT_ROWS, EvaluationSpec, JobSpec, MergeSpec, ModelSpec
from worker.engine.catalog.data.rows import Row, Rows, Text, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, InvalidStatistics
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.tasks import LabelMap, column_problems, label_map
from worker.engine.checkpoints.layout import check_layout
from worker.engine.checkpoints.reader import file_identity
from worker.engine.inputs.chats import template_notes
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs.context import JobContext
from worker.engine.merging.given_statistics import GivenStatistic, check_information, identities_of
from worker.engine.merging.job_models import JobModel, ModelRows
from worker.engine.models.loading import LoadedModel
from worker.engine.scoring.sample import Sample
from worker.engine.search.splitting import halves
from worker.engine.tasks import HeadKind

HeldOut = Collection[tuple[Text | None, ...]]
"""Contents of the rows on which a model is evaluated. Nothing is fitted to them."""


@dataclass(frozen=True)
class InputStates:
    """The states of the checkpoints when the job began, before they are digested."""

    states: Sequence[tuple[CheckpointInfo, str]]
    weights: Mapping[Path, tuple[int, ...]]
    """What `file_identity` was of each weight file."""

    @classmethod
    def of(cls, checkpoints: Sequence[CheckpointInfo]) -> "InputStates":
        infos = [*checkpoints, *(info.base for info in checkpoints if info.base is not None)]
        paths = [info.path / name for info in infos for name in info.weight_files]
        weights = {path: file_identity(path.stat()) for path in paths}
        return cls([(info, checkpoint_state(info)) for info in checkpoints], weights)

    def are_untouched(self) -> bool:
        """Return whether no weight file can have been written to since, whatever times it was given afterwards.

        A file that was merely linked or had its mode changed counts as touched.
        """
        return all(file_identity(path.stat()) == identity for path, identity in self.weights.items())

    def check_unchanged(self) -> None:
        """Raise InvalidCheckpoint where a file was changed since."""
        for info, state in self.states:
            if checkpoint_state(info) != state:
                raise InvalidCheckpoint(info.source, "its files were changed while the job ran; post it again")


def prepare(spec: MergeSpec, model: JobModel, inputs: Inputs, context: JobContext) -> JobModel:
    """Check a model's weights and read its rows, so that their faults are found before any work is spent."""
    asked = model.spec
    wants_rows, evaluates = any(spec.rows_wanted(asked)), spec.evaluate and asked.evaluation is not None
    held_out: HeldOut = set()
    if not wants_rows and not evaluates:
        check_layout(model.info)
    if evaluates:
        model, held_out = with_evaluation(spec, model, inputs, context)
    if wants_rows:
        return with_dataset(spec, model, inputs, context, held_out)
    if spec.output.align_heads:
        context.note(f"the head of {model.name} was kept as it was: no dataset names rows to align it on")
    return model


def given_statistics(
    plan: MergePlan, index: int, model: ModelSpec, inputs: Inputs, context: JobContext
) -> dict[str, GivenStatistic]:
    """Open the statistics of the model `index` that come from files, and check every value.

    Raises:
        InvalidStatistics: a file is not of the model, or its values are no statistic; the detail names the field.
    """
    given = {}
    for name, spec in model.statistics.items() if model.takes_part else ():
        try:
            tensors = inputs.statistics(plan, index, spec)
            identities = identities_of(tensors)
            digest = context.lasting.digests.of_files({t.path for t in tensors.values()}, torch.get_num_threads())
            given[name] = GivenStatistic(spec.source, digest, tensors, context.reader, identities)
            check_information(given[name])
        except InvalidStatistics as error:
            error.detail["field"] = f"models.{index}.statistics.{name}"
            raise
    return given


def with_evaluation(spec: MergeSpec, model: JobModel, inputs: Inputs, context: JobContext) -> tuple[JobModel, HeldOut]:
    """Add the rows on which the result is judged and those on which `auto` searches; return their texts too."""
    evaluation, loaded = model.evaluation, context.models.get(model.info)
    _check_columns(evaluation, loaded, needs_labels=True, metric=evaluation.metric)
    context.note(*template_notes(loaded.tokenizer, evaluation, model.spec.source))
    rows = inputs.rows(evaluation, loaded.task.reader(evaluation.metric))
    labels = _label_map(loaded, evaluation, rows, context)
    read = sample(rows, evaluation, None)
    examples, truncated = examples_from(loaded, evaluation, read, labels, loaded.kind.evaluated(evaluation))
    context.note(*rows.notes, *_doubtful_ids(labels, evaluation, read), *_whose_f1(labels, evaluation), *truncated)
    searched: list[int] = []
    judged = list(range(len(read)))
    if spec.method.search is not None:
        searched, judged = halves(read, spec.method.search.seed, evaluation.source)
    found = ModelRows(
        searched=[examples[place] for place in searched],
        evaluation=[examples[place] for place in judged],
        evaluation_texts=[read[place] for place in judged] if spec.output.vocabulary != "error" else [],
    )
    return replace(model, rows=found), {row.content for row in read}


def with_dataset(
    spec: JobSpec, model: JobModel, inputs: Inputs, context: JobContext, held_out: HeldOut = frozenset()
) -> JobModel:
    """Add the rows of the model's data set: to measure, to fit layers to, and to align its head on.

    Args:
        held_out: contents of the rows that the model is evaluated on.

    Raises:
        InvalidDataset: a column is missing or does not suit the head, or the method has no row left to fit layers to.
    """
    method, dataset, loaded = spec.method, model.dataset, context.models.get(model.info)
    measured, aligned_on = spec.rows_wanted(model.spec)
    reads_labels = bool(measured) and method.reads_labels(model.given)
    _check_columns(dataset, loaded, needs_labels=reads_labels)
    context.note(*template_notes(loaded.tokenizer, dataset, model.spec.source))
    rows = inputs.rows(dataset, loaded.task.rows)
    needed = _label_map(loaded, dataset, rows, context) if reads_labels else None
    refitted_on = measured if method.refits_layers else 0
    fitted_on = max(aligned_on, refitted_on)
    read, unseen = _read(rows, dataset, measured, fitted_on, held_out, shuffle=method.batch_rows is None)
    context.note(*rows.notes)
    to_measure = None
    if measured:
        population = min(len(rows), dataset.limit or len(rows))
        to_measure = Sample(read[:measured], population, dataset, loaded, needed)
        context.note(*_doubtful_ids(needed, dataset, read[:measured]))
    looked_at = unseen[-1] + 1 if len(unseen) == fitted_on and unseen else len(read)
    if fitted_on and looked_at > len(unseen):
        context.note(
            f"{looked_at - len(unseen)} rows of {dataset.source} are rows that {model.name} is evaluated on; "
            "nothing was fitted to them"
        )
    texts = [read[place] for place in unseen]
    fitted, truncated = examples_from(loaded, dataset, texts, None)
    if not unseen and measured and method.refits_layers:
        problem = f"every row is one that {model.name} is evaluated on; method {method.name} needs others"
        raise InvalidDataset(dataset.source, problem)
    distinct = len({row.content for row in texts[:aligned_on]})
    if distinct < min(aligned_on, LEAST_ALIGNMENT_ROWS):
        aligned_on = 0
        context.note(
            f"the head of {model.name} was kept as it was: {dataset.source} has {distinct} rows that it is not "
            f"evaluated on, and {LEAST_ALIGNMENT_ROWS} are needed to align it"
        )
    found = replace(
        model.rows,
        sample=to_measure,
        fitted=fitted[:refitted_on],
        alignment=fitted[:aligned_on],
        alignment_texts=texts[:aligned_on],
        truncated=truncated,
    )
    return replace(model, rows=found)


def longest_row(model: JobModel) -> int:
    """Return the number of tokens of the model's longest row, as far as it is known."""
    rows = model.rows
    lengths = [example.length for example in (*rows.fitted, *rows.alignment, *rows.searched, *rows.evaluation)]
    return max([*lengths, rows.sample.longest() if rows.sample else 1])


def outputs_searched(model: JobModel) -> int:
    """Return the number of outputs of the rows on which a search runs the model, aligns its head and judges it."""
    rows = model.rows
    return sum(example.outputs for example in (*rows.searched, *rows.alignment, *rows.evaluation))


def padded_tokens(model: JobModel) -> int:
    """Return the number of tokens, with padding, in the batches of rows that layers are fitted to."""
    return sum(len(batch) * batch[-1].length for batch in plan_batches(model.rows.fitted)) if model.takes_part else 0


def _read(
    rows: Rows,
    dataset: DatasetSpec,
    measured: int,
    fitted_on: int,
    held_out: HeldOut,
    *,
    shuffle: bool,
) -> tuple[list[Row], list[int]]:
    """Read rows to measure, and find the rows to fit to, which are not held out: more are read to have enough.

    Returns the rows, those to measure first, and the places of the rows to fit to.
    """
    wanted = max(measured, fitted_on)
    while True:
        read = sample(rows, dataset, wanted, shuffle=shuffle)
        unseen = [place for place, row in enumerate(read) if row.content not in held_out][:fitted_on]
        if len(unseen) == fitted_on or len(read) < wanted:
            return read, unseen
        wanted += max(measured, fitted_on)


def _check_columns(rows: DatasetSpec, loaded: LoadedModel, needs_labels: bool, metric: str | None = None) -> None:
    for column, problem in column_problems(rows, loaded.task, needs_labels, metric):
        raise InvalidDataset(rows.source, f"{column}: {problem}", column=column)


def _label_map(loaded: LoadedModel, dataset: DatasetSpec, rows: Rows, context: JobContext) -> LabelMap | None:
    """Match the rows' labels to the head's; whatever is not plain is noted. None if no column of them is read."""
    if loaded.task.rows.label_column(dataset) is None:
        return None
    labels, found = label_map(loaded.task, dataset.source, dataset.label_names, rows.label_names, loaded.info.source)
    context.note(*found)
    return labels


def _whose_f1(labels: LabelMap | None, evaluation: EvaluationSpec) -> list[str]:
    """Return a doubt if F1 of two labels is that of another label than the data set's authors would take."""
    order = None if labels is None else labels.permutation
    if labels is None or evaluation.metric != "f1" or not labels.task.f1_is_of_one or not order:
        return []
    name = next((name for name, index in labels.task.label_ids.items() if index == 1), "1")
    return [
        Doubt(f"f1 of {evaluation.source} is of the checkpoint's label 1, {name}, which is not the data set's label 1")
    ]


def _doubtful_ids(labels: LabelMap | None, dataset: DatasetSpec, rows: Sequence[Row]) -> list[str]:
    """Return a doubt if ids that were taken as they are may be one too high, or were truth values."""
    if labels is None:
        return []
    if labels.reads_truth_as_ids(row.label for row in rows):
        names = {index: name for name, index in labels.task.label_ids.items()}
        told = f"true was taken as the label 1, {names.get(1)}, and false as the label 0, {names.get(0)}"
        return [Doubt(f"the labels of {dataset.source} are true and false, and the checkpoint has other names: {told}")]
    if not labels.begins_at_one(row.label for row in rows):
        return []
    last = labels.task.outputs - 1
    return [
        Doubt(
            f"of the labels 0 to {last} no row of {dataset.source} has 0, and each other occurs: do its ids begin at 1?"
        )
    ]


def examples_from(
    loaded: LoadedModel,
    dataset: DatasetSpec,
    rows: Sequence[Row],
    labels: LabelMap | None,
    kind: HeadKind[Any] | None = None,
) -> tuple[list[Example], list[str]]:
    """Tokenise the rows as `kind` reads them, the model's own by default, and note if some were truncated."""
    if not rows:  # tokenizers refuse to cut no rows
        return [], []
    kind = kind or loaded.kind
    tokenized = kind.tokenized(rows, dataset, loaded.tokenizer, loaded.max_length, labels)
    return tokenized.examples, truncation(tokenized.truncated, len(rows), dataset, loaded.max_length)


def examples_of(
    plan: MergePlan, merged: LoadedModel, dataset: DatasetSpec, rows: Sequence[Row], examples: Sequence[Example]
) -> tuple[Sequence[Example], list[str]]:
    """Return an expert's examples as the merged model reads them, and notes. They differ only if vocabularies do.

    Raises:
        InvalidDataset: the merge's tokenizer leaves a row another number of outputs.
    """
    if plan.vocabulary is None:
        return examples, []
    kind = merged.kind.evaluated(dataset) if isinstance(dataset, EvaluationSpec) else merged.kind
    found, notes = examples_from(merged, dataset, rows, None, kind)
    if merged.family.head.merges:  # rows are judged whole, however they are cut into tokens
        return found, [*notes, *_otherwise_cut(found, examples, dataset)]
    if [one.outputs for one in found] != [one.outputs for one in examples]:
        problem = "the merge's tokenizer cuts rows where the model's own does not; set a smaller max_length"
        raise InvalidDataset(dataset.source, problem)
    return found, notes


def _otherwise_cut(found: Sequence[Example], examples: Sequence[Example], dataset: DatasetSpec) -> list[str]:
    """Return a doubt if the merge's tokenizer cuts rows into other tokens than the model's own."""
    differing = sum(one.encoding != other.encoding for one, other in zip(found, examples, strict=True))
    if not differing:
        return []
    said = f"{differing} of {len(examples)} rows of {dataset.source} are other tokens in the merge's vocabulary"
    return [Doubt(f"{said}: metrics per token of expert and merge are of different tokens")]


def truncation(truncated: int, rows: int, dataset: DatasetSpec, max_length: int) -> list[str]:
    """Note if some of the rows were truncated."""
    if not truncated:
        return []
    limit = min(max_length, dataset.max_length or max_length)
    return [f"{truncated} of {rows} rows of {dataset.source} are longer than {limit} tokens and were truncated"]
