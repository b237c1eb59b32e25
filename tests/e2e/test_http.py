"""HTTP as it is on the wire: what clients hide is sent and read over sockets."""

import gzip
import json
import re
import socket
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any

import httpx
import pytest

from tests.conftest import HANGS_S, Service, assert_problem, tiny_recipe


@pytest.fixture(scope="module")
def job(service: Service) -> dict[str, Any]:
    return service.finished(service.submit(tiny_recipe("a", "b", name="average")))


class Answer:
    """One response off the wire: up to the connection's end."""

    def __init__(self, received: bytes) -> None:
        head, _, self.body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1]) if first else 0
        self.headers = httpx.Headers([(name, value) for name, _, value in (line.partition(": ") for line in lines)])

    @property
    def code(self) -> str:
        assert self.headers["content-type"] == "application/problem+json", self.body
        code: str = json.loads(self.body)["code"]
        return code


def exchange(service: Service, sent: bytes) -> Answer:
    with socket.create_connection(("127.0.0.1", service.port), timeout=HANGS_S) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return Answer(received)


def asked(service: Service, line: str, *headers: str, body: str = "") -> Answer:
    head = "\r\n".join([f"{line} HTTP/1.1", *headers, "Connection: close", "", body])
    return exchange(service, head.encode("latin-1"))


# --- hosts and pages


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Host: localhost"], 200),
        (["Host: [::1]:8000"], 200),
        (["Host: evil.example"], 421),
        (["Host: evil.example", "X-Forwarded-Host: localhost"], 421),
        (["Host: localhost", "Host: evil.example"], 400),
        ([], 400),
    ],
)
def test_a_name_that_points_here_is_not_enough(service: Service, headers: list[str], status: int) -> None:
    for path in ("/healthz", "/jobs", "/docs", "/openapi.json", "/nowhere"):
        answer = asked(service, f"GET {path}", *headers)
        assert answer.status == (404 if (path, status) == ("/nowhere", 200) else status)
        if status != 200:
            assert answer.code == {421: "unknown_host", 400: "malformed"}[status]


def test_a_target_may_be_a_whole_url(service: Service) -> None:
    assert asked(service, "GET http://localhost/healthz", "Host: localhost").status == 200
    assert asked(service, "GET http://evil.example/healthz", "Host: localhost").status == 421


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_no_page_of_others_changes_anything(service: Service, job: dict[str, Any], headers: dict[str, str]) -> None:
    with service.http as http:
        for method, path in (
            ("POST", "/merge"), ("POST", "/merge/validate"), ("POST", "/scores"), ("DELETE", f"/jobs/{job['id']}"),
            ("POST", f"/jobs/{job['id']}/cancel"), ("POST", f"/jobs/{job['id']}/retry"),
        ):  # fmt: skip
            assert_problem(http.request(method, path, json=tiny_recipe(), headers=headers), 403, "foreign_origin")
        assert http.get("/jobs", headers=headers).status_code == 200
        own = {"Origin": service.url, "Sec-Fetch-Site": "same-origin"}
        assert http.post("/merge/validate", json=tiny_recipe(), headers=own).status_code == 200


# --- methods


def paths(service: Service, job: dict[str, Any]) -> list[str]:
    """A real path of every route."""
    digest = service.get("/scores").json()["data"]
    values = {
        "job_id": job["id"],
        "name": "models/a/config.json",
        "digest": digest[0]["digest"] if digest else "0" * 64,
        "key_id": "0" * 16,
        "key": "mine",
        "n": "1",
        "sha256": "0" * 64,
    }
    return [re.sub(r"\{(\w+)\}", lambda m: values[m[1]], path) for path in service.get("/openapi.json").json()["paths"]]


