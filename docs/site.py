"""What MkDocs is told beside mkdocs.yml: pages and sources from outside of docs/, and formulas as MathML."""

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/README.md": "bench.md",
    "examples/README.md": "examples.md",
}
"""Pages of the repository that the site has under other names."""
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and a copy of every source that a page links to, as text that any browser shows."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for page in [file for file in files if file.is_documentation_page()]:
        for path in map(Path, LINK.findall(page.content_string)):
            target = _in_repository(page, path)
            name = _in_site(target)
            if (ROOT / target).is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links of the repository lead to what the site has in their place."""
    return LINK.sub(lambda link: _link(page.file, link[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _link(page: File, link: str) -> str:
    target = _in_repository(page, Path(link))
    return os.path.relpath(_in_site(target), os.path.dirname(page.src_uri))


def _in_repository(page: File, link: Path) -> str:
    """The path of what a page links to, from the root of the repository."""
    return os.path.relpath(Path(page.abs_src_path or ROOT).parent / link, ROOT)


def _in_site(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.txt"


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
