"""Settings that name places with `{tenant}` for a tenant's name and `*` for any text."""

import re
from collections.abc import Sequence

from app.contracts.api_keys import TENANT
from app.contracts.targets import FORMS, Target, compared

PLACEHOLDER = "{tenant}"
PARTS = re.compile(r"\{tenant\}|.", re.DOTALL)
SEPARATORS = "/._"
"""Characters that places may have and no tenant's name has."""


def checked_target(pattern: str) -> str:
    """Return a pattern of targets as it is.

    Raises:
        ValueError: it can match nothing, or what it matches for one tenant may be another's.
    """
    scheme, _, rest = pattern.partition(":")
    if scheme not in FORMS or not rest:
        raise ValueError(
            f"'{pattern}' matches no place; write it as hf:acme/*, s3:models/{PLACEHOLDER}/* or mlflow:prod/*"
        )
    if re.search(r"[?\[\]{}@\s]", rest.replace(PLACEHOLDER, "")):
        raise ValueError(
            f"'{pattern}' matches no place: only * and {PLACEHOLDER} stand for other text, and aliases are free"
        )
    head, found, tail = rest.partition(PLACEHOLDER)
    if found and "*" in head:
        raise ValueError(f"'{pattern}' lets tenants publish at each other's places: no * may come before {PLACEHOLDER}")
    if tail and tail[0] not in SEPARATORS:
        raise ValueError(
            f"'{pattern}' lets tenants publish at each other's places: with acme-eu a tenant's name may go on after "
            f"acme, so end the pattern with {PLACEHOLDER}, or follow it with one of {' '.join(SEPARATORS)}"
        )
    if "*" not in pattern:
        Target.parse(pattern.replace(PLACEHOLDER, "tenant"))
    return pattern


def check_together(patterns: Sequence[str]) -> None:
    """Raise ValueError where one tenant's place by a pattern may be another tenant's by another pattern."""
    heads = {compared(pattern).partition(PLACEHOLDER)[0]: pattern for pattern in patterns if PLACEHOLDER in pattern}
    for shorter, one in heads.items():
        for longer, other in heads.items():
            between = longer.removeprefix(shorter)
            if longer == shorter or not longer.startswith(shorter):
                continue
            start = re.split(r"[/._]", between)[0]
            if re.fullmatch(TENANT, start):
                raise ValueError(
                    f"'{one}' and '{other}' let tenants publish at each other's places: a tenant's name may be or "
                    f"begin with '{start}'; name another place in one of them"
                )


def overlaps(pattern: str, place: str) -> bool:
    """Return whether a place that the pattern names, for any tenant, is the given one, above it or below it.

    Args:
        pattern: `BUCKET/PREFIX`, in which `*` stands for slashes too.
        place: `BUCKET/PREFIX`, without either.
    """
    parts, names = PARTS.findall(pattern.removesuffix("/")), place.split("/")
    is_above = any(_matches(parts, "/".join(names[: count + 1])) for count in range(len(names)))
    return is_above or any(_matches(parts[:count], f"{place}/") for count in range(1, len(parts) + 1))


def _matches(parts: Sequence[str], text: str) -> bool:
    """Return whether some tenant's name and some text make the pattern this text."""
    first, again = f"(?P<tenant>{TENANT.strip('^$')})", "(?P=tenant)"
    found = ""
    for part in parts:
        tenant = again if first in found else first
        found += {PLACEHOLDER: tenant, "*": ".*"}.get(part, re.escape(part))
    return re.fullmatch(found, text) is not None
