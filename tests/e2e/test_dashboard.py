"""The dashboard in a real browser: what people do with it, and that it asks nobody but the service for anything."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from app.contracts.requests import as_recipe
from tests.browser import Visit, chromium, visit
from tests.conftest import HANGS_S, Service, measured_anew, tiny_recipe

VIEWS: list[tuple[int, Literal["light", "dark"]]] = [(390, "dark"), (1280, "light")]
WAIT_MS = HANGS_S * 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def jobs(service: Service) -> list[dict[str, Any]]:
    """Two merges that have succeeded, with a label that no other test's have."""
    recipes = [{**tiny_recipe("a", "b"), "name": "first & last"}, tiny_recipe("a", "c", name="average")]
    ids = [service.submit({**recipe, "labels": {"of": "dashboard"}}) for recipe in recipes]
    found = [service.finished(job_id) for job_id in ids]
    assert [job["status"] for job in found] == ["succeeded"] * 2
    return found


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"[id='{name.replace('__', '.')}']").fill(value)


def checked(seen: Visit, service: Service) -> None:
    """Asserts what holds of every page: it fits, nobody is excluded, and nothing comes from elsewhere."""
    for details in seen.page.locator("details").all():
        details.evaluate("it => it.open = true")
    assert seen.overflow == 0, seen.page.url
    found = Axe().run(seen.page).response["violations"]
    problems = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
    assert problems == [], json.dumps(problems, indent=1)
    assert seen.complaints == []
    assert {url for url in seen.requests if not url.startswith((f"{service.url}/", "data:"))} == set()


def test_every_page_fits_every_screen_and_excludes_nobody(
    service: Service, browser: Browser, jobs: list[dict[str, Any]]
) -> None:
    first, second = (job["id"] for job in jobs)
    [digest, *_] = [one["digest"] for one in service.get("/scores?statistic=mask_fisher").json()["data"]]
    paths = [
        "/?label=of:dashboard", f"/dashboard/jobs/{first}", f"/dashboard/compare?job={first}&job={second}",
        "/dashboard/queue", "/dashboard/statistics", f"/dashboard/statistics/{digest}", "/dashboard/new",
        f"/dashboard/new/text?job={first}",
    ]  # fmt: skip
    for number, path in enumerate(paths):
        width, scheme = VIEWS[number % 2]  # the check takes seconds, so that each page is checked in one view
        with visit(browser, f"{service.url}{path}", width=width, scheme=scheme) as seen:
            assert seen.page.get_by_role("main").count() == seen.page.get_by_role("navigation").count() == 1
            checked(seen, service)
            width, scheme = VIEWS[1 - number % 2]
            seen.page.set_viewport_size({"width": width, "height": 900})
            seen.page.emulate_media(color_scheme=scheme)
            assert seen.overflow == 0, seen.page.url


def test_jobs_are_found_and_compared_by_keyboard(
    service: Service, browser: Browser, jobs: list[dict[str, Any]]
) -> None:
    with visit(browser, f"{service.url}/?label=of:dashboard") as seen:
        boxes = seen.page.get_by_role("checkbox")
        assert boxes.count() == 2
        for box in boxes.all():
            box.focus()
            seen.page.keyboard.press("Space")
        with seen.page.expect_response(lambda answer: answer.url.startswith(f"{service.url}/?"), timeout=WAIT_MS):
            """The list renews itself every three seconds."""
        assert [box.is_checked() for box in boxes.all()] == [True, True], "the list renewed itself and forgot"
        seen.page.route("**/?*", lambda route: route.fulfill(status=503, body="Redis is away"))
        with seen.page.expect_response(lambda answer: answer.status == 503, timeout=WAIT_MS):
            """The next time, it cannot."""
        seen.page.wait_for_timeout(200)
        assert boxes.count() == 2, "what was there stays while the service is away"
        seen.page.unroute("**/?*")
        seen.page.get_by_role("button", name="Compare").focus()
        seen.page.keyboard.press("Enter")
        seen.page.wait_for_url("**/dashboard/compare?*")
        rows = {row.locator("th").inner_text(): row for row in seen.page.locator("tbody tr").all()}
        for job in jobs:
            assert f"{100 * job['result']['mean_retention']:.1f} %" in rows["mean retention"].inner_text()
        assert "average" in rows["method.name"].inner_text()
        assert "mask_fisher" in rows["method.name"].inner_text()


def test_a_job_s_page_has_its_report_its_files_and_a_recipe_that_makes_it_again(
    service: Service, browser: Browser, jobs: list[dict[str, Any]]
) -> None:
    job = jobs[0]
    with visit(browser, f"{service.url}/dashboard/jobs/{job['id']}") as seen:
        page = seen.page
        report = page.frame_locator("iframe")
        expect(report.get_by_role("heading", level=1)).to_have_text("first & last", timeout=WAIT_MS)
        assert report.locator("svg[role=img]").count() > 3
        page.locator("summary", has_text="files").click()
        with page.expect_download() as fetched:
            page.get_by_role("link", name="recipe.json").click()
        assert json.loads(fetched.value.path().read_bytes()) == as_recipe(job["request"])
        page.get_by_text("YAML", exact=True).click()
        recipe = yaml.safe_load(page.get_by_role("region", name="YAML").inner_text())
        assert len(json.dumps(recipe)) < len(json.dumps(job["request"])) / 2
        assert service.post("/merge/validate", json=recipe).json()["request"] == job["request"]
        page.get_by_label("Model", exact=True).select_option("b")
        page.get_by_label("Texts").fill("one two\n\nthree <b>")
        page.get_by_role("button", name="Try", exact=True).click()
        answers = page.get_by_role("table", name="Answers to each text")
        expect(answers.locator("tbody tr")).to_have_count(2, timeout=WAIT_MS)
        assert answers.locator("tbody th").all_inner_texts() == ["one two", "three <b>"]
        told = service.post(f"/jobs/{job['id']}/predict", json={"model": "b", "rows": ["one two", "three <b>"]}).json()
        for row, right in zip(answers.locator("tbody tr").all(), told["rows"], strict=True):
            labels = [right[version]["label"] for version in ("expert", "average", "merged")]
            assert row.locator("td strong").all_inner_texts() == labels
        checked(seen, service)
        page.get_by_label("Texts").fill("w1 " * 60)
        page.get_by_role("button", name="Try", exact=True).click()
        expect(page.locator("#answers")).to_contain_text("it has more than the 48 tokens", timeout=WAIT_MS)
        assert seen.complaints == []


