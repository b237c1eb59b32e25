"""`/docs` shows the OpenAPI document as a page. Its files come from here; FastAPI's page loads them from elsewhere."""

import hashlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from app.api.conditional import PreconditionsOf
from app.api.files import held_open, serve
from app.api.strict_route import PublicRoute
from app.contracts.errors import Problem, ProblemError
from app.storage.files import LocalFile

router = APIRouter(route_class=PublicRoute, include_in_schema=False)

STATIC = Path(str(files("fastapi_offline"))) / "static"  # Swagger UI; nothing else of the package is used
SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});'
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>maskmerge: the API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>{SCRIPT}</script>
</body>
</html>
"""
POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def _stored(name: str) -> LocalFile:
    content = (STATIC / name).read_bytes()
    return LocalFile(name, len(content), hashlib.sha256(content).hexdigest(), STATIC / name)


PARTS = {name: _stored(name) for name in ("swagger-ui.css", "swagger-ui-bundle.js")}


@router.get("/openapi.json")
def document(request: Request) -> Response:
    """A thread answers, as it does all routes that are no coroutines: FastAPI's own route writes the document in the
    event loop, for a second the first time, and nobody else is answered meanwhile."""
    return Response(request.app.written(), media_type="application/json")


@router.get("/docs", response_class=HTMLResponse)
def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})


@router.get("/docs/{name}")
def part(name: str, preconditions: PreconditionsOf) -> Response:
    if name not in PARTS:
        raise ProblemError(Problem.NOT_FOUND, f"the page has no part '{name}'")
    return serve(*held_open(PARTS[name]), preconditions, "inline")