def test_head_answers_as_get_does_without_a_body(service: Service, job: dict[str, Any]) -> None:
    service.finished(service.post("/scores", json={"method": {"name": "mask_fisher"}, "models": [
        {k: tiny_recipe("a")["models"][0][k] for k in ("name", "checkpoint", "dataset")}]}).json()["id"])  # fmt: skip
    for path in [*paths(service, job), "/docs", "/openapi.json", "/nowhere", "/jobs/none", f"/jobs/{'0' * 28}/archive"]:
        head, got = asked(service, f"HEAD {path}", "Host: localhost"), asked(service, f"GET {path}", "Host: localhost")
        assert (path, head.status, head.body) == (path, got.status, b"")
        for answer in (head, got):
            for changing in ("date", "transfer-encoding", "x-request-id"):
                answer.headers.pop(changing, None)
        if path == "/metrics":  # it has grown by the first of the two requests
            assert int(head.headers.pop("content-length")) > 0 < int(got.headers.pop("content-length"))
        assert head.headers == got.headers, path


def test_head_of_a_stream_ends_and_reads_nothing_of_a_file(service: Service) -> None:
    job_id = service.submit(tiny_recipe("a", "b", "c", examples=200))
    answer = asked(service, f"HEAD /jobs/{job_id}/events", "Host: localhost")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")
    service.finished(job_id)


def test_head_keeps_the_connection(service: Service, job: dict[str, Any]) -> None:
    with service.http as http:
        for path in (f"/jobs/{job['id']}/archive", f"/jobs/{job['id']}/events", "/healthz") * 2:
            assert http.head(path).status_code == 200
    sent = f"HEAD /jobs/{job['id']}/archive HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent += "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert exchange(service, sent.encode()).body.endswith(b'\r\n\r\n{"status":"ok"}')


def test_ranges_are_of_get_alone(service: Service, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}/artifacts/models/a/config.json"
    with service.http as http:
        size = len(http.get(path).content)
        for value in ("bytes=0-1", "bytes=999999999-", "bytes=x"):
            head = http.head(path, headers={"Range": value})
            assert (head.status_code, head.headers["Content-Length"]) == (200, str(size))


ALLOWED = {
    "/healthz": "GET, HEAD",
    "/docs": "GET, HEAD",
    "/openapi.json": "GET, HEAD",
    "/jobs": "GET, HEAD",
    "/jobs/{job_id}": "GET, HEAD, DELETE",
    "/jobs/{job_id}/cancel": "POST",
    "/jobs/{job_id}/artifacts/{name}": "GET, HEAD",
    "/merge": "POST",
    "/scores": "GET, HEAD, POST",
    "/scores/{digest}": "GET, HEAD",
}


def test_a_method_that_a_path_does_not_take_is_told_all_that_it_takes(service: Service, job: dict[str, Any]) -> None:
    values = {"job_id": job["id"], "name": "recipe.json", "digest": "0" * 64}
    for template, allowed in ALLOWED.items():
        path = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ODD", "get"}:
            if method in allowed.split(", "):
                continue
            answer = asked(service, f"{method} {path}", "Host: localhost")
            assert (method, path, answer.status) == (method, path, 405)
            assert answer.headers["allow"] == allowed
            if method != "HEAD":
                assert answer.code == "method_not_allowed"


# --- ids


@pytest.mark.parametrize(
    "job_id", ["1", "0" * 27, "0" * 29, "A" * 28, "0" * 27 + "g", "%00", "0" * 28 + "%0A", "\u0660"]
)
def test_an_id_that_cannot_exist_is_not_found(service: Service, job_id: str) -> None:
    with service.http as http:
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/artifacts"), ("GET", "/artifacts/x"),
            ("GET", "/archive"), ("GET", "/report"), ("POST", "/cancel"), ("POST", "/retry"),
        ):  # fmt: skip
            assert_problem(http.request(method, f"/jobs/{job_id}{path}"), 404, "not_found")
        assert_problem(http.get(f"/scores/{job_id}"), 404, "not_found")


def test_a_path_that_goes_on_is_another(service: Service) -> None:
    for path in ("/jobs%0A", "/healthz%0A", "/healthz/", "/healthz%00", "/Healthz"):
        assert_problem(service.get(path), 404, "not_found")
    with service.http as http:
        assert_problem(http.get(f"{service.url}//healthz"), 404, "not_found")  # a path alone would name another host
        assert_problem(http.post("/merge%0A", json=tiny_recipe()), 404, "not_found")


