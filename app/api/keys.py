from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response

from app.api.dependencies import ServicesOf
from app.api.strict_route import StrictRoute
from app.contracts.api_keys import CreatedKey, KeyList, NewKey, Scope
from app.contracts.errors import Problem, ProblemError


class AdminRoute(StrictRoute):
    """A route for the scope `admin`, whatever its method."""

    scope = Scope.ADMIN


router = APIRouter(tags=["keys"], route_class=AdminRoute)

EXAMPLES: dict[str, Any] = {
    "a pipeline's": {"value": {"name": "nightly merges", "tenant": "search", "scopes": ["write"]}},
    "for a few days": {"value": {"name": "a visitor", "scopes": ["read"], "expires_at": "2030-01-31T00:00:00Z"}},
}
KeyId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="A key's id")]


@router.post("/keys", status_code=201)
def create_key(
    body: Annotated[NewKey, Body(openapi_examples=EXAMPLES)], response: Response, services: ServicesOf
) -> CreatedKey:
    """Make an API key. Its secret is in this answer, and nowhere else: the service keeps its digest."""
    response.headers["Cache-Control"] = "no-store"
    return services.api_keys.create(body)


@router.get("/keys")
def list_keys(services: ServicesOf) -> KeyList:
    """List the keys of all tenants, oldest first, with those that were revoked."""
    return KeyList(data=list(services.api_keys.all()))


@router.delete("/keys/{key_id}", status_code=204)
def revoke_key(key_id: KeyId, services: ServicesOf) -> None:
    """Revoke a key: it is refused from now on. It stays in the list."""
    if not services.api_keys.revoke(key_id):
        raise ProblemError(Problem.NOT_FOUND, f"there is no key {key_id}")
