"""How many requests a tenant may send, and how many without a valid key an address may.

The fields of answers are those of draft-ietf-httpapi-ratelimit-headers: `RateLimit-Policy` says the limit, `RateLimit`
how much of it is left.
"""

from ipaddress import IPv6Address

from fastapi import Request

from app.contracts.addresses import plain_address
from app.contracts.api_keys import Caller
from app.contracts.errors import Problem, ProblemError
from app.services.composition import Services
from app.storage.rates import Turn

WINDOW_S = 60
SITE_BITS = 64  # of an IPv6 address, those that one customer has: it is counted as one


def take_turn(services: Services, caller: Caller) -> dict[str, str]:
    """Count a request of the caller's tenant, and return the fields that its answer has. It asks Redis, and may block.

    Raises ProblemError where it is one too many.
    """
    most = services.limits.of(caller.tenant).requests_per_minute
    if most is None:
        return {}
    turn = services.rates.take(f"tenant:{caller.tenant}", most)
    if not turn.allowed:
        detail = f"the tenant may send {most} requests a minute, and has sent as many"
        raise _refused(detail, "requests", most, turn)
    return _fields("requests", most, turn)


def count_failure(services: Services, request: Request) -> None:
    """Count a request without a valid key. It asks Redis, and may block.

    Raises ProblemError where its address has sent too many of them.
    """
    most = services.settings.max_failed_keys_per_minute
    turn = services.rates.take(f"address:{_site(request)}", most)
    if not turn.allowed:
        detail = f"this address has sent {most} requests without a valid API key within a minute"
        raise _refused(detail, "failed-keys", most, turn)


def _refused(detail: str, policy: str, most: int, turn: Turn) -> ProblemError:
    wait = max(1, turn.next_s)
    fields = {"Retry-After": str(wait), **_fields(policy, most, turn)}
    return ProblemError(Problem.RATE_LIMITED, f"{detail}; try again in {wait} s", None, **fields)


def _fields(policy: str, most: int, turn: Turn) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"{policy}";q={most};w={WINDOW_S}',
        "RateLimit": f'"{policy}";r={turn.left};t={turn.full_s if turn.left else max(1, turn.next_s)}',
    }


def _site(request: Request) -> str:
    """Return the address that a request comes from, of IPv6 the part that one customer has."""
    text = "" if request.client is None else request.client.host
    address = plain_address(text)
    if address is None:
        return text
    return str(IPv6Address(int(address) >> SITE_BITS << SITE_BITS) if isinstance(address, IPv6Address) else address)
