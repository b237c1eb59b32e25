"""Conditional requests (RFC 9110, section 13)."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Annotated

from fastapi import Depends, Header, Response

from app.contracts.errors import Problem, ProblemError


class Preconditions:
    """The copies of a resource that a request's headers name, because its sender has or means them."""

    def __init__(
        self,
        if_match: Sequence[str] | None,
        if_none_match: Sequence[str] | None,
        if_unmodified_since: str | None,
        if_modified_since: str | None,
    ) -> None:
        self._meant = _tags(if_match)
        self._known = _tags(if_none_match)
        self._meant_date = _date(if_unmodified_since)
        self._known_date = _date(if_modified_since)

    @property
    def names_known(self) -> bool:
        """Whether the sender says which copies it knows, by their tags."""
        return self._known is not None

    def is_current(self, etag: str, modified: float | None = None) -> bool:
        """Whether the sender has the present copy, so that it need not be sent.

        Args:
            modified: time at which it was made, in seconds since 1970; None where that is not known.

        Raises:
            ProblemError: the sender means another copy.
        """
        self._check(etag, modified)
        if self._known is not None:
            return _names(self._known, etag, is_weak=True)
        return modified is not None and self._known_date is not None and int(modified) <= self._known_date.timestamp()

    def check(self, etag: str) -> None:
        """Check that the sender means the present copy, which is to be changed. Raises ProblemError."""
        self._check(etag, None)
        if self._known is not None and _names(self._known, etag, is_weak=True):
            raise ProblemError(Problem.PRECONDITION_FAILED, f"If-None-Match names what is there: its ETag is {etag}")

    def _check(self, etag: str, modified: float | None) -> None:
        if self._meant is not None:
            if not _names(self._meant, etag, is_weak=False):
                raise ProblemError(Problem.PRECONDITION_FAILED, f"If-Match names others than what is there: {etag}")
        elif modified is not None and self._meant_date is not None and int(modified) > self._meant_date.timestamp():
            raise ProblemError(Problem.PRECONDITION_FAILED, "it was made later than If-Unmodified-Since says")


async def get_preconditions(
    if_match: Annotated[
        list[str] | None, Header(description="ETags of the copies that are meant: 412 when none is the present")
    ] = None,
    if_none_match: Annotated[
        list[str] | None, Header(description="ETags of the copies that are known: 304 when one is the present")
    ] = None,
    if_unmodified_since: Annotated[
        str | None, Header(description="Date of the copy that is meant, of a file; `If-Match` takes precedence")
    ] = None,
    if_modified_since: Annotated[
        str | None,
        Header(description="Date of the copy that is known, of a file; `If-None-Match` takes precedence"),
    ] = None,
) -> Preconditions:
    return Preconditions(if_match, if_none_match, if_unmodified_since, if_modified_since)


PreconditionsOf = Annotated[Preconditions, Depends(get_preconditions)]


def not_modified(etag: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status_code=304, headers={"ETag": etag, "Cache-Control": "no-cache", **(headers or {})})


def _tags(fields: Sequence[str] | None) -> list[str] | None:
    return None if fields is None else [tag.strip() for tag in ",".join(fields).split(",")]


def _names(tags: Sequence[str], etag: str, *, is_weak: bool) -> bool:
    """Return whether a tag among them is the present one. By a strong comparison, a weak tag names nothing."""
    return "*" in tags or etag in ([tag.removeprefix("W/") for tag in tags] if is_weak else tags)


def _date(field: str | None) -> datetime | None:
    """Return a header's date. A header that is no date is ignored: None."""
    try:
        found = parsedate_to_datetime(field) if field is not None else None
    except (ValueError, OverflowError):
        return None
    return found if found is None or found.tzinfo is not None else None
