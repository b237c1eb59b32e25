"""Makes Markdown. Whatever is not markup yet is escaped, so that no name or note can become markup.

Escapes are numeric character references. CommonMark reads them as text alone (section 2.5), in table cells too, where a
backslash has a meaning of its own.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

SPECIAL = re.compile(
    r"[&<>\\`*\[\]|~$#]"  # HTML, and what begins or ends code, emphasis, links, cells, deletions, formulas or headings
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word, as in names of methods, an underscore is no emphasis
)
BLOCK = re.compile(r"[-+=]|\d{1,9}[.)]")
"""Begins of lines that would make lists or headings; `SPECIAL` has the other ones."""


def escaped(value: Any) -> Markup:
    """Escape a text for any place within a line of Markdown, and put it on one line. Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return Markup(SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text))  # noqa: S704 - nothing special is left in it


def at_start(text: str) -> Markup:
    """Escape a text for the start of a line."""
    line = escaped(text)
    begins = BLOCK.match(line)
    if begins is None:
        return line
    last = begins.end() - 1
    return Markup(f"{line[:last]}&#{ord(line[last])};{line[last + 1 :]}")  # noqa: S704 - parts of what was escaped


def code(text: str) -> Markup:
    """Format a text as code: between backticks, or as an element where a backtick or a `|` would end them or a cell."""
    text = " ".join(text.split())
    if "`" in text or "|" in text:
        return Markup("<code>{}</code>").format(escaped(text))
    return Markup(f"`{text}`")  # noqa: S704 - all but a backtick is text in it


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=escaped,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    auto_reload=False,
)
TEMPLATES.filters.update(at_start=at_start, code=code)


def rendered(template: str, **values: Any) -> str:
    """Fill in a template. Values are escaped unless they are markup."""
    return TEMPLATES.get_template(template).render(values)
