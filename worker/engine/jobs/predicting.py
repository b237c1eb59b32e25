"""Answers to single rows by a merge that was published, by one of its experts, and by the plain average.

The three are kept warm for the next rows, as far as there is memory for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.contracts.prediction import Answer, Prediction, PredictionSpec, RowPrediction
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import ASSISTANT, RowReader, row_of
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import AVERAGE
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_job
from worker.engine.catalog.primitives.errors import InvalidDataset, InvalidRequest, Place
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.tasks import TASKS, Task, family_of, task_of
from worker.engine.evaluation.evaluate import answer, head_of
from worker.engine.inputs.examples import Example
from worker.engine.inputs.fetching import Inputs
from worker.engine.jobs.context import JobContext
from worker.engine.jobs.evaluating import average_sources, called
from worker.engine.jobs.memory import require_memory_of_job
from worker.engine.jobs.preparing import InputStates
from worker.engine.merging.backbone import Backbone, averaged
from worker.engine.models.loading import LoadedModel

SOURCE = "rows"
"""Name of the rows in messages, which is that of their field."""
FURTHER = ("text_pair", "messages")
"""Settings of columns, besides those that a head needs, that a row may have if its head reads them."""

ANSWER = "target"
"""Setting of the column of what a model writes after a text."""


def predict(spec: PredictionSpec, context: JobContext) -> Prediction:
    """Answer rows with the expert, the plain average and the merge.

    Raises:
        InvalidRequest: the model's task is none whose answers are told, or the merge is one of slices.
        InvalidDataset: a row does not suit the task, or is longer than a model reads; the message names the row.
        InvalidCheckpoint: an input of the merge is not what it was.
    """
    context = replace(context, precision="float32")  # as transformers computes, whatever the job was measured in
    inputs = Inputs(spec, context.views, context.on_progress)
    base = inputs.checkpoint(spec.base) if spec.base else None
    checkpoints = [inputs.checkpoint(model, base) for model in spec.models]
    names = [model.name for model in spec.models]
    plan = plan_job(spec.method, names, checkpoints, spec.output, base, spec.slices)
    info, merged_info = plan.checkpoints[names.index(spec.model)], inputs.checkpoint(spec.merged)
    states = InputStates.of([*plan.all_checkpoints, merged_info])
    task = _task(info)
    if plan.family is None:
        problem = "a merge of slices has layers of several models, so no expert and no average is beside it"
        raise InvalidRequest(f"{problem}; download it and run it", available=False)
    # Nothing is measured, whatever the job measured.
    needs = spec.model_copy(update={"method": AVERAGE.parameters()})
    require_memory_of_job(plan, needs, context, longest_row=1)
    context.lasting.digests.check_expected(inputs.expected, torch.get_num_threads())
    expert = context.models.get(info)
    evaluation = _evaluation(spec, task)
    require_memory_of_job(
        plan, needs, context, max(example.length for example in _examples(spec, expert, evaluation)) + spec.new_tokens
    )
    with averaged(plan, [model.takes_part for model in spec.models]) as backbone:
        expert = context.models.get(info)
        merged = context.models.get(merged_info)
        models = {
            "expert": expert,
            "average": _average(backbone, plan, expert, merged_info, context),
            "merged": called("the merge", merged),
        }
        rows = context.phase("evaluating", len(models) * len(spec.rows), "examples")
        found = {
            name: answer(model, _examples(spec, model, evaluation), context.precision, rows.advance, evaluation)
            for name, model in models.items()
        }
    states.check_unchanged()
    return Prediction(task=task.name, rows=_side_by_side(found))


def _side_by_side(found: Mapping[str, Sequence[Answer]]) -> list[RowPrediction]:
    by_row = zip(*found.values(), strict=True)
    return [RowPrediction(**dict(zip(found, answers, strict=True))) for answers in by_row]


def _task(info: CheckpointInfo) -> Task:
    """Return the task of a head. Raises InvalidRequest where answers to single rows are not told."""
    task = None if family_of(info) is None else task_of(info)
    if task is None or not task.answers_rows:
        what = f"a {task.title}" if task else f"{info.architecture}, which has no table,"
        known = ", ".join(sorted(kind.name.replace("_", " ") for kind in TASKS if kind.answers_rows))
        problem = f"answers of {what} to single rows are not available; those of {known} are"
        raise InvalidRequest(problem, field="model", available=False)
    return task


def _evaluation(spec: PredictionSpec, task: Task) -> EvaluationSpec:
    """Return an evaluation whose metric has the model run as it answers: a model that writes, writes."""
    for metric in task.writing_metrics:
        return EvaluationSpec(source=SOURCE, metric=metric, max_new_tokens=spec.new_tokens)
    return EvaluationSpec(source=SOURCE, metric=task.metrics[0])


def _average(
    backbone: Backbone, plan: MergePlan, expert: LoadedModel, merged: CheckpointInfo, context: JobContext
) -> LoadedModel:
    """Return the plain average, as evaluations compare the merge with it."""

    def make() -> LoadedModel:
        made = context.models.fresh(merged)
        made.take(average_sources(backbone, context))
        if not expert.family.head.merges:
            head_of(made).load_state_dict(head_of(expert).state_dict())
        return made

    return called("the plain average", context.models.made_of("average", merged, plan.checkpoints, make))


def _examples(spec: PredictionSpec, loaded: LoadedModel, evaluation: EvaluationSpec) -> list[Example]:
    """Read the rows as a model does, each by itself, so that what is wrong with one names it. No row is cut."""
    return [_example(values, number, loaded, evaluation) for number, values in enumerate(spec.rows, start=1)]


def _example(values: str | Mapping[str, Any], number: int, loaded: LoadedModel, evaluation: EvaluationSpec) -> Example:
    place, reader = Place("row", number), loaded.task.rows
    if isinstance(values, str):
        values = {reader.required[0]: values}
    spec = _columns(values, place, reader)
    row = row_of(_with_answer(values, reader), place, spec, reader)
    kind = loaded.kind.evaluated(evaluation)
    found = kind.tokenized([row], spec, loaded.tokenizer, loaded.max_length, None, number - 1)
    [example] = found.examples
    # A tokenizer of Python's own does not say whether it has cut a row.
    longest = loaded.max_length if loaded.tokenizer.is_fast else loaded.max_length - 1
    if found.truncated or example.length > longest:
        problem = f"it has more than the {loaded.max_length} tokens that the model reads; send a shorter one"
        raise InvalidDataset(SOURCE, problem, place)
    if not isinstance(row.text, str) and example.outputs != len(row.text):
        problem = f"{len(row.text) - example.outputs} of its words have no token; leave them out"
        raise InvalidDataset(SOURCE, problem, place)
    return example


def _columns(values: Mapping[str, Any], place: Place, reader: RowReader) -> DatasetSpec:
    """Return which columns a row has. Raises InvalidDataset where the head does not read one of them."""
    further = {name: name for name in FURTHER if name in reader.optional and name in values}
    needed = [name for name in reader.required if name != ANSWER]
    known = [*needed, *(name for name in FURTHER if name in reader.optional)]
    for name in values:
        if name not in known or ("messages" in further and name != "messages"):
            beside = " beside messages" if name in known else ""
            hint = "" if beside else did_you_mean(str(name), known)
            raise InvalidDataset(SOURCE, f"'{str(name)[:40]}' is not read{beside}{hint}", place)
    return DatasetSpec(source=SOURCE, **further)


def _with_answer(values: Mapping[str, Any], reader: RowReader) -> Mapping[str, Any]:
    """Return a row with an empty answer where readers expect one, which is what the model is to write."""
    if ANSWER in reader.required:
        return {**values, ANSWER: ""}
    messages = values.get("messages")
    if not isinstance(messages, list):
        return values
    return {**values, "messages": [*messages, {"role": ASSISTANT, "content": ""}]}
