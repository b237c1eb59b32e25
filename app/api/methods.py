from typing import Any

from fastapi import APIRouter

from app.api.strict_route import PublicRoute
from worker.engine.catalog.methods import AUTO, METHODS

router = APIRouter(tags=["methods"], route_class=PublicRoute)


@router.get("/methods")
def methods() -> dict[str, list[dict[str, Any]]]:
    """List every method: formula, source, needs, values that `auto` tries, and parameters with their JSON Schema."""
    return {"data": [entry.describe() for entry in (*METHODS.values(), AUTO)]}
