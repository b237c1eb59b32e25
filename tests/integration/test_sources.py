"""Inputs in object storage are inspected by ranges and fetched once; what changes or fails meanwhile is named."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from redis import Redis

from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import ErrorCode, PhaseName, Record, Status
from app.contracts.object_storage import NO_BUCKETS, ObjectStorage
from app.contracts.references import ReferenceError
from app.contracts.requests import MergeRequest
from app.services.checks import Accepted, Checker
from app.storage.artifacts import open_artifacts
from app.storage.jobs import JobStore
from app.storage.objects.bucket import Patience
from app.storage.objects.cache import ObjectCache
from app.storage.records import NewJob
from app.storage.searches import SearchFolder
from app.storage.sources import Sources, is_remote
from app.storage.sources.source import SourceContext
from tests.conftest import wait_until
from tests.object_storage.server import KEYS, ObjectServer, moto, set_keys
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


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with moto() as server:
        server.make("models", "private")
        yield server


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, "test", lease_seconds=2, max_losses=3)


@pytest.fixture
def objects(server: ObjectServer, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    set_keys(monkeypatch)
    server.put("models/own/b", tiny_inputs / "checkpoints" / "b")
    server.put("models/own/rows/a.jsonl", tiny_inputs / "rows" / "a.jsonl")
    yield ObjectStorage(buckets=("models/{tenant}", "models/own"), endpoint=server.proxy.url)
    server.proxy.heal()


@pytest.fixture
def context(store: JobStore, tmp_path: Path, tiny_inputs: Path, objects: ObjectStorage) -> SourceContext:
    artifacts = open_artifacts("folder", tmp_path)
    artifacts.prepare()
    return SourceContext([tiny_inputs], tmp_path, artifacts, store.records.outcome, objects=objects)


@pytest.fixture
def sources(context: SourceContext) -> Sources:
    return Sources(context)


@pytest.fixture
def is_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("app.storage.sources.s3", "app.storage.objects.cache"):
        monkeypatch.setattr(f"{module}.AT_WORK", Patience(request_s=1, retries=2, total_s=2))
    monkeypatch.setattr("app.storage.sources.s3.AT_THE_DOOR", Patience(request_s=1, retries=0, total_s=1))


def recipe(checkpoint: str = "s3:models/own/b", **changes: Any) -> dict[str, Any]:
    rows = {"source": "s3:models/own/rows/a.jsonl", "label": "label"}
    first = {"name": "a", "checkpoint": "local:checkpoints/a", "dataset": rows}
    return {
        "method": {"name": "mask_fisher", "examples": 32},
        "models": [first, {"name": "b", "checkpoint": checkpoint, "weight": 0}],
        "evaluate": False,
        **changes,
    }


def checked(sources: Sources, recipe: dict[str, Any]) -> Accepted:
    return Checker(sources, lambda field: None).check(MergeRequest.model_validate(recipe))


Run = Callable[[dict[str, Any]], Record]


@pytest.fixture
def run(store: JobStore, context: SourceContext, tmp_path: Path, engine: EngineProcess) -> Run:
    """What becomes of a job that is accepted and run."""
    statistics = StoreSpec(folder=tmp_path / "statistics", max_bytes=10**9)

    def own() -> TenantStorage:
        return TenantStorage(Sources(context), statistics, context.held)

    storage = Storage(store, lambda tenant: own(), open_artifacts("folder", tmp_path), SearchFolder(tmp_path))

    def run(recipe: dict[str, Any]) -> Record:
        accepted = checked(Sources(context), recipe)
        created = store.records.create(NewJob(accepted.request, "name", inputs=accepted.states))
        runner = TaskRunner("test", storage, engine, 2**40, lambda: False, lambda: None)
        runner.run()
        record = store.records.get(created.job_id)
        assert record is not None
        return record

    return run


def test_an_unknown_scheme_is_no_reference(sources: Sources) -> None:
    with pytest.raises(ReferenceError, match="'ftp:b' is no reference; write local:PATH"):
        sources.resolve("ftp:b", "checkpoint")
    assert [is_remote(text) for text in ("hf:org/a", "hf:", "local:a", "job:a/b", "s3:b", "", "hf")] == [
        True, True, False, False, True, False, False,
    ]  # fmt: skip


def test_checkpoints_and_rows_are_inspected_by_ranges_fetched_once_and_merged(
    run: Run, sources: Sources, server: ObjectServer, tmp_path: Path, tiny_inputs: Path
) -> None:
    accepted = checked(sources, recipe())
    assert accepted.request["models"][1]["checkpoint"] == "s3:models/own/b"
    assert sorted(accepted.states) == ["local:checkpoints/a", "s3:models/own/b", "s3:models/own/rows/a.jsonl"]
    pinned = json.loads(accepted.states["s3:models/own/b"])
    found = server.client.head_object(Bucket="models", Key="own/b/model.safetensors")
    assert pinned["model.safetensors"] == [found["ContentLength"], found["ETag"]]
    assert not (tmp_path / "cache").exists()
    record = run(recipe())
    assert record.status is Status.SUCCEEDED, record.error
    assert record.result is not None
    assert [(model.checkpoint, model.examples) for model in record.result.models] == [
        ("local:checkpoints/a", 32),
        ("s3:models/own/b", 0),
    ]
    merged = read_model(tmp_path / "artifacts" / f"{record.id}.1" / "models" / "b")
    own, other = (read_model(tiny_inputs / "checkpoints" / name) for name in "ba")
    for name, tensor in merged.items():
        assert tensor.equal(own[name] if name.startswith("classifier") else other[name]), name
    entries = {path: path.stat().st_ctime_ns for path in (tmp_path / "cache" / "objects").glob("*/files/*")}
    assert {path.name for path in entries} >= {"config.json", "model.safetensors", "a.jsonl"}
    assert run(recipe()).status is Status.SUCCEEDED
    assert {path: path.stat().st_ctime_ns for path in (tmp_path / "cache" / "objects").glob("*/files/*")} == entries
    texts = [path.read_text(errors="replace") for path in (tmp_path / "artifacts").rglob("*.json")]
    assert not any(secret in text for text in [*texts, record.model_dump_json()] for secret in KEYS.values())


def test_only_places_that_the_operator_allows_are_read(context: SourceContext, server: ObjectServer) -> None:
    sources = Sources(context)
    for reference, why in {
        "s3:private/b": "in no place that this service may read for you",
        "s3:models/other/b": "in no place that this service may read for you",
        "s3:models/owner": "in no place that this service may read for you",
        "s3:models": "a whole bucket",
        "s3:models/own/../other": "no empty parts",
        "s3:models/own//b": "no empty parts",
        "s3:Models/own": "no name of a bucket",
        "s3:models/own/a\nb": "no control characters",
    }.items():
        with pytest.raises(ReferenceError, match=why):
            sources.resolve(reference, "checkpoint")
    assert (
        str(Sources(replace(context, tenant="other")).resolve("s3:models/other/b/", "checkpoint"))
        == "s3:models/other/b"
    )
    with pytest.raises(ReferenceError, match="MASKMERGE_S3_BUCKETS"):
        Sources(replace(context, objects=NO_BUCKETS)).resolve("s3:models/own/b", "checkpoint")
    for checkpoint, why in {
        "s3:models/own/nothing": "'s3:models/own/nothing': there is no such object, and none below it",
        "s3:models/own/rows/a.jsonl": "not a folder",
    }.items():
        with pytest.raises(ProblemError, match=why) as refused:
            checked(sources, recipe(checkpoint))
        assert refused.value.errors[0].field == "models.1.checkpoint"
    elsewhere = ObjectStorage(buckets=("nobody-has-it",), endpoint=server.url)
    with pytest.raises(ProblemError, match="there is no bucket nobody-has-it") as refused:
        checked(Sources(replace(context, objects=elsewhere)), recipe("s3:nobody-has-it/b"))
    assert refused.value.problem is Problem.INVALID_REQUEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.safetensors", "model.safetensors was changed after the job was accepted; post it again"),
        ("vocab.txt", "vocab.txt was added after the job was accepted; post it again"),
    ],
)
def test_an_object_that_changes_after_the_job_was_accepted_fails_it_by_name(
    run: Run, store: JobStore, server: ObjectServer, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch,
    change: str, message: str,
) -> None:  # fmt: skip
    create = store.records.create
    server.put("models/own/changing", tiny_inputs / "checkpoints" / "b")

    def create_and_change(*args: Any, **options: Any) -> Any:
        created = create(*args, **options)
        server.put(f"models/own/changing/{change}", tiny_inputs / "checkpoints" / "c" / "model.safetensors")
        return created

    monkeypatch.setattr(store.records, "create", create_and_change)
    record = run(recipe("s3:models/own/changing"))
    server.client.delete_object(Bucket="models", Key="own/changing/vocab.txt")
    assert record.status is Status.FAILED
    assert record.error is not None
    assert record.error.code is ErrorCode.INVALID_CHECKPOINT
    assert record.error.message == f"checkpoint s3:models/own/changing: 's3:models/own/changing': {message}"
    assert record.error.detail == {"checkpoint": "s3:models/own/changing"}


def test_requests_that_fail_and_answers_that_are_cut_are_repeated(
    run: Run, server: ObjectServer, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.records.create

    def create_and_harm(*args: Any, **options: Any) -> Any:
        created = create(*args, **options)
        server.proxy.failures, server.proxy.cuts = 2, 1
        return created

    monkeypatch.setattr(store.records, "create", create_and_harm)
    record = run(recipe())
    assert (record.status, server.proxy.failures, server.proxy.cuts) == (Status.SUCCEEDED, 0, 0)


@pytest.mark.usefixtures("is_impatient")
def test_storage_that_stalls_is_said_at_the_door_and_fails_the_job_which_may_be_tried_again(
    run: Run, sources: Sources, server: ObjectServer, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.proxy.is_stalled = True
    with pytest.raises(ProblemError) as refused:
        checked(sources, recipe())
    assert refused.value.problem is Problem.STORAGE_UNAVAILABLE
    assert refused.value.detail == "models.1.checkpoint: s3:models/own/b: bucket models does not answer in time"
    server.proxy.heal()
    create = store.records.create

    def create_and_stall(*args: Any, **options: Any) -> Any:
        created = create(*args, **options)
        server.proxy.is_stalled = True
        return created

    monkeypatch.setattr(store.records, "create", create_and_stall)
    error = run(recipe()).error
    assert error is not None
    source = "s3:models/own/rows/a.jsonl"
    assert (error.code, error.retryable, error.detail) == (ErrorCode.STORAGE_ERROR, True, {"source": source})
    assert error.message == f"{source}: bucket models does not answer in time; try again"


def test_while_inputs_are_fetched_the_lease_is_kept_progress_shown_and_a_cancel_heard(
    run: Run, server: ObjectServer, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.records.create

    def create_and_slow_down(*args: Any, **options: Any) -> Any:
        created = create(*args, **options)
        server.proxy.pause_s = 0.5
        return created

    monkeypatch.setattr(store.records, "create", create_and_slow_down)
    ended: list[Record] = []
    worker = Thread(target=lambda: ended.append(run(recipe())))
    worker.start()

    def progress() -> Record | None:
        job = next(store.records.newest(), None)
        record = store.records.get(job.id) if job else None
        return record if record and record.progress.phase is PhaseName.DOWNLOADING else None

    record: Record = wait_until(progress, "the download's progress")
    assert (record.progress.unit, record.progress.total > 0) == ("bytes", True)
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


def test_copies_that_nobody_reads_make_room_and_others_stay(context: SourceContext, tmp_path: Path) -> None:
    small = replace(context, objects=context.objects.model_copy(update={"max_cache_bytes": 1}))
    with ExitStack() as held:
        first = Sources(replace(small, held=held)).fetch("s3:models/own/b", "checkpoint", None, lambda *_: None).place
        with ExitStack() as other:
            rows = Sources(replace(small, held=other)).fetch(
                "s3:models/own/rows/a.jsonl", "rows", None, lambda *_: None
            )
            assert first is not None
            assert rows.place is not None
            assert (first.path / "model.safetensors").exists()
            assert rows.place.path.name == "a.jsonl"
        ObjectCache(tmp_path, small.objects, ExitStack()).make_room()
        assert (first.path / "model.safetensors").exists()
        assert not rows.place.path.exists()
    ObjectCache(tmp_path, small.objects, ExitStack()).make_room()
    assert list((tmp_path / "cache" / "objects").iterdir()) == []


def test_keys_come_from_a_file_and_are_never_quoted(
    context: SourceContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = k\naws_secret_access_key = hidden\n")
    with_file = replace(context, objects=context.objects.model_copy(update={"credentials_file": file}))
    assert "s3:models/own/b" in checked(Sources(with_file), recipe()).states
    file.write_text("[default]\naws_secret_access_key = hidden\n")
    with pytest.raises(ProblemError) as refused:
        checked(Sources(with_file), recipe())
    assert refused.value.problem is Problem.STORAGE_UNAVAILABLE
    assert refused.value.detail == (
        "models.1.checkpoint: s3:models/own/b: the file of MASKMERGE_S3_CREDENTIALS_FILE has no aws_access_key_id and "
        "aws_secret_access_key in [default]"
    )
