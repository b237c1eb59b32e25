from functools import cache

from fastapi import APIRouter, Response

from app.api.strict_route import PublicRoute
from app.contracts.methods import MethodDescription, MethodList
from worker.engine.catalog.methods import AUTO, METHODS

router = APIRouter(tags=["methods"], route_class=PublicRoute)


@router.get("/methods", response_model=MethodList)
def methods() -> Response:
    """List every method: formula, source, needs, values that `auto` tries, and parameters with their JSON Schema."""
    return Response(_listed(), media_type="application/json")


@cache
def _listed() -> bytes:
    """Write the list, once: the schemas of all parameters take a quarter of a second, and anybody may ask for them."""
    entries = (*METHODS.values(), AUTO)
    described = MethodList(data=[MethodDescription.model_validate(entry.describe()) for entry in entries])
    return described.model_dump_json().encode()
