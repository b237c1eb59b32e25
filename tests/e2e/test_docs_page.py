"""`/docs` in a real browser: it works, and asks nobody but the service for anything."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser import chromium, visit
from tests.conftest import Service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_the_page_shows_every_route_and_its_requests_stay_here(service: Service, browser: Browser) -> None:
    with visit(browser, f"{service.url}/docs") as page:
        page.page.wait_for_selector("#operations-merge-merge")
        routes = [
            (path, method) for path, ways in service.get("/openapi.json").json()["paths"].items() for method in ways
        ]
        assert page.page.locator(".opblock").count() == len(routes)
        assert page.complaints == []
        assert {url.removeprefix(service.url) for url in page.requests if not url.startswith("data:")} == {
            "/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json",
        }  # fmt: skip


@pytest.mark.parametrize("name", ["localhost", pytest.param("127.0.0.1", marks=pytest.mark.long)])
def test_what_is_tried_out_on_the_page_is_done(service: Service, browser: Browser, name: str) -> None:
    with visit(browser, f"http://{name}:{service.port}/docs") as page:
        page.page.click("#operations-merge-validate .opblock-summary-control")
        page.page.click("text=Try it out")
        with page.page.expect_response("**/merge/validate") as answered:
            page.page.click("text=Execute")
        assert answered.value.status == 422, "the example's checkpoints are not there, but the page may ask"
        page.page.wait_for_selector("text=invalid_request")


def test_a_page_of_another_port_gets_nothing_and_changes_nothing(service: Service, browser: Browser) -> None:
    with visit(browser, f"http://localhost:{service.port}/healthz") as page:
        asked = """async ([url, options]) => {
            try { return (await fetch(url, options)).status } catch (error) { return String(error) }
        }"""
        url = f"http://127.0.0.1:{service.port}/merge"
        plain = {"method": "POST", "body": "{}", "mode": "no-cors"}
        with page.page.expect_response("**/merge") as answered:
            assert page.page.evaluate(asked, [url, plain]) == 0, "opaque"
        assert answered.value.status == 403
        assert "Failed to fetch" in page.page.evaluate(asked, [url, {"method": "POST", "body": "{}"}])


def test_a_page_whose_name_points_here_gets_nothing(service: Service, browser: Browser) -> None:
    with visit(browser, f"http://evil.localhost:{service.port}/jobs") as page:  # browsers take it for loopback
        assert '"code": "unknown_host"' in page.page.content()


def test_the_parts_of_the_page_are_those_and_no_others(service: Service) -> None:
    for path in ("/docs/redoc.standalone.js", "/docs/..%2f__init__.py", "/docs/", "/redoc", "/docs/oauth2-redirect"):
        assert service.get(path).status_code == 404, path
    part = service.get("/docs/swagger-ui-bundle.js")
    assert (part.status_code, part.headers["Content-Type"].split(";")[0]) == (200, "text/javascript")
    assert service.get("/docs/swagger-ui-bundle.js", headers={"If-None-Match": part.headers["ETag"]}).status_code == 304
    policy = service.get("/docs").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
