"""Makes HTML and SVG. Whatever is not markup yet is escaped, so that no name or note can become markup."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


Content = str | Html | Iterable["Content"] | None
"""Text, markup, or several of both; None is nothing."""


def element(tag: str, *content: Content, **attributes: str | float | bool | None) -> Html:
    """Make an element. In names of attributes, a last `_` is dropped and others become `-`; None and False drop one."""
    given = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag == "meta":  # the only element here that HTML does not close
        return Html(f"<meta{given}>")
    return Html(f"<{tag}{given}>{markup(content)}</{tag}>" if content else f"<{tag}{given}></{tag}>")


def markup(content: Content) -> Html:
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(content))
    return Html("".join(map(markup, content)))


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.removesuffix("_").replace("_", "-")
    return (
        f" {name}" if value is True else f' {name}="{escape(shorter(value) if not isinstance(value, str) else value)}"'
    )


def shorter(value: float) -> str:
    """Format a coordinate to a hundredth of a pixel, because nobody sees more."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


Cell = str | Html


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, *, numeric: Sequence[int] = ()) -> Html:
    """Make a table in a box that scrolls by itself; the first column names the rows.

    Args:
        numeric: indices of the columns of numbers, which are aligned to the right.
    """

    def align(index: int) -> str | None:
        return "n" if index in numeric else None

    head = [element("th", column, scope="col", class_=align(index)) for index, column in enumerate(columns)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", cell, class_=align(index)) for index, cell in enumerate(row[1:], 1)],
        )
        for row in rows
    ]
    found = element("table", element("caption", caption), element("thead", element("tr", head)), element("tbody", body))
    return element("div", found, class_="scroll", role="region", aria_label=caption, tabindex=0)


def details(summary: str, *content: Content) -> Html:
    return element("details", element("summary", summary), *content)
