"""Checks that chat templates are there and are Jinja, in the dialect that transformers reads.

A template is parsed, never run: nobody knows how long that would take. In the API, only inspectors import this module,
because Jinja takes a while to load.
"""

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.publishing import chat_templates, main_template
from worker.engine.catalog.primitives.errors import InvalidDataset, InvalidRequest
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.paths import in_one_line

NO_TEMPLATE = "its messages need a chat template, and the checkpoint's tokenizer has none"


class _Generation(Extension):
    """The tag with which templates mark a model's answers; transformers adds it to Jinja's own tags."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_templates(plan: MergePlan, asked: str | None) -> list[str]:
    """Return notes of templates that would be published and are no Jinja.

    Args:
        asked: the request's `output.chat_template`.

    Raises:
        InvalidRequest: the asked template is no Jinja.
    """
    chosen = problem_of(plan.chat_template) if plan.chat_template is not None else None
    if chosen and asked != "auto":
        raise InvalidRequest(
            f"it is no Jinja: {chosen}; mend the template, or leave it out", field="output.chat_template"
        )
    notes = [f"the most common chat template, which is published, is no Jinja: {chosen}"] if chosen else []
    for info in plan.published:
        owner = plan.tokens_of(info)
        reads(owner.source, "chat templates")
        for name, template in chat_templates(owner).items():
            is_replaced = name == "chat template" and plan.chat_template is not None
            if not is_replaced and (problem := problem_of(template)):
                notes.append(f"the {name} of {owner.source} is no Jinja, and is published as it is: {problem}")
    return [Doubt(note) for note in dict.fromkeys(notes)]


def check_conversations(source: str, info: CheckpointInfo) -> None:
    """Raise InvalidDataset where a checkpoint's tokenizer cannot write the conversations of a data set as texts."""
    reads(info.source, "chat templates")
    template = main_template(info)
    if template is None:
        raise InvalidDataset(source, f"{NO_TEMPLATE}, {info.source}")
    problem = problem_of(template)
    if problem is not None:
        raise InvalidDataset(
            source, f"its messages need the chat template of {info.source}, which is no Jinja: {problem}"
        )


def problem_of(template: str) -> str | None:
    """Say what is wrong with a template; None where nothing is."""
    try:
        _parsed(template)
    except RecursionError:
        return "it is nested too deeply"
    except Exception as error:  # Jinja raises errors of its own, and others of Python's that it did not foresee
        line = getattr(error, "lineno", None)
        return in_one_line(error) + (f" (line {line})" if line else "")
    return None


def _parsed(template: str) -> nodes.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    return environment.parse(template)
