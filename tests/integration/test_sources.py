"""What a further source of inputs takes is one file: a stand-in for object storage is inspected and fetched."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from redis import Redis

import app.storage.sources
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import ErrorCode, PhaseName, Record, Status
from app.contracts.references import ReferenceError
from app.contracts.requests import MergeRequest
from app.services.checks import Accepted, Checker
from app.storage.artifacts import open_artifacts
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.searches import SearchFolder
from app.storage.sources import Sources, is_remote
from app.storage.sources.source import SourceContext
from tests.conftest import REPOSITORY, wait_until
from tests.object_storage.s3 import AWAY, SLOW, Buckets
from tests.tiny import read_model
from worker.engine.catalog.contracts.spec import StoreSpec
from worker.engine_process import EngineProcess
from worker.tasks import Storage, TaskRunner, TenantStorage


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess(threads=1)
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture
def has_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in lies in the folder of sources."""
    path = [*app.storage.sources.__path__, str(REPOSITORY / "tests" / "object_storage")]
    monkeypatch.setattr(app.storage.sources, "__path__", path)


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, "test", lease_seconds=2, max_losses=3)


@pytest.fixture
def sources(store: JobStore, tmp_path: Path, tiny_inputs: Path) -> Sources:
    artifacts = open_artifacts("folder", tmp_path)
    artifacts.prepare()
    return Sources(SourceContext([tiny_inputs], tmp_path, artifacts, store.records.outcome))


@pytest.fixture
def buckets(tmp_path: Path, tiny_inputs: Path) -> Buckets:
    buckets = Buckets(tmp_path)
    for bucket in ("models", SLOW, AWAY):
        buckets.put(f"s3:{bucket}/b", tiny_inputs / "checkpoints" / "b")
    buckets.put("s3:rows/a", tiny_inputs / "rows" / "a.jsonl")
    return buckets


def recipe(bucket: str, **changes: Any) -> dict[str, Any]:
    first = {"name": "a", "checkpoint": "local:checkpoints/a", "dataset": {"source": "s3:rows/a", "label": "label"}}
    return {
        "method": {"name": "mask_fisher", "examples": 32},
        "models": [first, {"name": "b", "checkpoint": f"s3:{bucket}/b", "weight": 0}],
        "evaluate": False,
        **changes,
    }


def checked(sources: Sources, recipe: dict[str, Any]) -> Accepted:
    return Checker(sources, lambda field: None).check(MergeRequest.model_validate(recipe))


Run = Callable[[dict[str, Any]], Record]


@pytest.fixture
def run(store: JobStore, sources: Sources, tmp_path: Path, engine: EngineProcess) -> Run:
    """What becomes of a job that is accepted and run."""
    statistics = StoreSpec(folder=tmp_path / "statistics", max_bytes=10**9)
    own = TenantStorage(sources, statistics)
    storage = Storage(store, lambda tenant: own, open_artifacts("folder", tmp_path), SearchFolder(tmp_path))

    def run(recipe: dict[str, Any]) -> Record:
        accepted = checked(sources, recipe)
        created = store.records.create(NewJob(accepted.request, "name", inputs=accepted.states))
        runner = TaskRunner("test", storage, engine, 2**40, lambda: False, lambda: None)
        runner.run()
        record = store.records.get(created.job_id)
        assert record is not None
        return record

    return run


