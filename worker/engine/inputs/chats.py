"""Conversations as texts, by the tokenizer's own template, with the parts that the assistant says.

Templates come from outside. They run in transformers' sandbox, in the engine's process alone.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

from worker.engine.catalog.data.rows import ASSISTANT, Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.planning.templates import raises_to_powers
from worker.engine.catalog.primitives.errors import InvalidDataset, is_of_library
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.runtime.libraries import chat_template_utils
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.runtime.time_limits import within

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks what the assistant says."""
TODAY = "strftime_now"
"""Name of the function by which a template reads the date."""
LONGEST_S = 10  # seconds that a template may take for a row; those in use take a thousandth
LONGEST_TEXT = 10_000_000  # characters that it may write of a row
Message = tuple[str, str]


def template_of(tokenizer: Any, spec: DatasetSpec) -> str:
    """Return the main template.

    Raises:
        InvalidDataset: there is none, or it has a power, which Jinja computes as it compiles and no time limit ends.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        problem = "its messages need a chat template, and the checkpoint's tokenizer has none"
        raise InvalidDataset(spec.source, problem, column=spec.messages) from error
    if raises_to_powers(template):
        problem = "the chat template of the checkpoint's tokenizer raises to a power (**), which can take any time"
        raise InvalidDataset(spec.source, f"{problem}; take that out", column=spec.messages)
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
        text, spans = _rendered(messages, row, tokenizer, spec, template, return_assistant_tokens_mask=True)
        return replace(row, text=text, predicted=tuple(spans))
    text, _ = _rendered(messages, row, tokenizer, spec, template)
    answers = []
    for number, (role, _) in enumerate(messages):
        if role != ASSISTANT:
            continue
        if not number:
            raise InvalidDataset(spec.source, "its first message is the assistant's, which answers nothing", row.place)
        before, _ = _rendered(messages[:number], row, tokenizer, spec, template, add_generation_prompt=True)
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
    text, _ = _rendered(messages[:-1], row, tokenizer, spec, template, add_generation_prompt=True)
    return replace(row, text=text, target=messages[-1][1])


def _rendered(
    messages: Sequence[Message], row: Row, tokenizer: Any, spec: DatasetSpec, template: str, **settings: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and the beginnings and ends of what the template marks in it."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    render = partial(
        chat_template_utils.render_jinja_template,
        [conversation],
        chat_template=template,
        **settings,
        **tokenizer.special_tokens_map,
    )
    try:
        [text], spans = within(LONGEST_S, render)
        marked = spans[0] if settings.get("return_assistant_tokens_mask") else []
    except TimeoutError as error:
        problem = f"the chat template takes more than {LONGEST_S} s for it; use that of the original model"
        raise InvalidDataset(spec.source, problem, row.place) from error
    except BaseException as error:  # templates raise anything, and their messages may quote the row
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        problem = f"the chat template fails on it ({type(error).__name__}); does it take these roles in this order?"
        raise InvalidDataset(spec.source, problem, row.place) from error
    if len(text) > LONGEST_TEXT:
        problem = f"the chat template writes {len(text)} characters of it; {LONGEST_TEXT} are allowed"
        raise InvalidDataset(spec.source, problem, row.place)
    return text, marked
