"""The tools that agents call. Each is a request to the API, with the agent's own key.

So scopes, tenants, limits, checks and the words of refusals are those of the routes, and none is written down twice.
"""

import json
import logging
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_types import ToolAnnotations
from pydantic import Field
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.api.examples import RECIPE
from app.api.prefer import LONGEST_WAIT_S

logging.getLogger("mcp").setLevel(logging.WARNING)  # it tells of every request, twice

INSTRUCTIONS = """Merges fine-tuned language models. Call `methods` for the merge methods and their parameters, write a
recipe, `validate` it, and `submit` it. Then ask for the `status` of the job until it has ended, and for its `result`.
Models and rows are named by references: `local:PATH` in a folder of the service, `hf:ORG/NAME`, or `job:ID/MODEL` for
the model of an earlier job."""
STATE = ("id", "name", "status", "attempt", "progress", "error", "created_at", "started_at", "finished_at")
RESULT = ("accepted", "mean_retention", "min_retention", "metrics", "method", "notes", "timings")
CANDIDATE = ("name", "mean_retention", "min_retention", "chosen")

Recipe = Annotated[
    dict[str, Any],
    Field(
        description="What to merge, and how: the body of `POST /merge`. Only method.name and each model's name and "
        "checkpoint are always needed; what else a method needs, `methods` and `validate` say. Example: "
        + json.dumps(RECIPE)
    ),
]
JobId = Annotated[str, Field(description="The job's id, as `submit` returns it.")]
Key = Annotated[
    str | None,
    Field(
        description="Your own name for the job, of letters, digits, '.', '_' and '-'. With one, a call that is "
        "repeated because its answer was lost makes no second job."
    ),
]
Wait = Annotated[
    int,
    Field(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for news of a job that has not ended; 0: do not wait."),
]

Ctx = Context[Any, Request]
tools = MCPServer("maskmerge", instructions=INSTRUCTIONS)
reading = ToolAnnotations(read_only_hint=True, open_world_hint=False)


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request. A manager of sessions serves it alone: without sessions there is nothing to keep."""
    manager = StreamableHTTPSessionManager(tools._lowlevel_server, json_response=True, stateless=True)
    async with manager.run():
        await manager.handle_request(scope, receive, send)


@tools.tool(annotations=reading)
async def methods(ctx: Ctx) -> dict[str, Any]:
    """List the merge methods: what each computes, which data it needs, and its parameters as JSON Schema."""
    return await _asked(ctx, "GET", "/methods")


@tools.tool(annotations=reading)
async def validate(recipe: Recipe, ctx: Ctx) -> dict[str, Any]:
    """Check a recipe and its inputs, and tell what the job would do and take. Nothing is queued. Needs a key that may
    write."""
    return await _asked(ctx, "POST", "/merge/validate", recipe)


@tools.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=True))
async def submit(recipe: Recipe, ctx: Ctx, key: Key = None) -> dict[str, Any]:
    """Queue a merge, and return its job. Needs a key that may write."""
    if key is None:
        return _state(await _asked(ctx, "POST", "/merge", recipe))
    return _state(await _asked(ctx, "PUT", f"/merge/{_part(key)}", recipe))


@tools.tool(annotations=reading)
async def status(job_id: JobId, ctx: Ctx, wait_seconds: Wait = 0) -> dict[str, Any]:
    """Tell how far a job is. It has ended when its status is succeeded, failed or cancelled."""
    return _state(await _asked(ctx, "GET", _job(job_id), wait_seconds=wait_seconds))


@tools.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True))
async def cancel(job_id: JobId, ctx: Ctx) -> dict[str, Any]:
    """Cancel a job that has not ended: at once while it waits, within 5 seconds while it runs. Needs a key that may
    write."""
    return _state(await _asked(ctx, "POST", f"{_job(job_id)}/cancel"))


@tools.tool(annotations=reading)
async def result(job_id: JobId, ctx: Ctx) -> dict[str, Any]:
    """Summarise what a job that succeeded has found and made: metrics of each model against expert and average, and
    the files of the artifact, to be fetched over HTTP with the same key."""
    job = await _asked(ctx, "GET", _job(job_id))
    if job["error"] is not None:
        raise ToolError(f"job {job_id} has failed: {job['error']['code']}: {job['error']['message']}")
    if job["result"] is None:
        raise ToolError(f"job {job_id} is {job['status']}; its result comes with success")
    found = {name: job["result"][name] for name in RESULT if name in job["result"]}
    if job["result"].get("candidates"):
        found["candidates"] = [{name: one[name] for name in CANDIDATE} for one in job["result"]["candidates"]]
    listing = await _asked(ctx, "GET", f"{_job(job_id)}/artifacts") if job["kind"] == "merge" else {}
    return {**_state(job), **found, **listing, "report": job["links"]["report"]}


def _job(job_id: str) -> str:
    return f"/jobs/{_part(job_id)}"


def _part(text: str) -> str:
    """Return one part of a path; `.` and `..` are written so that httpx takes them for no steps between folders."""
    return quote(text, safe="").replace(".", "%2E")


def _state(job: dict[str, Any]) -> dict[str, Any]:
    return {name: job[name] for name in STATE}


async def _asked(
    ctx: Ctx, method: str, path: str, recipe: dict[str, Any] | None = None, wait_seconds: int = 0
) -> dict[str, Any]:
    """Send the API a request with the key and from the address of who called the tool. Raises ToolError: refused."""
    sent = ctx.request_context.request
    if sent is None:
        raise RuntimeError("a tool was called without a request")
    headers = {"Prefer": f"wait={wait_seconds}"} if wait_seconds else {}
    content = None
    if recipe is not None:  # `json` of httpx raises for what JSON has not, such as NaN, which is for the API to refuse
        content, headers["Content-Type"] = json.dumps(recipe), "application/json"
    if "authorization" in sent.headers:
        headers["Authorization"] = sent.headers["authorization"]
    address = (sent.client.host, sent.client.port) if sent.client else ("unknown", 0)
    transport = httpx.ASGITransport(sent.app, raise_app_exceptions=False, client=address)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
        response = await api.request(method, path, headers=headers, content=content)
    said: dict[str, Any] = response.json()
    if response.is_error:
        raise ToolError(f"{said['code']}: {said['detail']}")
    return said