def test_a_scheme_without_a_file_is_not_available_and_an_unknown_one_is_no_reference(sources: Sources) -> None:
    with pytest.raises(ReferenceError, match="'s3:' references are not available yet") as refused:
        sources.resolve("s3:models/b", "checkpoint")
    assert not refused.value.available
    with pytest.raises(ReferenceError, match="'ftp:b' is no reference; write local:PATH") as refused:
        sources.resolve("ftp:b", "checkpoint")
    assert refused.value.available
    assert [is_remote(text) for text in ("hf:org/a", "hf:", "local:a", "job:a/b", "s3:b", "", "hf")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip


@pytest.mark.usefixtures("has_object_storage")
def test_one_more_file_makes_a_source_that_is_inspected_fetched_and_merged(
    run: Run, sources: Sources, buckets: Buckets, tmp_path: Path, tiny_inputs: Path
) -> None:
    assert is_remote("s3:models/b")
    accepted = checked(sources, recipe("models"))
    assert accepted.request["models"][1]["checkpoint"] == "s3:models/b"
    assert sorted(accepted.states) == ["local:checkpoints/a", "s3:models/b"]
    record = run(recipe("models"))
    assert record.status is Status.SUCCEEDED, record.error
    assert record.result is not None
    assert [(model.checkpoint, model.examples) for model in record.result.models] == [
        ("local:checkpoints/a", 32),
        ("s3:models/b", 0),
    ]
    merged = read_model(tmp_path / "artifacts" / f"{record.id}.1" / "models" / "b")
    own, other = (read_model(tiny_inputs / "checkpoints" / name) for name in "ba")
    for name, tensor in merged.items():
        assert tensor.equal(own[name] if name.startswith("classifier") else other[name]), name


@pytest.mark.usefixtures("has_object_storage")
def test_what_is_not_there_is_refused_and_what_changed_meanwhile_fails_the_job(
    run: Run, sources: Sources, store: JobStore, buckets: Buckets, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProblemError) as refused:
        checked(sources, recipe("nothing"))
    assert (refused.value.problem, refused.value.errors[0].field) == (Problem.INVALID_REQUEST, "models.1.checkpoint")
    create = store.records.create

    def create_and_change(*args: Any, **options: Any) -> Any:
        created = create(*args, **options)
        buckets.put("s3:models/b", tiny_inputs / "checkpoints" / "c")
        return created

    monkeypatch.setattr(store.records, "create", create_and_change)
    record = run(recipe("models"))
    assert record.status is Status.FAILED
    assert record.error is not None
    assert record.error.code is ErrorCode.INVALID_CHECKPOINT
    assert record.error.message == (
        "checkpoint s3:models/b: 's3:models/b' was changed after the job was accepted; post it again"
    )
    assert record.error.detail == {"checkpoint": "s3:models/b"}


@pytest.mark.usefixtures("has_object_storage", "buckets")
def test_a_source_that_does_not_answer_fails_the_job_which_may_be_tried_again(run: Run) -> None:
    error = run(recipe(AWAY)).error
    assert error is not None
    assert (error.code, error.retryable, error.detail) == (ErrorCode.STORAGE_ERROR, True, {"source": "s3:away/b"})
    assert error.message == "the storage of s3:away/b does not answer; try again"


@pytest.mark.usefixtures("has_object_storage")
def test_while_inputs_are_fetched_the_lease_is_kept_progress_shown_and_a_cancel_heard(
    run: Run, store: JobStore, buckets: Buckets, tmp_path: Path
) -> None:
    ended: list[Record] = []
    worker = Thread(target=lambda: ended.append(run(recipe(SLOW))))
    worker.start()

    def progress() -> Record | None:
        job = next(store.records.newest(), None)
        record = store.records.get(job.id) if job else None
        return record if record and record.progress.phase is PhaseName.DOWNLOADING else None

    record: Record = wait_until(progress, "the download's progress")
    assert record.progress.unit == "bytes"
    assert 0 < record.progress.done < record.progress.total
    expiry = store.clock() + 3000  # longer than the lease
    wait_until(lambda: store.clock() > expiry, "the lease's time to pass")
    assert store.tasks.expired() == []
    assert store.records.cancel(record.id) is Status.CANCELLING
    asked = store.clock()
    worker.join()
    assert ended[0].status is Status.CANCELLED
    assert ended[0].finished_ms is not None
    assert ended[0].finished_ms - asked < 5000
    assert not list((tmp_path / "work").iterdir())
