"""The documentation as a site, in a real browser."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.browser import chromium, visit
from tests.conftest import REPOSITORY

LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]*)"|<link(?![^>]*rel="canonical")[^>]*\shref="([^"]*)"'
)
"""What a browser fetches for a page."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make site` builds it, where every warning is an error: a broken link or anchor, a page without a
    place."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the output of the tests free of requests."""


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, args=(0.05,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loaded = {
        (page.name, name) for page in pages for found in LOADED.findall(page.read_text()) for name in found if name
    }
    assert len(pages) > 30
    assert len(loaded) > 100
    assert sorted(name for name in loaded if re.match("(https?:)?//", name[1])) == []


def test_formulas_are_mathml_and_none_is_left_as_tex(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math ") > 30
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(), page


@pytest.mark.parametrize(
    ("page", "width", "scheme"),
    [("index", 390, "dark"), ("method", 1280, "light"), ("tutorial", 1280, "light"), ("pipelines", 390, "dark")],
)
def test_pages_fit_and_can_be_read(
    browser: Browser, url: str, page: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    with visit(browser, f"{url}/{page}.html", width=width, scheme=scheme) as seen:
        assert seen.overflow == 0
        assert seen.complaints == []
        assert [asked for asked in seen.requests if not asked.startswith(url)] == []
        found = Axe().run(seen.page, options={"runOnly": ["color-contrast", "image-alt", "heading-order", "link-name"]})
        assert found.violations_count == 0, found.generate_report()


def test_a_word_is_found_by_the_search(browser: Browser, url: str) -> None:
    with visit(browser, f"{url}/index.html?q=retention") as seen:  # the page types it once its script listens
        seen.page.wait_for_selector(".md-search-result__item a")
        assert [asked for asked in seen.requests if not asked.startswith(url)] == []
