"""The documentation says what the code does."""

import re
import runpy
from pathlib import Path

from tests.conftest import REPOSITORY
from worker.engine.catalog.methods import METHODS
from worker.engine.methods import BUILDERS


def test_the_reference_is_up_to_date(tmp_path: Path) -> None:
    generated = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["reference"](tmp_path)
    assert (REPOSITORY / "docs" / "reference.md").read_text() == generated, "run make docs"


def test_every_link_in_the_documentation_leads_somewhere() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_catalog_and_arithmetic_have_the_same_methods() -> None:
    assert set(BUILDERS) == set(METHODS)
