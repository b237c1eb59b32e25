"""The documentation says what the code does."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from app.contracts.requests import MergeRequest
from tests.conftest import REPOSITORY
from tests.e2e.test_pages import EXECUTED
from tests.pages import PAGES, console_commands
from worker.engine.catalog.methods import METHODS, AutoParameters
from worker.engine.merging.methods import BUILDERS


def test_the_reference_is_up_to_date(tmp_path: Path) -> None:
    generated = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["reference"](tmp_path)
    assert (REPOSITORY / "docs" / "reference.md").read_text() == generated, "run make docs"


def test_every_link_in_the_documentation_leads_somewhere() -> None:
    pages = [*REPOSITORY.glob("*.md"), *PAGES]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_requests_in_the_documentation_are_requests() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    found = [json.loads(b) for page in pages for b in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len([MergeRequest.model_validate(block) for block in found if "models" in block]) >= 2
    assert len([AutoParameters.model_validate(block) for block in found if block.get("name") == "auto"]) == 1


def test_catalog_and_arithmetic_have_the_same_methods() -> None:
    assert set(BUILDERS) == set(METHODS)


def named_by(nav: Any) -> Iterator[str]:
    """The pages that a part of the site's navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from named_by(entry)


def test_every_page_has_its_place_in_the_site() -> None:
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    missing = {page.relative_to(REPOSITORY / "docs").as_posix() for page in PAGES} - set(named_by(nav))
    assert missing == set(), f"give each of these pages a line below `nav` in mkdocs.yml: {sorted(missing)}"


def test_every_command_on_a_page_is_run_or_says_why_not() -> None:
    run = {"client", *EXECUTED}
    unrun = [page.name for page in PAGES if console_commands(page) and page.stem not in run]
    assert unrun == [], "`console` blocks are for commands that tests run: name these pages in tests/e2e/test_pages.py"
    silent = [
        f"{page.name}: {before.strip()[-40:]}"
        for page in [*PAGES, REPOSITORY / "CONTRIBUTING.md"]
        for before in re.split("```(?:sh|bash|shell)\n", page.read_text())[:-1]
        if not re.search(r"<!-- not run: \S[^>]*-->\n$", before)
    ]
    assert silent == [], "say before a `sh` block why no test runs it: <!-- not run: … -->"