# --- ranges


def test_several_ranges_come_as_parts_and_what_is_no_range_is_not_read_as_one(
    service: Service, job: dict[str, Any]
) -> None:
    path = f"/jobs/{job['id']}/artifacts/models/a/config.json"
    whole = service.get(path).content
    several = service.get(path, headers={"Range": "bytes=0-1,5-8,9999999-"})
    assert several.status_code == 206
    boundary = several.headers["Content-Type"].partition("multipart/byteranges; boundary=")[2]
    parts = several.content.split(f"--{boundary}".encode())
    assert [part.partition(b"\r\n\r\n")[2][:-2] for part in parts[1:-1]] == [whole[0:2], whole[5:9]]
    assert len(several.content) == int(several.headers["Content-Length"])
    assert service.get(path, headers={"Range": "items=0-5"}).content == whole
    for value in ("bytes=+1-2", "bytes=1_0-1_2", "bytes= 1 - 2", "bytes=3-2"):
        assert_problem(service.get(path, headers={"Range": value}), 400, "malformed")
    beyond = service.get(path, headers={"Range": "bytes=9999999-"})
    assert_problem(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["Content-Range"] == f"bytes */{len(whole)}"


# --- conditions


def test_files_are_sent_on_the_conditions_that_a_request_makes(service: Service, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}/artifacts/models/a/config.json"
    whole = service.get(path)
    etag, modified = whole.headers["ETag"], whole.headers["Last-Modified"]
    made = parsedate_to_datetime(modified)
    earlier, later = (format_datetime(made + timedelta(seconds=by), usegmt=True) for by in (-1, 1))
    statuses = {
        200: [
            {"If-Match": etag}, {"If-Match": f'"other", {etag}'}, {"If-Match": "*"},
            {"If-Unmodified-Since": modified}, {"If-Unmodified-Since": later}, {"If-Unmodified-Since": "yesterday"},
            {"If-Match": etag, "If-Unmodified-Since": earlier},
            {"If-Modified-Since": earlier}, {"If-Modified-Since": "never"},
            {"If-None-Match": '"other"', "If-Modified-Since": later},
            {"Range": "bytes=0-1", "If-Range": f"W/{etag}"}, {"Range": "bytes=0-1", "If-Range": modified},
        ],
        206: [{"Range": "bytes=0-1", "If-Match": etag}, {"Range": "bytes=0-1", "If-Range": etag}],
        304: [
            {"If-None-Match": f"W/{etag}"}, {"If-None-Match": "*"}, {"If-Match": etag, "If-None-Match": etag},
            {"If-Modified-Since": modified}, {"If-Modified-Since": later},
        ],
        412: [
            {"If-Match": '"other"'}, {"If-Match": f"W/{etag}"}, {"If-Match": "", "If-None-Match": etag},
            {"If-Unmodified-Since": earlier}, {"If-Match": '"other"', "If-Unmodified-Since": later},
            {"Range": "bytes=0-1", "If-Match": '"other"'},
        ],
    }  # fmt: skip
    for status, cases in statuses.items():
        for headers in cases:
            answer = service.get(path, headers=headers)
            assert answer.status_code == status, headers
            if status == 412:
                assert_problem(answer, 412, "precondition_failed")
            else:
                assert answer.headers["ETag"] == etag
                assert answer.headers["Last-Modified"] == modified
                assert answer.headers["Cache-Control"] == whole.headers["Cache-Control"]


def test_an_archive_is_sent_on_the_conditions_that_a_request_makes(service: Service, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}/archive"
    whole, again = service.get(path), service.get(path)
    assert whole.content == again.content
    assert whole.headers["ETag"] == again.headers["ETag"]
    etag, modified = whole.headers["ETag"], whole.headers["Last-Modified"]
    earlier = format_datetime(parsedate_to_datetime(modified) - timedelta(seconds=1), usegmt=True)
    cases: list[tuple[dict[str, str], int]] = [
        ({"If-Match": etag}, 200), ({"If-None-Match": '"other"'}, 200), ({"If-Modified-Since": earlier}, 200),
        ({"If-None-Match": etag}, 304), ({"If-None-Match": "*"}, 304), ({"If-Modified-Since": modified}, 304),
        ({"If-Match": '"other"'}, 412), ({"If-Match": f"W/{etag}"}, 412), ({"If-Unmodified-Since": earlier}, 412),
    ]  # fmt: skip
    for headers, status in cases:
        answer = service.get(path, headers=headers)
        assert answer.status_code == status, headers
        if status == 412:
            assert_problem(answer, 412, "precondition_failed")
        else:
            assert [answer.headers[name] for name in ("ETag", "Last-Modified")] == [etag, modified]
        assert answer.content == whole.content or status != 200
    other = service.finished(service.submit(tiny_recipe("b")))
    assert service.get(f"/jobs/{other['id']}/archive").headers["ETag"] != etag


def test_a_job_is_changed_on_the_conditions_that_a_request_makes(service: Service, job: dict[str, Any]) -> None:
    path = f"/jobs/{job['id']}"
    etag = service.get(path).headers["ETag"]
    assert service.get(path, headers={"If-Match": etag}).status_code == 200
    assert_problem(service.get(path, headers={"If-Match": '"other"'}), 412, "precondition_failed")
    with service.http as http:
        for method, action in (("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")):
            for headers in ({"If-Match": '"other"'}, {"If-None-Match": etag}):
                assert_problem(http.request(method, path + action, headers=headers), 412, "precondition_failed")
    assert service.get(path).headers["ETag"] == etag


# --- bodies and parameters

RECIPE = json.dumps(tiny_recipe("a", "b", name="average"))
YAML = {"Content-Type": "application/yaml"}
JSON = {"Content-Type": "application/json"}
BODIES: dict[str, tuple[dict[str, str], str | bytes, int, str]] = {
    "JSON": (JSON, RECIPE, 200, ""),
    "JSON in small and large letters": ({"Content-Type": "Application/JSON ; Charset=UTF-8"}, RECIPE, 200, ""),
    "JSON of a kind": ({"Content-Type": "application/vnd.recipe+json"}, RECIPE, 200, ""),
    "JSON after a mark of its encoding": (JSON, b"\xef\xbb\xbf" + RECIPE.encode(), 200, ""),
    "JSON as it is": ({**JSON, "Content-Encoding": "identity"}, RECIPE, 200, ""),
    "YAML": (YAML, RECIPE, 200, ""),
    "packed": ({**JSON, "Content-Encoding": "gzip"}, gzip.compress(RECIPE.encode()), 415, "unsupported_media_type"),
    "packed in a way that nobody knows": ({**JSON, "Content-Encoding": "odd"}, RECIPE, 415, "unsupported_media_type"),
    "packed, it says": ({**YAML, "Content-Encoding": "br"}, RECIPE, 415, "unsupported_media_type"),
    "no type": ({"Content-Type": ""}, RECIPE, 415, "unsupported_media_type"),
    "another type": ({"Content-Type": "text/plain"}, RECIPE, 415, "unsupported_media_type"),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, "a=b", 415, "unsupported_media_type"),
    "a type of JSON's that is none": ({"Content-Type": "text/x+json"}, RECIPE, 415, "unsupported_media_type"),
    "two types": ({"Content-Type": "application/json, text/plain"}, RECIPE, 415, "unsupported_media_type"),
    "another character set": (
        {"Content-Type": "application/json; charset=latin-1"}, RECIPE, 415, "unsupported_media_type",
    ),
    "YAML in another character set": (
        {"Content-Type": "application/yaml;charset=utf-16"}, RECIPE, 415, "unsupported_media_type",
    ),
    "nothing": (JSON, "", 400, "malformed"),
    "nothing as YAML": (YAML, "", 422, "invalid_request"),
    "a key twice": (JSON, RECIPE[:-1] + ', "models": []}', 400, "malformed"),
    "a key twice as YAML": (YAML, RECIPE[:-1] + ', "models": []}', 400, "malformed"),
    "NaN": (JSON, RECIPE[:-1] + ', "deadline_seconds": NaN}', 400, "malformed"),
    "infinity": (JSON, RECIPE[:-1] + ', "deadline_seconds": 1e999}', 400, "malformed"),
    "very deep": (JSON, "[" * 100_000, 400, "malformed"),
    "null": (JSON, "null", 422, "invalid_request"),
    "a text for a number": (JSON, RECIPE[:-1] + ', "layers": "2"}', 422, "invalid_request"),
    "a text for a number as YAML": (YAML, RECIPE[:-1] + ', "layers": 0b10}', 422, "invalid_request"),
    "base 60": (YAML, RECIPE[:-1] + ', "layers": 1:30}', 422, "invalid_request"),
    "a boolean for a number": (JSON, RECIPE[:-1] + ', "layers": true}', 422, "invalid_request"),
    "a boolean of YAML 1.1": (YAML, RECIPE[:-1] + ', "evaluate": off}', 422, "invalid_request"),
    "octal": (YAML, RECIPE[:-1] + ', "layers": 02}', 400, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_body_is_what_it_says_that_it_is(service: Service, case: str) -> None:
    headers, body, status, code = BODIES[case]
    for path in ("/merge/validate", "/merge") if status != 200 else ("/merge/validate",):
        response = service.post(path, content=body, headers=headers)
        if status == 200:
            assert response.status_code == 200, response.text
        else:
            assert_problem(response, status, code)
            assert (response.headers.get("Accept-Encoding") == "identity") == ("packed" in case)


def test_scores_take_json_alone(service: Service) -> None:
    response = service.post("/scores", content="{}", headers=YAML)
    assert_problem(response, 415, "unsupported_media_type")
    assert "send application/json, in" in response.json()["detail"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/jobs?stauts=failed", "did you mean 'status'"),
        ("/jobs?limit=1&limit=2", "limit is there more than once"),
        ("/jobs?status=failed&status=failed", "more than once"),
        ("/healthz?x=1", "takes none"),
        ("/jobs?limit=%2B1", "limit"),
        ("/jobs?limit=%201", "limit"),
        ("/jobs?limit=1_0", "limit"),
        ("/jobs?limit=1.0", "limit"),
        ("/jobs?limit=\u0661", "limit"),
        ("/jobs?limit=", "limit"),
        ("/jobs?limit=101", "limit"),
        ("/jobs?limit=" + "9" * 5000, "limit"),
        ("/jobs?after=x", "after"),
        ("/jobs?after=" + "0" * 28 + "%0A", "after"),
        ("/jobs?label=x", "label"),
        ("/scores?limit=1e1", "limit"),
        ("/scores?statistic=odd", "statistic"),
        ("/scores?checkpoint=", "checkpoint"),
        ("/methods?name=ties", "takes none"),
    ],
)
def test_parameters_that_are_not_understood_are_refused(service: Service, path: str, says: str) -> None:
    response = service.get(path)
    assert_problem(response, 400, "malformed")
    assert says in response.json()["detail"]


def test_parameters_that_are_understood_count(service: Service, job: dict[str, Any]) -> None:
    for path in ("/jobs?limit=1&status=succeeded", "/jobs?label=a:b&label=c:d", "/jobs?limit=100&after=" + "f" * 28):
        assert service.get(path).status_code == 200
    head = f"GET /jobs/{job['id']}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    for value, status in (("0", 200), ("99999", 400), ("-1", 400), ("1\r\nLast-Event-ID: 2", 400), ("\u0661", 400)):
        sent = f"{head}Last-Event-ID: {value}\r\n\r\n".encode()
        assert exchange(service, sent).status == status, value
    tag = service.get(f"/jobs/{job['id']}").headers["ETag"]
    for tags in ([tag], ['"x"', tag], [f'"x", W/{tag}'], ["*"]):
        with service.http as http:
            response = http.get(f"/jobs/{job['id']}", headers=[("If-None-Match", one) for one in tags])
        assert response.status_code == 304, tags
    assert service.get(f"/jobs/{job['id']}", headers={"If-None-Match": tag[1:-1]}).status_code == 200
