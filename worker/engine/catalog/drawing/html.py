"""Makes HTML and SVG. Whatever is not markup yet is escaped, so that no name or note can become markup.

Pages and tables are templates. Pictures, which are made of numbers, are put together from elements.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def environment(folder: Path) -> Environment:
    """Make an environment of the templates in a folder. It escapes values that are not markup."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        auto_reload=False,
    )


TEMPLATES = environment(Path(__file__).parent / "templates")

Content = str | Markup | Iterable["Content"] | None
"""Text, markup, or several of both; None is nothing."""


def element(tag: str, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """Make an element. In names of attributes, a last `_` is dropped and others become `-`; None and False drop one."""
    given = Markup("").join(_attribute(name, value) for name, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(tag, given, markup(content))


def markup(content: Content) -> Markup:
    if content is None:
        return Markup("")
    if isinstance(content, str):
        return escape(content)
    return Markup("").join(map(markup, content))


def _attribute(name: str, value: str | float | bool | None) -> Markup:
    if value is None or value is False:
        return Markup("")
    name = name.removesuffix("_").replace("_", "-")
    if value is True:
        return Markup(" {}").format(name)
    return Markup(' {}="{}"').format(name, value if isinstance(value, str) else shorter(value))


def shorter(value: float) -> str:
    """Format a coordinate to a hundredth of a pixel, because nobody sees more."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


Cell = str | Markup


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, *, numeric: Sequence[int] = ()
) -> Markup:
    """Make a table in a box that scrolls by itself; the first column names the rows.

    Args:
        numeric: indices of the columns of numbers, which are aligned to the right.
    """
    filled = TEMPLATES.get_template("table.html").render(columns=columns, rows=rows, caption=caption, numeric=numeric)
    return Markup(filled)  # noqa: S704 - the template has escaped what it shows


def details(summary: str, *content: Content) -> Markup:
    return element("details", element("summary", summary), *content)
