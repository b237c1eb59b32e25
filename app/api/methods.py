from typing import Any

from fastapi import APIRouter

from worker.engine.catalog.methods import METHODS

router = APIRouter(tags=["methods"])


@router.get("/methods")
def methods() -> dict[str, list[dict[str, Any]]]:
    """Every method: its formula, source, what it needs, and its parameters as JSON Schema with defaults."""
    return {"data": [entry.describe() for entry in METHODS.values()]}
