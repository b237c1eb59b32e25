"""Callers say with `Prefer: wait=N` (RFC 7240) how long they like to wait for news."""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Header

LONGEST_WAIT_S = 60  # proxies commonly allow an answer to take so long


async def get_wait(
    prefer: Annotated[list[str] | None, Header(description="`wait=N`: seconds, at most 60; others are ignored")] = None,
) -> int | None:
    return preferred(prefer or ())


def preferred(prefer: Sequence[str]) -> int | None:
    """Return the preferred seconds, or None. Preferences that cannot be honoured are ignored, as the RFC says."""
    for preference in ",".join(prefer).split(","):
        name, _, value = preference.partition(";")[0].partition("=")  # parameters have no meaning here
        if name.strip().lower() == "wait":  # the first counts
            seconds = re.fullmatch(r'"?([0-9]{1,20})"?', value.strip())
            return min(int(seconds[1]), LONGEST_WAIT_S) if seconds else None
    return None


Wait = Annotated[int | None, Depends(get_wait)]


def applied(wait: int | None) -> dict[str, str]:
    """Return the header that says which preference was honoured."""
    return {} if wait is None else {"Preference-Applied": f"wait={wait}"}
