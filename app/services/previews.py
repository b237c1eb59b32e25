"""Shows the first rows of data sets to who writes a recipe, and guesses the columns that a head reads of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from app.contracts.references import ReferenceError
from app.storage.sources import Sources
from app.storage.sources.source import SourceUnavailable
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.data.rows import PARQUET, ROWS_OF_TEXT, RowReader, first_rows
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.catalog.tasks import task_of

ROWS = 3
LONGEST_CELL = 80  # characters of a value that are shown
MOST_COLUMNS = 40
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": ("sentence", "sentence1", "content", "review", "premise", "question1", "query", "prompt", "document"),
    "text_pair": ("sentence2", "hypothesis", "question2", "passage", "positive"),
    "label": ("labels", "target", "class", "category", "score", "ner_tags", "tags", "answer"),
    "target": ("completion", "summary", "response", "answer", "output"),
    "messages": ("conversations",),
    "choices": ("endings", "options"),
    "tokens": ("words",),
    "context": ("passage", "paragraph"),
    "image": ("img", "file_name", "path"),
}
"""Names that data sets often give to the columns of a setting, the likeliest first."""


class RowsAsked(BaseModel):
    """A data set, and the checkpoint whose head is to read it; each is a reference."""

    field: str
    """Field of the recipe, for messages."""
    source: str
    checkpoint: str | None = None


class Preview(BaseModel):
    """The first rows of a data set."""

    problem: str | None = None
    """Why they cannot be shown."""
    columns: list[str] = []
    rows: list[list[str]] = []
    """Beginnings of the values of each row, in the order of `columns`."""
    task: str | None = None
    """Kind of the checkpoint's head; None where it is not known."""
    settings: dict[str, str | None] = {}
    """The settings that name a column for such a head, each with the column that is guessed."""


def previewed(asked: Sequence[RowsAsked], sources: Sources, at: Callable[[str], None]) -> list[Preview]:
    """Return the first rows of each data set. What cannot be read says why, and does not stop the others."""
    with Views() as views:
        return [_preview(one, sources, views, at) for one in asked]


def _preview(asked: RowsAsked, sources: Sources, views: Views, at: Callable[[str], None]) -> Preview:
    at(asked.field)
    task, reader = _task(asked.checkpoint, sources, views)

    def unseen(problem: str) -> Preview:
        return Preview(problem=problem, task=task, settings=dict.fromkeys(reader.settings))

    try:
        with sources.inspect_rows(sources.resolve(asked.source, "rows")) as place:
            if place is None:
                return unseen("rows of the hub are read by the worker; name their columns")
            file = views.open_file(place.path, asked.source, place.root)
            spec = DatasetSpec(source=asked.source, path=file, folder=place.path.parent, root=place.root)
            rows = first_rows(spec, ROWS)
    except (EngineError, ReferenceError, SourceUnavailable) as error:
        return unseen(getattr(error, "message", str(error)))
    if not rows:
        is_parquet = file.suffix.lower() == PARQUET
        return unseen("Parquet files are read by the worker; name their columns" if is_parquet else "no rows")
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))[:MOST_COLUMNS]
    return Preview(
        columns=columns,
        rows=[[_shown(row.get(name)) for name in columns] for row in rows],
        task=task,
        settings=guessed(reader, columns, rows[0]),
    )


def _task(checkpoint: str | None, sources: Sources, views: Views) -> tuple[str | None, RowReader]:
    """Return the task of a checkpoint's head and its reader; that of plain texts where it cannot be told."""
    if checkpoint is None:
        return None, ROWS_OF_TEXT
    try:
        reference = sources.resolve(checkpoint, "checkpoint")
        with sources.inspect(reference) as place:
            task = task_of(inspect_checkpoint(views.open(place.path, str(reference), place.root), str(reference)))
    except (EngineError, ReferenceError, SourceUnavailable):  # the plan says what is wrong with it
        return None, ROWS_OF_TEXT
    return task.title, task.rows


def guessed(reader: RowReader, columns: Sequence[str], row: Mapping[str, Any]) -> dict[str, str | None]:
    """Guess which column each setting of a reader names, by names, and for texts by the first row's values."""
    found: dict[str, str | None] = {}
    left = list(columns)

    def take(setting: str, column: str | None) -> None:
        found[setting] = column
        if column is not None:
            left.remove(column)

    for setting in reader.settings:
        names = (setting, *OTHER_NAMES.get(setting, ()))
        by_name = {column.lower(): column for column in reversed(left)}
        take(setting, next((by_name[name] for name in names if name in by_name), None))
    if "text" in reader.required and found["text"] is None and found.get("messages") is None:
        take("text", next((column for column in left if isinstance(row.get(column), str)), None))
    return found


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=lambda _: "(bytes)")
    text = text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"
    return text.encode(errors="replace").decode()
