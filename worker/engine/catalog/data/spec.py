"""Specifications of data sets: where rows are, and which of their columns are read."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from worker.engine.catalog.primitives.answers import AnswerPattern
from worker.engine.catalog.primitives.strict import Strict

Name = Annotated[str, Field(min_length=1, max_length=1000)]


StopText = Annotated[str, Field(min_length=1, max_length=100)]
NEW_TOKENS = 256
"""Largest number of tokens of an answer by default, as in lm-evaluation-harness."""
MOST_NEW_TOKENS = 8192


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("two labels have the same name")
    return names


class Columns(Strict):
    """The columns of a data set that are read, and the choice of its rows."""

    text: Name | None = None
    """Column of the text; default: `text`, and none for heads whose rows are other columns."""
    text_pair: Name | None = None
    """Column of the second text of a pair; null: rows are single texts."""
    label: Name | None = None
    """Column of the labels; absent for unlabelled text."""
    target: Name | None = None
    """Column of the text that follows on `text`, such as the completion of a prompt; it alone is predicted then."""
    messages: Name | None = None
    """Column of conversations, lists of messages with `role` and `content`, which is read instead of `text`; what the
    assistant says is predicted."""
    choices: Name | None = None
    """Column of lists of texts that may follow on `text`, of which the row's label, a number or a text, is one."""
    tokens: Name | None = None
    """Column of the list of a row's words, for token classification; default: `tokens`."""
    question: Name | None = None
    """Column of the question, for extractive question answering; default: `question`."""
    context: Name | None = None
    """Column of the text that the answer is in; default: `context`."""
    answers: Name | None = None
    """Column of the answers, each with the place of its first character; default in an evaluation: `answers`."""
    image: Name | None = None
    """Column of a row's image, for image classification: bytes, or a path from the data set's folder; default:
    `image`."""
    label_names: Annotated[list[str], AfterValidator(_unique)] | None = None
    """The data set's names of its label ids 0, 1, …; they are matched by name to the checkpoint's labels."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Number of rows to use; null for all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed from which the rows and their order are drawn."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Largest number of tokens of a row, or of a window of one; longer rows are truncated, read in windows, or refused
    where a part to predict would be cut. Default: the model's limit."""
    doc_stride: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens that neighbouring windows of a context share, for extractive question answering; default: 128,
    or half of what a window has of the context where that is less."""


class Generation(Strict):
    """Settings of metrics that judge what a model writes."""

    stop: Annotated[list[StopText], Field(min_length=1, max_length=16)] | None = None
    """Texts at the first of which an answer ends, without it. An end token of the model ends it too."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] | None = None
    """Largest number of tokens of an answer; default: 256."""
    answer: AnswerPattern | None = None
    """Pattern in RE2's syntax whose first match is the answer, or its first group's; default: all that is written. A
    target in which it matches is read by it too."""


class HubSource(Strict):
    """A repository on the Hugging Face hub, at one commit."""

    repository: str
    commit: str


class DatasetSpec(Columns):
    """Rows of a local file, or of a data set on the hub."""

    source: str
    path: Path | None = None
    root: Path | None = None
    """Folder in which the file, and files that rows name, must lie, after following links; None for any file, and for
    images those beside it."""
    folder: Path | None = None
    """Folder to which paths in rows are relative; None: that of `path`."""
    hub: HubSource | None = None
    config: str | None = None
    split: str | None = None
