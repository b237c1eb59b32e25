"""The documentation says what the code does."""

import json
import re
import runpy
from pathlib import Path

from app.contracts.requests import MergeRequest
from tests.conftest import REPOSITORY
from worker.engine.catalog.methods import METHODS, AutoParameters
from worker.engine.merging.methods import BUILDERS


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


def test_requests_in_the_documentation_are_requests() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    found = [json.loads(b) for page in pages for b in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len([MergeRequest.model_validate(block) for block in found if "models" in block]) >= 2
    assert len([AutoParameters.model_validate(block) for block in found if block.get("name") == "auto"]) == 1


def test_catalog_and_arithmetic_have_the_same_methods() -> None:
    assert set(BUILDERS) == set(METHODS)
