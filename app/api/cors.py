"""Lets pages of named origins call the service from a browser (the Fetch standard's CORS protocol).

Such a page sends its API key in `Authorization` as every other caller does. Cookies mean nothing here, so credentials,
which browsers would add by themselves, are not allowed.
"""

from collections.abc import Collection

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.contracts.errors import MEDIA_TYPE, Problem, ProblemError
from app.observability.context import request_id

METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
EXPOSED = (
    "Accept-Ranges", "Content-Disposition", "Content-Range", "ETag", "Location", "Preference-Applied", "RateLimit",
    "RateLimit-Policy", "Repr-Digest", "Retry-After", "WWW-Authenticate", "X-Request-ID",
)  # fmt: skip
"""Headers of answers that a page may read beside those that it always may."""


class Cors(CORSMiddleware):
    """Middleware. A page may call a service in a private network too, because its origin is named.

    Args:
        origins: origins as browsers write them.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # whatever the page asks for: what a header means is checked where it is read
            allow_private_network=True,
            expose_headers=EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer whether a page may send a request. A refusal is a problem document, not the plain text that it was."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        if self.is_allowed_origin(origin):
            detail = f"no route takes {method[:20]}; pages may send {', '.join(METHODS)}"
        else:
            detail = f"MASKMERGE_CORS_ORIGINS does not name the origin '{origin[:100]}'"
        error = ProblemError(Problem.FOREIGN_ORIGIN, detail)
        return JSONResponse(
            error.body("", request_id() or ""), error.problem.status, {"Vary": response.headers["vary"]}, MEDIA_TYPE
        )
