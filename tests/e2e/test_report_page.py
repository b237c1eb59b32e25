"""The report page in a real browser, as the service serves it: nothing is fetched, nothing overflows, all is named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.browser import chromium, visit
from tests.conftest import Service, tiny_recipe
from tests.reports import UGLY, invented_contents, invented_result
from tests.tiny import merge_spec, model_spec, tiny_base, tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import PAGE_POLICY
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.reporting.page import merge_page

VIEWS: list[tuple[int, Literal["light", "dark"]]] = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]
UrlOf = Callable[[str], str]
FURTHER = [pytest.param(name, marks=pytest.mark.long) for name in ("bare", "scores", "auto")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def jobs(service: Service) -> dict[str, dict[str, Any]]:
    """A merge with everything, one without data, and scores."""
    everything = {**tiny_recipe("a", "b", "c"), "name": "a & b", "base": "local:checkpoints/base"}
    models = [{"name": name, "checkpoint": f"local:checkpoints/{name}"} for name in ("a", "b")]
    bare = {"method": {"name": "ties"}, "models": models, "base": "local:checkpoints/base"}
    scored = {key: value for key, value in tiny_recipe("a", "b").items() if key in ("method", "models")}
    for model in scored["models"]:
        model.pop("evaluation")
    answers = {
        "merge": service.post("/merge", json=everything),
        "bare": service.post("/merge", json=bare),
        "scores": service.post("/scores", json=scored),
    }
    found = {name: service.finished(answer.json()["id"]) for name, answer in answers.items()}
    assert [job["status"] for job in found.values()] == ["succeeded"] * 3
    return found


@pytest.fixture(scope="module")
def url_of(service: Service, jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> UrlOf:
    """Addresses of the jobs' reports, and of `auto`, an invented one of a search by long and ugly names."""
    root = tmp_path_factory.mktemp("auto")
    page = root / "report.html"
    page.write_text(searched_page(root), encoding="utf-8")
    pages = {name: f"http://127.0.0.1:{service.port}{job['links']['report']}" for name, job in jobs.items()}
    return {**pages, "auto": page.as_uri()}.__getitem__


def searched_page(root: Path) -> str:
    names = ["a", UGLY, "a-name-without-any-place-to-break" * 2, "d"]
    base = inspect_checkpoint(tiny_base(root / "base"), "base")
    folders = [tiny_checkpoint(root / f"m{number}", seed=number) for number in range(4)]
    models = [model_spec(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    spec = merge_spec(root / "out", models).model_copy(update={"name": "word" * 60, "recipe": {"long": "x" * 400}})
    plan = plan_merge([inspect_checkpoint(folder, folder.name) for folder in folders], base=base)
    return merge_page(
        spec, plan, invented_result(names, trials=12), invented_contents(names, rows=6, columns=12), "sha256:0"
    )


@pytest.mark.parametrize("name", ["merge", *FURTHER])
def test_the_page_fits_and_asks_for_nothing(browser: Browser, url_of: UrlOf, name: str) -> None:
    for width, scheme in VIEWS:
        with visit(browser, url_of(name), width=width, scheme=scheme) as seen:
            assert seen.overflow == 0, (width, scheme)
            for details in seen.page.locator("details").all():
                details.evaluate("it => it.open = true")
            assert seen.overflow == 0, (width, scheme)
            assert [url for url in seen.requests if not url.endswith("favicon.ico")] == [url_of(name)]
            assert seen.complaints == []


@pytest.mark.parametrize("name", ["merge", *FURTHER])
def test_axe_finds_nothing_to_object_to(browser: Browser, url_of: UrlOf, name: str) -> None:
    for width, scheme in (VIEWS[0], VIEWS[-1]):
        with visit(browser, url_of(name), width=width, scheme=scheme) as seen:
            for details in seen.page.locator("details").all():
                details.evaluate("it => it.open = true")
            found = Axe().run(seen.page).response["violations"]
            problems = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
            assert problems == [], json.dumps(problems, indent=1)


@pytest.mark.parametrize("name", ["merge", "bare", "scores", "auto"])
def test_pictures_have_names_and_descriptions(browser: Browser, url_of: UrlOf, name: str) -> None:
    with visit(browser, url_of(name)) as seen:
        pictures = seen.page.get_by_role("img").all()
        assert len(pictures) == seen.page.locator("svg[role=img]").count() >= 1
        for picture in pictures:
            assert picture.locator("title").first.text_content()
            assert picture.locator("desc").first.text_content()
            box = picture.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) > 20
        assert seen.page.get_by_role("main").count() == seen.page.get_by_role("banner").count() == 1
        assert seen.page.get_by_role("navigation").count() == seen.page.get_by_role("contentinfo").count() == 1


def test_details_open_by_keyboard_and_focus_is_visible(browser: Browser, url_of: UrlOf) -> None:
    with visit(browser, url_of("merge")) as seen:
        details = seen.page.locator("details").first
        for _ in range(40):
            seen.page.keyboard.press("Tab")
            if details.evaluate("it => it.firstElementChild === document.activeElement"):
                break
        focused = "getComputedStyle(document.activeElement).outlineWidth"
        assert seen.page.evaluate(focused) == "3px"
        assert details.evaluate("it => it.open") is False
        seen.page.keyboard.press("Enter")
        assert details.evaluate("it => it.open") is True
        assert details.locator("table").is_visible()


def test_colours_follow_the_scheme_and_paper_is_white(browser: Browser, url_of: UrlOf) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with visit(browser, url_of("merge"), scheme="light") as light:
        assert light.page.evaluate(ground) == "rgb(255, 255, 255)"
    with visit(browser, url_of("merge"), scheme="dark") as dark:
        assert dark.page.evaluate(ground) == "rgb(15, 19, 24)"
        dark.page.emulate_media(media="print", color_scheme="dark")
        assert dark.page.evaluate(ground) == "rgb(255, 255, 255)"


def test_the_route_serves_a_page_that_may_do_nothing(service: Service, jobs: dict[str, dict[str, Any]]) -> None:
    answer = service.get(jobs["merge"]["links"]["report"])
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == PAGE_POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Disposition"].startswith("inline")
    again = service.get(jobs["merge"]["links"]["report"], headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


def test_nothing_runs_even_where_a_page_had_a_script(browser: Browser, url_of: UrlOf, tmp_path: Path) -> None:
    with visit(browser, url_of("merge")) as seen:
        page = seen.page.content()
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.replace("<main>", "<main><script>document.title = 'ran'</script><img src='http://127.0.0.1:9/'>")
    )
    with visit(browser, broken.as_uri()) as seen:
        assert seen.page.title() == "a & b - maskmerge report"
        assert any("Content Security Policy" in complaint for complaint in seen.complaints)
