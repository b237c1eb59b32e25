import pytest

from app.api.prefer import applied, preferred


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        (["wait=10"], 10),
        (["wait=0"], 0),
        (["Wait = 10"], 10),
        (['wait="10"'], 10),
        (["respond-async, wait=10; why=not"], 10),
        (["handling=lenient", "wait=10"], 10),
        (["wait=10, wait=20"], 10),
        (["wait=600"], 60),
        (["wait=99999999999999"], 60),
    ],
)
def test_the_wait_is_read_as_rfc_7240_writes_it_and_capped_at_60_s(lines: list[str], seconds: int) -> None:
    assert preferred(lines) == seconds
    assert applied(seconds) == {"Preference-Applied": f"wait={seconds}"}


@pytest.mark.parametrize(
    "line", ["", "respond-async", "wait", "wait=", "wait=soon", "wait=-1", "wait=1.5", "waiting=5", "wait=٣", "=,;="]
)
def test_what_cannot_be_honoured_is_ignored(line: str) -> None:
    assert preferred([line]) is None
    assert preferred([]) is None
    assert applied(None) == {}