def test_a_merge_is_built_checked_sent_and_followed(service: Service, browser: Browser) -> None:
    with visit(browser, f"{service.url}/dashboard/new") as seen:
        page = seen.page
        offered = page.locator("#checkpoints option").evaluate_all("all => all.map(one => one.value)")
        assert {"local:checkpoints/a", "local:checkpoints/base"} <= set(offered)
        page.get_by_role("button", name="Add a model").click()
        page.get_by_role("button", name="Remove model 3").click()
        page.get_by_label("Title").press("Enter")
        assert page.get_by_role("button", name="Remove model").count() == 2, "Enter in a field removes nothing"
        fill(page, models__0__checkpoint="local:checkpoints/a", models__0__dataset__source="local:rows/a.jsonl")
        fill(page, models__1__checkpoint="local:checkpoints/missing", models__1__dataset__source="local:rows/b.jsonl")
        expect(page.get_by_role("alert")).to_contain_text("models.1.checkpoint", timeout=WAIT_MS)
        fill(page, models__1__checkpoint="local:checkpoints/b")
        expect(page.get_by_text("This can be sent.")).to_be_visible(timeout=WAIT_MS)
        rows = page.locator("#rows-0-dataset")
        expect(rows.get_by_role("columnheader", name="text")).to_contain_text("text")
        assert rows.locator("tbody tr").count() == 3
        assert rows.get_by_label("label").input_value() == "", "it is guessed"
        page.get_by_label("Method", exact=True).select_option("average")
        expect(page.locator("#parameters")).not_to_contain_text("Fisher Mask Nodes", timeout=WAIT_MS)
        page.get_by_label("Method", exact=True).select_option("mask_fisher")
        expect(page.locator("#parameters")).to_contain_text("Fisher Mask Nodes", timeout=WAIT_MS)
        page.get_by_text("11 parameters").click()
        fill(page, method__examples="0")
        expect(page.get_by_role("alert")).to_contain_text("method.examples", timeout=WAIT_MS)
        fill(page, method__examples="32", name="by hand", labels="of:form")
        expect(page.get_by_text("This can be sent.")).to_be_visible(timeout=WAIT_MS)
        checked(seen, service)
        page.get_by_role("button", name="Merge", exact=True).click()
        page.wait_for_url("**/dashboard/jobs/*")
        job_id = page.url.rpartition("/")[2]
        expect(page.get_by_role("heading", level=1)).to_have_text("by hand succeeded", timeout=WAIT_MS)
        expect(page.locator(".log")).to_contain_text("attempt 1 starts on worker")
        request = service.job(job_id)["request"]
        assert request["models"][0]["dataset"]["label"] == "label"
        assert (request["method"]["examples"], request["labels"]) == (32, {"of": "form"})


@pytest.mark.long
def test_a_running_job_shows_how_far_it_is_is_cancelled_and_tried_again(service: Service, browser: Browser) -> None:
    job_id, engine = service.submit_held(measured_anew(tiny_recipe("a", "b")))
    try:
        with visit(browser, f"{service.url}/dashboard/jobs/{job_id}") as seen:
            page = seen.page
            assert page.locator("[aria-current=step]").inner_text().startswith("loading")
            page.get_by_role("button", name="Cancel").click()
            expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled", timeout=WAIT_MS)
            page.get_by_role("button", name="Try again").click()
            expect(page.get_by_role("heading", level=1)).to_contain_text("succeeded", timeout=WAIT_MS)
            assert seen.complaints == []
            page.get_by_text("Remove this job").click()
            page.get_by_role("button", name="Remove the job").click()
            page.wait_for_url(f"{service.url}/")
    finally:
        if engine.is_running():
            engine.resume()
    assert service.get(f"/jobs/{job_id}").status_code == 404


def test_a_recipe_is_written_as_text_and_mergekit_s_are_understood(service: Service, browser: Browser) -> None:
    with visit(browser, f"{service.url}/dashboard/new/text") as seen:
        page = seen.page
        page.get_by_label("Recipe").fill("models: [")
        expect(page.get_by_role("alert")).to_contain_text("not YAML", timeout=WAIT_MS)
        recipe = "merge_method: linear\nmodels:\n- {model: local:checkpoints/a, parameters: {weigth: 1}}\n"
        page.get_by_label("Recipe").fill(recipe)
        expect(page.get_by_role("alert")).to_contain_text("models.0.parameters.weight", timeout=WAIT_MS)
        models = [{"model": f"local:checkpoints/{name}", "parameters": {"weight": 1}} for name in ("a", "c")]
        page.get_by_label("Recipe").fill(yaml.safe_dump({"merge_method": "linear", "models": models}))
        expect(page.get_by_text("This can be sent.")).to_be_visible(timeout=WAIT_MS)
        checked(seen, service)
