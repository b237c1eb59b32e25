"""Bodies larger than allowed are refused before they are read."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOADS = "/uploads/"


def is_upload(scope: Mapping[str, Any]) -> bool:
    """Return whether a request sends bytes of an upload."""
    return bool(scope["method"] == "PUT" and scope["path"].startswith(UPLOADS))


class BodyLimit:
    """Middleware. FastAPI has such a limit too, but it answers in plain text.

    The refusal is raised where the route reads its body, so that it takes the way of every other error. By then the
    route knows its caller, whose tenant may have a limit of its own (`request.state.body_bytes`).

    Args:
        limit_bytes: size of the largest body, except of uploads.
        upload_bytes: size of the largest upload. Its route writes it to the disk as it comes.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, upload_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes
        self._upload = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        announced = int(declared) if declared.isdigit() else 0
        received = 0

        async def limited() -> Message:
            nonlocal received
            own = scope.get("state", {}).get("body_bytes", self._limit)
            limit = self._upload if is_upload(scope) else own
            message: Message = {} if announced > limit else await receive()
            received += len(message.get("body", b""))
            if max(announced, received) > limit:
                raise HTTPException(413, f"the body has more than {limit} bytes")
            return message

        await self._app(scope, limited, send)
