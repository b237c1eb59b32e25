"""The journal of a search, from one attempt of a job to the next."""

from pathlib import Path

import pytest

from app.contracts.jobs import Attempt, Stage, TaskId
from app.storage.searches import SearchFolder


def attempt(number: int, job: str = "a") -> Attempt:
    return Attempt(task=TaskId(job=job, stage=Stage.MERGE), number=number)


def names(data_dir: Path) -> list[str]:
    return sorted(file.name for file in (data_dir / "searches").iterdir())


@pytest.fixture
def searches(tmp_path: Path) -> SearchFolder:
    return SearchFolder(tmp_path)


def test_an_attempt_goes_on_where_the_last_one_was(searches: SearchFolder, tmp_path: Path) -> None:
    searches.begin(attempt(9)).write_text("one\n")
    path = searches.begin(attempt(10))
    assert path.read_text() == "one\n"
    path.write_text("one\ntwo\n")
    assert searches.begin(attempt(12)).read_text() == "one\ntwo\n"
    assert names(tmp_path) == ["a.12.jsonl"]


def test_the_first_attempt_has_nothing_to_go_on_with(searches: SearchFolder) -> None:
    searches.begin(attempt(1, "b")).write_text("of another job\n")
    assert not searches.begin(attempt(1)).exists()


def test_an_engine_that_was_replaced_writes_where_nobody_reads(searches: SearchFolder) -> None:
    old = searches.begin(attempt(1))
    old.write_text("one\n")
    new = searches.begin(attempt(2))
    with old.open("a") as stream:
        stream.write("late\n")
    assert new.read_text() == "one\n"
    assert searches.begin(attempt(3)).read_text() == "one\n"


def test_an_attempt_that_comes_late_takes_nothing_from_its_successor(searches: SearchFolder) -> None:
    new = searches.begin(attempt(2))
    new.write_text("two\n")
    searches.begin(attempt(1))
    assert new.read_text() == "two\n"


def test_what_a_job_tried_is_removed_with_all_that_a_crash_left_of_it(searches: SearchFolder, tmp_path: Path) -> None:
    for job in ("a", "b"):
        searches.begin(attempt(1, job)).write_text("one\n")
    (tmp_path / "searches" / "a.2.part").write_text("on")
    searches.remove("a")
    assert names(tmp_path) == ["b.1.jsonl"]


def test_what_no_job_needs_is_swept(searches: SearchFolder, tmp_path: Path) -> None:
    assert searches.sweep(lambda job: False) == 0
    for job in ("a", "b"):
        searches.begin(attempt(1, job)).write_text("one\n")
    (tmp_path / "searches" / "a.2.part").write_text("on")
    assert searches.sweep(lambda job: job == "b") == 2
    assert names(tmp_path) == ["b.1.jsonl"]
