"""Conditional requests (RFC 9110, section 13)."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Header, Response

IfNoneMatch = Annotated[
    list[str] | None, Header(description="ETags of the copies that are known: 304 when one is the present")
]


def is_current(if_none_match: Sequence[str] | None, etag: str) -> bool:
    """Whether one of the caller's copies, by its If-None-Match, is the present one (weak comparison)."""
    tags = [tag.strip().removeprefix("W/") for tag in ",".join(if_none_match or ()).split(",")]
    return "*" in tags or etag in tags


def not_modified(etag: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status_code=304, headers={"ETag": etag, "Cache-Control": "no-cache", **(headers or {})})
