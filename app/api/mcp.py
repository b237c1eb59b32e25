"""`/mcp` offers the service to agents as tools, by the Model Context Protocol (streamable HTTP, without sessions).

The protocol's SDK is an optional extra. It is loaded with the first request, because that takes a second.
"""

from functools import cache
from importlib.util import find_spec

from anyio.to_thread import run_sync
from fastapi import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from app.api.authentication import authenticate
from app.contracts.api_keys import Scope
from app.contracts.errors import Problem, ProblemError

MISSING = "this service has no tools for agents; to add them, run pip install 'maskmerge[mcp]' where it runs"


class Tools:
    """Answers the protocol's requests. Each is authenticated as one of any other route, and may read."""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if find_spec("mcp") is None:
            raise ProblemError(Problem.NOT_FOUND, MISSING)
        request = Request(scope, receive)
        await run_sync(authenticate, request, Scope.READ)
        body = await request.body()  # here, so that one that is too large is refused as everywhere
        answered = await run_sync(_answered)

        read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await answered(scope, again, send)


@cache
def _answered() -> ASGIApp:
    from app.api.mcp_tools import answer

    return answer


route = Route("/mcp", Tools(), methods=["POST"], include_in_schema=False)
"""Not part of the OpenAPI document, because the protocol describes its requests itself."""
