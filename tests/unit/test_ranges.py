"""Byte ranges: what is sent, what is ignored and what is refused."""

import pytest
from starlette.datastructures import Headers

from app.api.ranges import MOST_RANGES, wanted_ranges
from app.contracts.errors import Problem, ProblemError

TAG = '"abc"'
Ranges = list[tuple[int, int]]


def wanted(value: str, size: int = 10, **more: str) -> Ranges | None:
    headers = {"range": value, **{name.replace("_", "-"): text for name, text in more.items()}}
    return wanted_ranges(Headers(headers), size, TAG)


@pytest.mark.parametrize(
    ("value", "ranges"),
    [
        ("bytes=0-0", [(0, 0)]),
        ("bytes=2-5", [(2, 5)]),
        ("BYTES=2-5", [(2, 5)]),
        ("bytes=2-", [(2, 9)]),
        ("bytes=-3", [(7, 9)]),
        ("bytes=-99", [(0, 9)]),
        ("bytes=8-99", [(8, 9)]),
        ("bytes=0-" + "9" * 5000, [(0, 9)]),
        ("bytes=" + "0" * 5000 + "2-3", [(2, 3)]),
        ("bytes=0-1, 4-5 ,\t8-", [(0, 1), (4, 5), (8, 9)]),
        ("bytes=,0-1,,", [(0, 1)]),
        ("bytes=0-1,50-60,-0", [(0, 1)]),  # those outside are left out where others are not
        ("bytes=5-6,1-2", [(5, 6), (1, 2)]),
    ],
)
def test_ranges_that_are_sent(value: str, ranges: Ranges) -> None:
    assert wanted(value) == ranges


@pytest.mark.parametrize("value", ["items=0-5", "seconds=1-2,3-4", "x-unit=anything", "bytes=" + "0-1," * 101 + "0-1"])
def test_other_units_and_very_many_ranges_are_ignored(value: str) -> None:
    assert wanted(value) is None
    assert value.count(",") < MOST_RANGES or value.startswith("bytes")


@pytest.mark.parametrize(
    "value",
    [
        "bytes", "bytes=", "bytes=,", "bytes=-", "bytes=x-y", "bytes=1", "bytes=+1-2", "bytes=1-+2", "bytes= 1 - 2",
        "bytes=1_0-2_0", "bytes=1-2_0", "bytes=0x1-2", "bytes=1.0-2", "bytes=1e0-2", "bytes=\u00b2-\u00b3", "bytes=--1",
        "bytes=-+1", "bytes=5-2", "bytes=0-1,5-2", "bytes=0-1;2-3", "bytes=0-1,x", "bytes =0-1", "0-5", "=0-5", "",
        "bytes=\n1-2",
    ],
)  # fmt: skip
def test_ranges_in_other_than_digits_are_refused(value: str) -> None:
    with pytest.raises(ProblemError) as refused:
        wanted(value)
    assert refused.value.problem is Problem.MALFORMED


@pytest.mark.parametrize("value", ["bytes=10-", "bytes=10-20,30-", "bytes=-0", "bytes=" + "9" * 5000 + "-"])
def test_ranges_that_all_lie_outside_are_refused_with_the_size(value: str) -> None:
    with pytest.raises(ProblemError) as refused:
        wanted(value)
    assert refused.value.problem is Problem.RANGE_NOT_SATISFIABLE
    assert refused.value.headers == {"Content-Range": "bytes */10"}


def test_nothing_of_an_empty_file_can_be_had() -> None:
    for value in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        with pytest.raises(ProblemError, match="0 bytes"):
            wanted(value, size=0)


@pytest.mark.parametrize("tag", ['"other"', 'W/"abc"', "abc", "", "Sun, 29 Nov 2026 00:00:00 GMT", '"abc", "abc"'])
def test_ranges_of_another_version_are_ignored_whether_there_or_not(tag: str) -> None:
    assert wanted("bytes=2-5", if_range=tag) is None
    assert wanted("bytes=99-", if_range=tag) is None
    assert wanted("bytes=2-5", if_range=TAG) == [(2, 5)]


def test_several_range_headers_are_ignored() -> None:
    raw = [(b"range", b"bytes=0-1"), (b"range", b"bytes=2-3")]
    assert wanted_ranges(Headers(raw=raw), 10, TAG) is None
    assert wanted_ranges(Headers(), 10, TAG) is None
