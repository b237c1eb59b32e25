"""Journals of searches that no job can use any more, with the records in a real Redis."""

from functools import partial
from pathlib import Path

from redis import Redis

from app.contracts.jobs import Attempt, ErrorCode, JobError
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.searches import SearchFolder
from tests.conftest import RESULT
from worker.__main__ import may_go_on


def test_only_journals_that_another_attempt_may_read_outlast_a_sweep(redis: Redis, tmp_path: Path) -> None:
    store = JobStore(redis, "test", lease_seconds=10, max_losses=3)
    searches = SearchFolder(tmp_path)

    def attempt() -> Attempt:
        store.records.create(NewJob({}, "name"))
        claimed = store.tasks.claim("worker")
        assert claimed is not None
        searches.begin(claimed).write_text("a trial\n")
        return claimed

    running, handed_back, failed, cancelled, succeeded, deleted = [attempt() for _ in range(6)]
    store.tasks.release(handed_back, lost=False)
    store.tasks.fail(failed, JobError(code=ErrorCode.WORKER_LOST, message="lost"))
    store.records.cancel(cancelled.task.job)
    store.tasks.acknowledge_cancel(cancelled)
    store.tasks.succeed(succeeded, RESULT, "artifact")
    store.tasks.fail(deleted, JobError(code=ErrorCode.WORKER_LOST, message="lost"))
    store.records.delete(deleted.task.job)
    assert searches.sweep(partial(may_go_on, store)) == 3
    kept = {file.name.partition(".")[0] for file in (tmp_path / "searches").iterdir()}
    assert kept == {running.task.job, handed_back.task.job, failed.task.job}
