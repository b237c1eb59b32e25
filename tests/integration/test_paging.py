"""Lists are walked page by page while others make and remove what is listed: nothing is missed or told twice."""

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.settings import Settings
from app.main import create_app
from app.storage.jobs import JobStore
from app.storage.records import Deleted, NewJob
from tests.conftest import BASE_URL, HERE, assert_problem
from worker.engine.catalog.contracts.statistics import ABOUT, FOLDER, About, Facts, Origin, Tokens
from worker.engine.catalog.methods import GRAM

TEAM = {"team": "search"}
MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, "paging", lease_seconds=10, max_losses=3)


@pytest.fixture
def api(redis: Redis, redis_url: str, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path, queue="paging")
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@contextmanager
def meanwhile(act: Callable[[random.Random], None]) -> Iterator[Callable[[], int]]:
    """Does something again and again beside the test; yields how often it was done."""
    stop, done, draw = threading.Event(), 0, random.Random(0)

    def acting() -> None:
        nonlocal done
        while not stop.is_set():
            act(draw)
            done += 1

    thread = threading.Thread(target=acting)
    thread.start()
    try:
        yield lambda: done
    finally:
        stop.set()
        thread.join()


def walked(api: TestClient, path: str, **query: Any) -> Iterator[list[dict[str, Any]]]:
    """Yields page after page."""
    after: dict[str, str] = {}
    while True:
        response = api.get(path, params={**query, **after})
        assert response.status_code == 200, response.text
        page = response.json()
        yield page["data"]
        if page["next"] is None:
            return
        after = {"after": page["next"]}


def made(store: JobStore, labels: dict[str, str]) -> str:
    return store.records.create(NewJob({}, "a job", labels)).job_id


@pytest.mark.parametrize("query", [{}, {"status": "cancelled"}, {"label": "team:search"},
                                   {"status": "cancelled", "label": ["team:search", "run:1"]}])  # fmt: skip
def test_every_job_that_was_there_all_the_time_is_listed_once(
    store: JobStore, api: TestClient, query: dict[str, Any]
) -> None:
    labels = {**TEAM, "run": "1"}
    lasting = []
    passing = []
    for number in range(60):  # what lasts lies between what goes
        lasting.append(made(store, labels))
        store.records.cancel(lasting[-1])
        passing.append(made(store, labels if number % 2 else {}))
        store.records.cancel(passing[-1])

    def change(draw: random.Random) -> None:
        if passing and draw.random() < 0.5:
            assert store.records.delete(passing.pop(draw.randrange(len(passing)))) is Deleted.DONE
        else:
            passing.append(made(store, labels))
            store.records.cancel(passing[-1])

    for _ in range(3):
        with meanwhile(change) as changes:
            found = [job["id"] for page in walked(api, "/jobs", limit=7, **query) for job in page]
        assert changes() > 10
        assert len(found) == len(set(found)), "a job was listed twice"
        assert found == sorted(found, reverse=True)
        assert set(lasting) <= set(found), "a job was missed"


def test_the_cursor_of_a_removed_job_goes_on_where_it_stood(store: JobStore, api: TestClient) -> None:
    ids = [made(store, {}) for _ in range(9)]
    for job_id in ids:
        store.records.cancel(job_id)
    ids.sort(reverse=True)
    page = api.get("/jobs", params={"limit": 3}).json()
    assert [job["id"] for job in page["data"]] == ids[:3]
    for job_id in (*ids[1:5], ids[7]):
        store.records.delete(job_id)
    rest = api.get("/jobs", params={"limit": 3, "after": page["next"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["next"]) == ([ids[5], ids[6], ids[8]], None)
    for job_id in (ids[0], ids[5], ids[6], ids[8]):
        store.records.delete(job_id)
    assert api.get("/jobs", params={"after": page["next"]}).json() == {"data": [], "next": None}
    assert_problem(api.get("/jobs", params={"after": "no cursor"}), 400, "malformed")


def kept(folder: Path, number: int) -> str:
    """Keeps a statistic, as a worker does, and returns its digest."""
    tokens = Tokens(tokenizer="3", inputs=["input_ids"], max_length=128, versions={"tokenizers": "1"})
    facts = Facts(
        statistic=GRAM, checkpoint=f"sha256:{number % 2:064}", rows="2", tokens=tokens, precision="float32", seed=number
    )
    about = About(
        facts=facts, origin=Origin(checkpoint="local:expert", dataset="local:rows.jsonl", examples=7), files=[],
        created_at=MADE_AT + timedelta(seconds=number // 4),  # some at the same time
    )  # fmt: skip
    assembled = folder / f".assembled-{number}"
    assembled.mkdir(parents=True)
    (assembled / ABOUT).write_text(about.model_dump_json())
    assembled.rename(folder / facts.address)
    return facts.address


@pytest.mark.parametrize("query", [{}, {"checkpoint": "0" * 64}, {"statistic": "gram"}])
def test_every_statistic_that_was_there_all_the_time_is_listed_once(
    api: TestClient, tmp_path: Path, query: dict[str, Any]
) -> None:
    folder = tmp_path / FOLDER
    numbers = iter(range(0, 10**6, 2 if "checkpoint" in query else 1))
    lasting = []
    passing = []
    for _ in range(40):
        lasting.append(kept(folder, next(numbers)))
        passing.append(kept(folder, next(numbers)))

    def change(draw: random.Random) -> None:
        if passing and draw.random() < 0.5:
            shutil.rmtree(folder / passing.pop(draw.randrange(len(passing))))
        else:
            passing.append(kept(folder, next(numbers)))

    with meanwhile(change) as changes:
        found = [entry["digest"] for page in walked(api, "/scores", limit=6, **query) for entry in page]
    assert changes() > 10
    assert len(found) == len(set(found))
    assert set(lasting) <= set(found)
    page = api.get("/scores", params={"limit": 3}).json()
    for entry in page["data"]:
        shutil.rmtree(folder / entry["digest"])
    rest = api.get("/scores", params={"limit": 100, "after": page["next"]}).json()
    assert not {entry["digest"] for entry in rest["data"]} & {entry["digest"] for entry in page["data"]}
    assert rest == api.get("/scores", params={"limit": 100}).json()
