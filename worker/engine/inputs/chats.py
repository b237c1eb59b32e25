"""Conversations as texts, by the tokenizer's own template, with the parts that the assistant says.

Templates come from outside. They run in transformers' sandbox, in a process of their own.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from worker.engine.catalog.data.rows import ASSISTANT, Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.templates import NO_TEMPLATE
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.runtime.rendering import NotRendered, render

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks what the assistant says."""
TODAY = "strftime_now"
"""Name of the function by which a template reads the date."""
Message = tuple[str, str]


def template_of(tokenizer: Any, spec: DatasetSpec) -> str:
    """Return the main template. Raises InvalidDataset where there is none."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InvalidDataset(spec.source, NO_TEMPLATE, column=spec.messages) from error
    return template


def template_version(tokenizer: Any, spec: DatasetSpec) -> dict[str, str]:
    """Return what a conversation's text depends on besides its messages: the template, and the day if it reads that."""
    template = template_of(tokenizer, spec)
    told = {"chat template": hashlib.sha256(template.encode()).hexdigest()}
    return {**told, "day": date.today().isoformat()} if TODAY in template else told


def template_notes(tokenizer: Any, spec: DatasetSpec, checkpoint: str) -> list[str]:
    """Return a doubt if the template writes the day into texts."""
    if spec.messages is None or TODAY not in template_of(tokenizer, spec):
        return []
    return [Doubt(f"the chat template of {checkpoint} reads the date: rows of {spec.source} are other texts tomorrow")]


def as_text(row: Row, tokenizer: Any, spec: DatasetSpec) -> Row:
    """Return the row with its conversation as `text`, and what the assistant says as `predicted`.

    Where the template does not mark that (`{% generation %}`), it is what a message of the assistant adds to the
    messages before it, with the template's own beginning of an answer.

    Raises:
        InvalidDataset: the template fails on the row; or it marks nothing, and the text of the first messages does not
            begin that of all.
    """
    messages = row.messages or ()
    template = template_of(tokenizer, spec)
    if MARKED.search(template):
        text, spans = _rendered(messages, row, tokenizer, spec, template, marks=True)
        return replace(row, text=text, predicted=tuple(spans))
    text, _ = _rendered(messages, row, tokenizer, spec, template)
    answers = []
    for number, (role, _) in enumerate(messages):
        if role != ASSISTANT:
            continue
        if not number:
            raise InvalidDataset(spec.source, "its first message is the assistant's, which answers nothing", row.place)
        before, _ = _rendered(messages[:number], row, tokenizer, spec, template, begins=True)
        through, _ = _rendered(messages[: number + 1], row, tokenizer, spec, template)
        if not (through.startswith(before) and text.startswith(through)):
            problem = f"the chat template writes the messages before number {number} otherwise than as a part of all"
            advice = "mark answers in the template with {% generation %}, or split the row"
            raise InvalidDataset(
                spec.source, f"{problem}, so it is not certain what is the answer; {advice}", row.place
            )
        answers.append((len(before), len(through)))
    return replace(row, text=text, predicted=tuple(answers))


def as_prompt(row: Row, tokenizer: Any, spec: DatasetSpec) -> Row:
    """Return the row with all but the last message as `text`, and the last one, the assistant's, as `target`.

    Raises:
        InvalidDataset: the template fails on the row, or the last message is not the assistant's.
    """
    messages = row.messages or ()
    if len(messages) < 2 or messages[-1][0] != ASSISTANT:
        problem = "its last message is not the assistant's answer to others, which is what should be written"
        raise InvalidDataset(spec.source, problem, row.place)
    template = template_of(tokenizer, spec)
    text, _ = _rendered(messages[:-1], row, tokenizer, spec, template, begins=True)
    return replace(row, text=text, target=messages[-1][1])


def _rendered(
    messages: Sequence[Message],
    row: Row,
    tokenizer: Any,
    spec: DatasetSpec,
    template: str,
    *,
    marks: bool = False,
    begins: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and the beginnings and ends of what the template marks in it."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return render(template, conversation, tokenizer.special_tokens_map, marks=marks, begins=begins)
    except NotRendered as error:
        raise InvalidDataset(spec.source, f"the chat template {error}", row.place) from error
