"""Matches the labels of a data set to those of a head."""

from collections.abc import Iterator, Sequence

from worker.engine.catalog.data.spec import Columns, Generation
from worker.engine.catalog.primitives.errors import InvalidDataset, InvalidRequest
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.strict import MOST_NAMES
from worker.engine.catalog.tasks.names import SHOWN_NAME, are_bare
from worker.engine.catalog.tasks.task import LabelMap, Task


def check_metric(metric: str, task: Task, source: str) -> None:
    """Raise InvalidDataset when the metric is not one of the head's task, or cannot be computed."""
    if metric not in task.metrics:
        raise InvalidDataset(source, f"metric {metric} is not one of {task.name}: {', '.join(task.metrics)}")
    problem = task.metric_problem(metric)
    if problem is not None:
        raise InvalidDataset(source, problem)


COLUMNS = (
    "text", "text_pair", "label", "target", "choices", "messages", "tokens", "question", "context", "answers", "image",
)  # fmt: skip
"""Settings of columns, each of which only some heads read."""


def column_problems(
    rows: Columns, task: Task, needs_labels: bool = False, metric: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the columns that are not read and that are named, or that are needed and are not, with what to do.

    Args:
        metric: the metric that is computed; None: rows are measured or aligned on.
    """
    reader = task.reader(metric)
    names_labels = reader is task.rows and reader.label == "label" and "choices" not in reader.settings
    read = (*reader.columns(rows), *(["label_names"] if names_labels else ()))
    for name in (*COLUMNS, "label_names"):
        if name not in read and getattr(rows, name) is not None:
            who = f"metric {metric}" if metric in task.of_metrics else f"a {task.title}"
            yield name, f"{who} does not read it; leave it out"
    if task.reads_images and rows.max_length is not None:
        yield "max_length", "images are not cut; leave it out"
    if not task.reads_windows and rows.doc_stride is not None:
        yield "doc_stride", f"a {task.title} reads no windows; leave it out"
    for name in Generation.model_fields:
        if metric not in task.writing_metrics and getattr(rows, name, None) is not None:
            yield name, f"metric {metric} does not judge what a model writes; leave it out"
    if needs_labels and reader.label is not None and reader.label_column(rows) is None:
        who = "the estimator" if metric is None else f"metric {metric}"
        yield reader.label, f"{who} reads labels; name their column"
    for name in task.labels_need if needs_labels and metric is None else ():
        if getattr(rows, name) is None:
            yield name, "the estimator reads labels, which are those of two texts; name the column, or choose another"


def check_estimator(name: str, task: Task) -> None:
    """Raise InvalidRequest when an estimator cannot be computed for the head."""
    if name not in task.estimators:
        known = ", ".join(sorted(task.estimators))
        problem = f"estimator {name} cannot be computed for a {task.title}; available are {known}"
        raise InvalidRequest(problem, field="method.estimator")


def label_map(
    task: Task, source: str, asked: Sequence[str] | None, own: Sequence[str] | None = None, checkpoint: str = ""
) -> tuple[LabelMap, list[str]]:
    """Return the map from a data set's labels to the head's, with notes for the reader.

    Args:
        asked: names of the data set's ids in the request.
        own: names of its ids in the data set itself.
        checkpoint: name of the checkpoint in notes.

    Raises:
        InvalidDataset: names are given, but it is not certain which labels of the checkpoint they are.
    """
    own = None if own is None or are_bare((name, index) for index, name in enumerate(own)) else own
    if asked:
        labels = LabelMap(task, tuple(asked))
        labels.check_names(source)
        return labels, [*_otherwise_named(labels, source, own or ()), *_reordered(labels, checkpoint, source)]
    labels = LabelMap(task)
    if own is None:
        return labels, []
    shown = ", ".join(name[:SHOWN_NAME] for name in own[:MOST_NAMES])
    if not task.has_classes:
        return labels, [
            Doubt(f"the labels of {source} are classes ({shown}); their ids were taken as numbers, for {checkpoint}")
        ]
    if not task.contradiction and all(task.id_of(name) is None for name in own):
        if task.has_no_names:
            return labels, [
                Doubt(
                    f"{source} calls its labels {shown}; {checkpoint} has no names for its own, so it is not certain "
                    "that they are in the same order: ids were taken as they are; label_names can say their order"
                )
            ]
        theirs = ", ".join(sorted(task.label_ids, key=lambda name: task.label_ids[name])[:MOST_NAMES])
        problem = f"it calls its labels {shown}, and none of them is one of {checkpoint}'s, {theirs}"
        raise InvalidDataset(source, f"{problem}; say with label_names which of these its ids 0, 1, … are")
    labels = LabelMap(task, tuple(own))
    LabelMap(task, tuple(name for name in own if task.contradiction or task.id_of(name) is not None)).check_names(
        source
    )
    return labels, _reordered(labels, checkpoint, source)


def _otherwise_named(labels: LabelMap, source: str, own: Sequence[str]) -> list[str]:
    """Return a doubt if the request's names and the data set's are different labels of the checkpoint."""
    for index, (name, other) in enumerate(zip(labels.names or (), own, strict=False)):
        if labels.task.id_of(other) not in (None, labels.task.id_of(name)):
            said = f"'{name[:SHOWN_NAME]}', and the data set itself '{other[:SHOWN_NAME]}'"
            return [Doubt(f"label_names calls the label {index} of {source} {said}; label_names was followed")]
    return []


def _reordered(labels: LabelMap, checkpoint: str, source: str) -> list[str]:
    ids = labels.permutation
    if ids is None:
        return []
    order = ", ".join("none" if index is None else str(index) for index in ids)
    return [
        f"the labels of {source} are in another order than those of {checkpoint}: its ids 0 to {len(ids) - 1} are the "
        f"checkpoint's {order}"
    ]
