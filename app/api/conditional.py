"""Conditional requests (RFC 9110, section 13)."""

from collections.abc import Mapping

from fastapi import Response


def is_current(if_none_match: str | None, etag: str) -> bool:
    """Whether the caller's copy, by its If-None-Match, is the present one (weak comparison)."""
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def not_modified(etag: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status_code=304, headers={"ETag": etag, "Cache-Control": "no-cache", **(headers or {})})
