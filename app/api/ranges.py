"""Byte ranges (RFC 9110, section 14)."""

import re

from starlette.datastructures import Headers

from app.contracts.errors import Problem, ProblemError

MOST_RANGES = 100  # more than a reader of a file's parts asks for at once
RANGE = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)")
LONGEST_DIGITS = 18  # more than any file has bytes; beyond thousands, Python refuses to read a number


def wanted_ranges(headers: Headers, size: int, etag: str) -> list[tuple[int, int]] | None:
    """Return the (first, last) bytes that are asked for and are there; None when the whole file is to be sent.

    A unit that is not known is ignored, and so are more ranges than `MOST_RANGES`, several Range headers, and ranges of
    another version of the file, which `If-Range` names. A date there names none, since the file has a tag.

    Raises ProblemError: the ranges are malformed, or all of them lie outside the file.
    """
    given = headers.getlist("range")
    if len(given) != 1 or headers.get("if-range", etag) != etag:
        return None
    unit, equals, ranges = given[0].partition("=")
    if equals and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", unit) and unit.lower() != "bytes":
        return None
    parts = [part.strip(" \t") for part in ranges.split(",")]
    found = [RANGE.fullmatch(part) for part in parts if part]
    if unit.lower() != "bytes" or not found or None in found:
        raise ProblemError(Problem.MALFORMED, "the Range header is malformed; write bytes=FIRST-LAST, in digits alone")
    bounds = [_bounds(match, size) for match in found if match is not None]
    if len(bounds) > MOST_RANGES:
        return None
    present = [(first, last) for first, last in bounds if first <= last and first < size]
    if not present:
        message = f"the file has {size} bytes"
        raise ProblemError(Problem.RANGE_NOT_SATISFIABLE, message, None, **{"Content-Range": f"bytes */{size}"})
    return present


def _bounds(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return the first and last byte within the file. Raises ProblemError when the last is before the first."""
    first, last, suffix = (None if text in (None, "") else _number(text) for text in match.groups())
    if suffix is not None:
        return (max(size - suffix, 0), size - 1) if suffix else (size, size - 1)
    assert first is not None  # noqa: S101 - for the type checker; the expression has it or a suffix
    if last is not None and last < first:
        raise ProblemError(Problem.MALFORMED, "the Range header asks for a range that ends before it begins")
    return first, size - 1 if last is None else min(last, size - 1)


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= LONGEST_DIGITS else 10**LONGEST_DIGITS
