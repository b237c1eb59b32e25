"""The tools for agents: the SDK's own client, at the real server with a real Redis and inspector."""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent
from redis import Redis

from app.api import mcp as door
from app.contracts.api_keys import DEFAULT_TENANT, NewKey
from app.contracts.settings import Settings
from app.server import Server
from app.storage.api_keys import ApiKeys
from app.storage.jobs import JobStore
from tests.conftest import HANGS_S, REPOSITORY, RESULT, assert_problem, free_port, tiny_recipe, wait_until

T = TypeVar("T")
TOOLS = {"methods", "validate", "submit", "status", "cancel", "result"}
ACCEPT = {"Accept": "application/json, text/event-stream"}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}


@pytest.fixture(scope="module")
def url(redis_url: str, tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[str]:
    """A server in a thread of this process. Its Redis is emptied between tests."""
    port, data = free_port(), tmp_path_factory.mktemp("mcp")
    server = Server(
        Settings.model_validate(
            {"redis_url": redis_url, "queue": "mcp", "data_dir": data, "port": port, "local_roots": (tiny_inputs,)}
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the server to listen")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(HANGS_S)


@pytest.fixture
def keys(redis: Redis) -> ApiKeys:
    return ApiKeys(redis, "mcp")


def key(keys: ApiKeys, scope: str = "write", tenant: str = DEFAULT_TENANT) -> str:
    return keys.create(NewKey.model_validate({"scopes": [scope], "tenant": tenant})).key


def as_agent(url: str, api_key: str | None, act: Callable[[Client], Awaitable[T]], mode: str = "auto") -> T:
    """What an agent gets that calls tools with this key."""

    async def acting() -> T:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=HANGS_S) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client,
        ):
            return await act(client)

    return asyncio.run(acting())


def called(url: str, api_key: str | None, tool: str, mode: str = "auto", **arguments: Any) -> Any:
    """The tool's answer: what it returns, or, where it refuses, its text."""

    async def act(client: Client) -> CallToolResult:
        return await client.call_tool(tool, arguments)

    found = as_agent(url, api_key, act, mode)
    (content,) = found.content
    assert isinstance(content, TextContent)
    return content.text.removeprefix(f"Error executing tool {tool}: ") if found.is_error else found.structured_content


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_agent_merges_from_the_list_of_methods_to_the_end(url: str, keys: ApiKeys, redis: Redis, mode: str) -> None:
    mine = key(keys)
    assert "mask_fisher" in {method["name"] for method in called(url, mine, "methods", mode)["data"]}
    recipe = tiny_recipe("a", "b")
    assert called(url, mine, "validate", mode, recipe=recipe)["tensors"] > 10
    job = called(url, mine, "submit", mode, recipe=recipe, key="nightly")
    assert called(url, mine, "submit", mode, recipe=recipe, key="nightly")["id"] == job["id"]
    assert called(url, mine, "status", mode, job_id=job["id"])["status"] == "queued"
    assert "is queued" in called(url, mine, "result", mode, job_id=job["id"])
    assert called(url, mine, "cancel", mode, job_id=job["id"])["status"] == "cancelled"
    posted = called(url, mine, "submit", mode, recipe=recipe)
    assert posted["id"] != job["id"]
    store = JobStore(redis, "mcp", lease_seconds=10, max_losses=3)
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    store.tasks.succeed(attempt, RESULT, "gone")
    assert called(url, mine, "status", mode, job_id=posted["id"], wait_seconds=1)["status"] == "succeeded"
    assert "conflict" in called(url, mine, "cancel", mode, job_id=posted["id"])


def test_every_tool_and_parameter_is_described(url: str, keys: ApiKeys) -> None:
    async def act(client: Client) -> Any:
        return (await client.list_tools()).tools

    tools = as_agent(url, key(keys, "read"), act)
    assert {tool.name for tool in tools} == TOOLS
    for tool in tools:
        assert tool.description
        assert tool.annotations is not None
        for name, parameter in tool.input_schema["properties"].items():
            assert parameter["description"], (tool.name, name)
    assert len(json.dumps([tool.model_dump(mode="json") for tool in tools])) < 12_000, "agents read all of it"


def test_a_refusal_is_the_tools_error_in_the_words_of_the_api(url: str, keys: ApiKeys) -> None:
    mine, recipe = key(keys), tiny_recipe("a", "b")
    recipe["method"] = {"name": "mask_fisher", "example": 5}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {mine}"}) as http:
        problem = http.post("/merge", json=recipe).json()
    assert called(url, mine, "submit", recipe=recipe) == f"invalid_request: {problem['detail']}"
    assert "examples" in problem["detail"]
    assert called(url, mine, "status", job_id="0" * 28) == f"not_found: there is no job {'0' * 28}"
    for job_id in (".", "..", "../keys", "x/../../keys", "", "0" * 27, "%2e%2e/keys"):
        assert called(url, mine, "status", job_id=job_id).startswith("not_found: "), job_id
    assert "wait_seconds" in called(url, mine, "status", job_id="0" * 28, wait_seconds=3600)
    assert "not_found" in called(url, mine, "submit", recipe=tiny_recipe("a", "b"), key="../keys")
    assert called(url, mine, "submit", recipe=tiny_recipe("a", "b"), key="..") == "not_found: there is no /merge/.."


def test_a_recipe_with_what_json_has_not_is_refused_as_everywhere(url: str, keys: ApiKeys) -> None:
    call = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"%s","arguments":{"recipe":{"name":NaN}}}}'
    with httpx.Client(base_url=url, headers={**ACCEPT, "Authorization": f"Bearer {key(keys)}"}) as http:
        for tool in ("submit", "validate"):
            headers = {"Content-Type": "application/json", "MCP-Protocol-Version": "2025-06-18"}
            answer = http.post("/mcp", content=call % tool, headers=headers).json()["result"]
            assert answer["isError"]
            assert answer["content"][0]["text"].startswith(f"Error executing tool {tool}: malformed: ")


