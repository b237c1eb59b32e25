"""Checks that chat templates are Jinja, in the dialect that transformers reads.

A template is parsed, never run: nobody knows how long that would take. In the API, only inspectors import this module,
because Jinja takes a while to load.
"""

from functools import lru_cache

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.publishing import chat_templates
from worker.engine.catalog.primitives.errors import InvalidRequest
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.paths import in_one_line


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


@lru_cache(maxsize=64)  # asked for every row
def raises_to_powers(template: str) -> bool:
    """Return whether a template has a power, which could take any time, and lets no other thread run meanwhile."""
    return problem_of(template) is None and next(_parsed(template).find_all(nodes.Pow), None) is not None


def _parsed(template: str) -> nodes.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    return environment.parse(template)
