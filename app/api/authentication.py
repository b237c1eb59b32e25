"""Tells who sends a request, by its API key, before anything else of it is read.

While no key was ever made, callers on this machine may do everything, and nobody else anything.
"""

import re
from collections.abc import Callable

from fastapi import Request

from app.api.rate_limits import count_failure, take_turn
from app.contracts.addresses import is_loopback
from app.contracts.api_keys import Caller, Scope
from app.contracts.errors import Problem, ProblemError
from app.storage.api_keys import ApiKeys, KeyRefused

BEARER = re.compile(r"bearer +([!-~]+) *", re.IGNORECASE)
FindCaller = Callable[[Request, ApiKeys], Caller]
"""Returns who sends a request, by what it has sent. Raises ProblemError."""
HOW = "send the header Authorization: Bearer mm_…"


def authenticate(request: Request, needed: Scope, find: FindCaller | None = None) -> None:
    """Find out who sends a request. It asks Redis, and may block.

    `request.state` then has the caller, and the fields of the answer that say how many requests may follow.

    Args:
        find: finds the caller; by default by the API key in the header Authorization.

    Raises:
        ProblemError: the key is missing, unknown, expired or revoked, or does not allow what the request needs; or
            there are too many requests.
    """
    services = request.app.state.services
    try:
        caller = (find or caller_by_key)(request, services.api_keys)
    except ProblemError:
        count_failure(services, request)
        raise
    request.state.caller = caller
    request.state.rate_limit = take_turn(services, caller)
    if not caller.may(needed):
        detail = f"this needs a key with the scope {needed}, and the key has {', '.join(sorted(caller.scopes))}"
        challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
        raise ProblemError(Problem.INSUFFICIENT_SCOPE, detail, None, **{"WWW-Authenticate": challenge})


def caller_by_key(request: Request, keys: ApiKeys) -> Caller:
    """Return who sends a request, by its API key; while there are none, this machine alone. Raises ProblemError."""
    sent = request.headers.getlist("authorization")
    if not sent:
        if keys.exist():
            raise unauthenticated(f"the request has no API key; {HOW}")
        if request.client is None or not is_loopback(request.client.host):
            raise unauthenticated(
                "without API keys the service answers this machine alone; make one with `maskmerge keys create`"
            )
        return Caller()
    found = BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
    if found is None:
        raise unauthenticated(f"the header Authorization names no API key; {HOW}, once")
    try:
        return keys.caller(found[1])
    except KeyRefused as error:
        raise unauthenticated(str(error), ' error="invalid_token"') from error


def unauthenticated(detail: str, more: str = "") -> ProblemError:
    return ProblemError(Problem.UNAUTHENTICATED, detail, None, **{"WWW-Authenticate": f"Bearer{more}"})