def test_keys_scopes_and_tenants_hold_for_tools(url: str, keys: ApiKeys) -> None:
    writer, reader, stranger = key(keys), key(keys, "read"), key(keys, tenant="others")
    recipe = tiny_recipe("a", "b")
    job_id = called(url, writer, "submit", recipe=recipe)["id"]
    assert called(url, reader, "status", job_id=job_id)["status"] == "queued"
    for tool, arguments in (
        ("submit", {"recipe": recipe}),
        ("validate", {"recipe": recipe}),
        ("cancel", {"job_id": job_id}),
    ):
        assert called(url, reader, tool, **arguments).startswith(
            "insufficient_scope: this needs a key with the scope write"
        )
    for tool in ("status", "cancel", "result"):
        assert called(url, stranger, tool, job_id=job_id) == f"not_found: there is no job {job_id}"
    assert called(url, writer, "status", job_id=job_id)["status"] == "queued"


def test_no_request_is_answered_without_a_key_once_there_are_keys(url: str, keys: ApiKeys) -> None:
    def posted(**headers: str) -> httpx.Response:
        return httpx.post(f"{url}/mcp", json=LIST, headers={**ACCEPT, **headers})

    assert posted().status_code == 200
    proxied = posted(**{"X-Forwarded-For": "127.0.0.1"})
    assert_problem(proxied, 401, "unauthenticated")
    mine = key(keys)
    for headers in ({}, {"Authorization": "Bearer mm_x"}, {"Mcp-Session-Id": "guessed"}):
        assert_problem(posted(**headers), 401, "unauthenticated")
        assert posted(**headers).headers["WWW-Authenticate"].startswith("Bearer")
    allowed = {"Authorization": f"Bearer {mine}"}
    assert posted(**allowed).status_code == 200
    assert_problem(posted(**allowed, Origin="https://evil.example"), 403, "foreign_origin")
    assert_problem(posted(**allowed, Host="evil.example"), 421, "unknown_host")
    large = httpx.post(f"{url}/mcp", content=b" " * 1_000_001, headers={**ACCEPT, **allowed})
    assert_problem(large, 413, "too_large")
    for method in ("GET", "DELETE"):
        refused = httpx.request(method, f"{url}/mcp", headers={**ACCEPT, **allowed})
        assert_problem(refused, 405, "method_not_allowed")
        assert refused.headers["Allow"] == "POST"


def test_a_service_without_the_extra_says_how_to_add_it(
    url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    response = httpx.post(f"{url}/mcp", json=LIST, headers=ACCEPT)
    assert_problem(response, 404, "not_found")
    assert "pip install 'maskmerge[mcp]'" in response.json()["detail"]


def test_the_example_of_the_documentation_runs(url: str, keys: ApiKeys, capsys: pytest.CaptureFixture[str]) -> None:
    page = (REPOSITORY / "docs" / "mcp.md").read_text()
    (configuration,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (server,) = json.loads(configuration)["mcpServers"].values()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    mine = key(keys)
    headers = {name: value.replace("${MASKMERGE_API_KEY}", mine) for name, value in server["headers"].items()}
    assert server["url"].endswith("/mcp")
    assert httpx.post(f"{url}/mcp", json=LIST, headers={**ACCEPT, **headers}).status_code == 200
    assert server["url"] in code
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKMERGE_API_KEY", mine)
        exec(code.replace(server["url"], f"{url}/mcp"), namespace)  # noqa: S102 - the page's own code
    assert "mask_fisher" in capsys.readouterr().out
