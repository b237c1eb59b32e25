from fastapi import APIRouter

from app.api.strict_route import PublicRoute
from app.contracts.methods import MethodDescription, MethodList
from worker.engine.catalog.methods import AUTO, METHODS

router = APIRouter(tags=["methods"], route_class=PublicRoute)


@router.get("/methods")
def methods() -> MethodList:
    """List every method: formula, source, needs, values that `auto` tries, and parameters with their JSON Schema."""
    entries = (*METHODS.values(), AUTO)
    return MethodList(data=[MethodDescription.model_validate(entry.describe()) for entry in entries])
