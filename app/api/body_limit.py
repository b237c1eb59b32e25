"""Bodies larger than allowed are refused before they are read."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware. FastAPI has such a limit too, but it answers in plain text.

    The refusal is raised where the route reads its body, so that it takes the way of every other error.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        too_large = declared.isdigit() and int(declared) > self._limit
        received = 0

        async def limited() -> Message:
            nonlocal received
            message: Message = {} if too_large else await receive()
            received += len(message.get("body", b""))
            if too_large or received > self._limit:
                raise HTTPException(413, f"the body has more than {self._limit} bytes")
            return message

        await self._app(scope, limited, send)
