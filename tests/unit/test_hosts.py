"""Which hosts and pages the service answers: loopback's names and its own, and no page of anybody else."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api.hosts import OwnHosts
from app.contracts.settings import Settings

Header = tuple[str, str]
NAMES = ("0.0.0.0", "Merge.Example.org.", "[2001:db8::1]", "api")  # noqa: S104 - the address as it is set

ORIGINS = frozenset({"https://app.example.org"})


def answered(
    *headers: Header, method: str = "GET", target: str = "/jobs", scheme: str = "http"
) -> tuple[int, dict[str, Any], str]:
    """(status, problem or nothing, path that the app behind was asked for)."""
    sent: list[Message] = []
    asked: list[str] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Message:
        raise AssertionError("nothing of the body is read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "scheme": scheme, "path": target, "raw_path": target.encode("latin-1"),
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    asyncio.run(OwnHosts(behind, NAMES, ORIGINS)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), asked[0] if asked else ""


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LocalHost:8000", "localhost.", "localhost.:8000", "localhost:", "127.0.0.1",
        "127.0.0.1:1", "127.9.8.7:8000", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "[::ffff:127.0.0.1]:80",
        "merge.example.org", "MERGE.example.org.:443", "[2001:db8::1]:8000", "[2001:DB8:0::1]", "api:8000",
        "127.0.0.1.",
    ],
)  # fmt: skip
def test_loopback_and_allowed_names_are_served(host: str) -> None:
    assert answered(("host", host))[0] == 200
    assert answered(("host", host), method="POST")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "evil.localhost", "localhost..", "notlocalhost",
        "127.0.0.1.nip.io", "128.0.0.1", "127.1", "2130706433", "0.0.0.0:8000", "[::]:8000", "[::2]", "_", "10.0.0.1",
        "[::ffff:128.0.0.1]", "testserver", "sub.merge.example.org", "example.org", "127.0.0.1..",
    ],
)  # fmt: skip
def test_any_other_name_is_refused_and_the_refusal_names_the_setting(host: str) -> None:
    status, problem, _ = answered(("host", host))
    assert (status, problem["code"], problem["status"]) == (421, "unknown_host", 421)
    assert "MASKMERGE_ALLOWED_HOSTS" in problem["detail"]


@pytest.mark.parametrize(
    "host",
    [
        "", " ", "localhost evil.example", "localhost,evil.example", "localhost@evil.example", "evil@localhost",
        "localhost/", "http://localhost", "localhost:80:80", "localhost:x", "localhost:-1", "localhost:123456", "::1",
        "[::1", "[::1]x", "[::1%25lo]", "loc\u00e4lhost", "localhost\x00", "*", "%6c%6fcalhost",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(host: str) -> None:
    status, problem, _ = answered(("host", host))
    assert (status, problem["code"]) == (400, "malformed")


def test_one_host_is_named_and_forwarded_ones_count_for_nothing() -> None:
    assert answered()[0] == 400
    assert answered(("host", "localhost"), ("host", "localhost"))[0] == 400
    assert answered(("host", "localhost"), ("host", "evil.example"))[0] == 400
    for name in ("x-forwarded-host", "x-host", "forwarded", "x-original-host"):
        assert answered(("host", "evil.example"), (name, "localhost"))[0] == 421
        assert answered(("host", "localhost"), (name, "evil.example"))[0] == 200


@pytest.mark.parametrize(
    ("target", "status", "path"),
    [
        ("http://localhost:8000/jobs/1", 200, "/jobs/1"),
        ("HTTPS://LOCALHOST", 200, "/"),
        ("http://localhost/a%20b", 200, "/a b"),
        ("http://evil.example/jobs", 421, ""),
        ("http://localhost@evil.example/jobs", 400, ""),
        ("http://localhost%2f.evil.example/jobs", 400, ""),
        ("http:///jobs", 400, ""),
    ],
)
def test_a_target_that_is_a_whole_url_is_of_the_host_that_it_names(target: str, status: int, path: str) -> None:
    assert answered(("host", "localhost"), target=target)[::2] == (status, path)
    assert answered(("host", "evil.example"), target=target)[0] == 421


OWN = [
    (("host", "localhost:8000"), ("origin", "http://localhost:8000")),
    (("host", "LOCALHOST.:8000"), ("origin", "http://localhost:8000")),
    (("host", "localhost"), ("origin", "http://localhost")),
    (("host", "localhost:80"), ("origin", "http://localhost")),
    (("host", "[::1]:8000"), ("origin", "http://[::1]:8000")),
    (("host", "merge.example.org"), ("origin", "https://merge.example.org")),  # behind a proxy that speaks TLS
    (("host", "merge.example.org:443"), ("origin", "https://merge.example.org")),
    (("host", "localhost:8000"), ("origin", "http://localhost:8000"), ("sec-fetch-site", "same-origin")),
    (("host", "localhost:8000"), ("sec-fetch-site", "none")),
    (("host", "localhost:8000"),),  # no browser
]
FOREIGN = [
    (("host", "localhost:8000"), ("origin", origin))
    for origin in (
        "http://evil.example", "https://evil.example:8000", "null", "", "http://localhost", "http://localhost:8001",
        "http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost:8000.evil.example", "localhost:8000",
        "file://localhost:8000", "chrome-extension://localhost:8000", "http://localhost:8000/", "https://localhost",
        "http://evil@localhost:8000", "http://localhost:8000 http://evil.example",
    )
] + [
    (("host", "localhost:8000"), ("sec-fetch-site", "cross-site")),
    (("host", "localhost:8000"), ("sec-fetch-site", "same-site")),
    (("host", "localhost:8000"), ("sec-fetch-site", "odd")),
    (("host", "localhost:8000"), ("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")),
    (("host", "localhost:8000"), ("sec-fetch-site", "same-origin"), ("origin", "null")),
    (("host", "localhost:8000"), ("sec-fetch-site", "cross-site"), ("origin", "http://localhost:8000")),
    (("host", "localhost:8000"), ("origin", "http://localhost:8000"), ("origin", "http://evil.example")),
]  # fmt: skip
CHANGES = ("POST", "PUT", "PATCH", "DELETE", "PROPFIND", "post")


@pytest.mark.parametrize("headers", OWN)
def test_its_own_pages_and_programs_may_change_things(headers: tuple[Header, ...]) -> None:
    assert {answered(*headers, method=method)[0] for method in CHANGES} == {200}


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_others_may_not_change_anything(headers: tuple[Header, ...]) -> None:
    for method in CHANGES:
        status, problem, asked = answered(*headers, method=method)
        assert (status, problem["code"], asked) == (403, "foreign_origin", "")
    assert answered(*headers)[0] == 200, "that they may read anything is what browsers forbid"


def test_pages_of_named_origins_may_change_things_and_of_no_others() -> None:
    host, site = ("host", "localhost:8000"), ("sec-fetch-site", "cross-site")
    assert answered(host, ("origin", "https://app.example.org"), site, method="POST")[0] == 200
    for origin in ("http://app.example.org", "https://app.example.org:8443", "https://app.example.org.evil.example"):
        status, problem, _ = answered(host, ("origin", origin), site, method="POST")
        assert (status, problem["code"]) == (403, "foreign_origin")
        assert "MASKMERGE_CORS_ORIGINS" in problem["detail"]
    twice = (("origin", "https://app.example.org"), ("origin", "https://evil.example"))
    assert answered(host, *twice, method="POST")[0] == 403


def test_a_page_that_came_without_tls_is_foreign_to_a_service_with_tls() -> None:
    host = ("host", "merge.example.org")
    assert answered(host, ("origin", "https://merge.example.org"), method="POST", scheme="https")[0] == 200
    assert answered(host, ("origin", "http://merge.example.org"), method="POST", scheme="https")[0] == 403


def test_a_request_to_another_origin_than_the_target_names_is_foreign() -> None:
    headers = (("host", "localhost:8000"), ("origin", "http://localhost:8000"))
    assert answered(*headers, method="POST", target="http://localhost:8000/merge")[0] == 200
    assert answered(*headers, method="POST", target="http://localhost:9000/merge")[0] == 403


def test_hosts_are_set_by_commas() -> None:
    assert Settings(allowed_hosts="api, Merge.example.org ,10.0.0.1,[::2],").allowed_hosts == (
        "api", "Merge.example.org", "10.0.0.1", "[::2]",
    )  # fmt: skip


@pytest.mark.parametrize("text", ["*", "*.example.org", "http://a.org", "a.org:8000", "10.0.0.1:80", "a.org/", "ä.org"])
def test_settings_that_are_no_hosts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="without scheme and port"):
        Settings(allowed_hosts=text)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"), ("localhost", "http://localhost:8000"), ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000"),  # noqa: S104 - not listened on here
    ],
)  # fmt: skip
def test_the_service_that_listens_anywhere_is_reached_by_loopback(host: str, url: str) -> None:
    assert Settings(host=host).url == url
