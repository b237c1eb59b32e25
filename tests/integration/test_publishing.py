"""A cancel that comes while an attempt publishes, with a real engine process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from app.contracts.jobs import Attempt, Record, Stage, Status, TaskId
from app.contracts.requests import MergeRequest
from app.storage.artifacts.folder import FolderStore
from app.storage.inputs import OnBytes, untold
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.searches import SearchFolder
from app.storage.sources import Sources
from app.storage.sources.source import SourceContext
from tests.conftest import tiny_recipe, wait_until
from worker.engine.catalog.contracts.spec import StoreSpec
from worker.engine_process import EngineProcess
from worker.tasks import Storage, TaskRunner, TenantStorage

LEASE_S = 2
Publish = Callable[[FolderStore, JobStore, Attempt], str]


def cancel_first(artifacts: FolderStore, store: JobStore, attempt: Attempt) -> str:
    assert store.records.cancel(attempt.task.job) is Status.CANCELLING
    return artifacts.publish(attempt)


def cancel_after_the_rename(artifacts: FolderStore, store: JobStore, attempt: Attempt) -> str:
    name = artifacts.publish(attempt)
    assert store.records.cancel(attempt.task.job) is Status.CANCELLING
    return name


def longer_than_the_lease(artifacts: FolderStore, store: JobStore, attempt: Attempt) -> str:
    """Until the lease as it was would have run out."""
    expiry = store.clock() + LEASE_S * 1000
    wait_until(lambda: store.clock() > expiry, "the lease's time to pass")
    assert not store.tasks.expired()
    return artifacts.publish(attempt)


def undisturbed(artifacts: FolderStore, store: JobStore, attempt: Attempt) -> str:
    return artifacts.publish(attempt)


class DisturbedFolder(FolderStore):
    """Publishes as `how` says."""

    def __init__(self, data_dir: Path, store: JobStore, how: Publish) -> None:
        super().__init__(data_dir)
        self._undisturbed = FolderStore(data_dir)
        self._store = store
        self._how = how

    def publish(self, attempt: Attempt, on_bytes: OnBytes = untold) -> str:
        return self._how(self._undisturbed, self._store, attempt)


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess(threads=1)
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture
def run(redis: Redis, tmp_path: Path, tiny_inputs: Path, engine: EngineProcess) -> Callable[[Publish], Record]:
    """What becomes of a job whose attempt publishes so."""
    store = JobStore(redis, "test", lease_seconds=LEASE_S, max_losses=3)

    def run(how: Publish) -> Record:
        artifacts = DisturbedFolder(tmp_path, store, how)
        artifacts.prepare()
        sources = Sources(SourceContext([tiny_inputs], tmp_path, artifacts, store.records.outcome))
        statistics = StoreSpec(folder=tmp_path / "statistics", max_bytes=10**9)
        runner = TaskRunner(
            "test",
            Storage(store, lambda tenant: TenantStorage(sources, statistics), artifacts, SearchFolder(tmp_path)),
            engine,
            max_engine_bytes=2**40,
            is_stopping=lambda: False,
            wake=lambda: None,
        )
        recipe = {**tiny_recipe("a", name="average"), "evaluate": False}
        del recipe["models"][0]["evaluation"]
        request = MergeRequest.model_validate(recipe)
        task = TaskId(
            job=store.records.create(NewJob(request.model_dump(mode="json"), "name")).job_id, stage=Stage.MERGE
        )
        runner.run()
        record = store.records.get(task.job)
        assert record is not None
        return record

    return run


@pytest.mark.parametrize("how", [pytest.param(cancel_first, marks=pytest.mark.long), cancel_after_the_rename])
def test_a_cancel_that_comes_while_an_attempt_publishes_ends_the_job_and_leaves_nothing(
    run: Callable[[Publish], Record], tmp_path: Path, how: Publish
) -> None:
    record = run(how)
    assert (record.status, record.result, record.artifact) == (Status.CANCELLED, None, None)
    assert not list((tmp_path / "work").iterdir())
    assert not list((tmp_path / "artifacts").iterdir())
    after = run(undisturbed)
    assert (after.status, after.artifact) == (Status.SUCCEEDED, f"{after.id}.1")


def test_an_attempt_that_publishes_for_longer_than_its_lease_keeps_it(run: Callable[[Publish], Record]) -> None:
    record = run(longer_than_the_lease)
    assert (record.status, record.attempt) == (Status.SUCCEEDED, 1)
