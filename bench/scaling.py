"""What it costs to spread a job's scoring over workers, and what a great many finished jobs take.

    python bench/scaling.py [--only PART ...] [--rows N] [--records N] [--json FILE]

Parts: `bookkeeping`, what Redis does for one shard; `simulated`, the efficiency of up to 64 workers that do nothing but
the bookkeeping, in a real Redis; `records`, memory and lists with a million finished jobs; `workers`, scoring by the
service with one worker and with two, of one thread each.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from redis import Redis

from app.contracts.jobs import Attempt, ModelProgress, PhaseName, Progress
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.tasks import CutScoring, NewShard, ScoringPhase
from bench.servers import PREFIX, api, kept, redis_server
from bench.table import shown
from worker.engine.catalog.contracts.report import MergeResult, Timings

BOOKKEEPING_MS = 5.0
SPEEDUP = 1.9
EFFICIENCY = 0.9
LIST_MS = 10.0
SHARDS = 512
SIMULATED_S = 20.0  # as long as a shard takes
WORKERS = (8, 64)
SHARDS_EACH = 2
PAGE = 20
IDLE_S, IDLE_SHARE = 2.0, 0.2
"""Seconds in which processes that do nothing take no more than this share of one core."""
COPIED_AT_ONCE = 500
RESULT = MergeResult(
    models=[], metrics=None, mean_retention=None, min_retention=None, method={}, timings=Timings(),
    peak_memory_bytes=1, device="cpu", notes=[],
)  # fmt: skip

Row = dict[str, Any]


def row(what: str, ours: float, target: str, *, is_met: bool) -> Row:
    return {"what": what, "ours": ours, "reference": None, "ratio": None, "target": target, "met": is_met}


def store_of(redis: Redis) -> JobStore:
    return JobStore(redis, PREFIX, lease_seconds=10, max_losses=3)


def split(store: JobStore, shards: int) -> None:
    """Make a job whose scoring is cut into so many shards."""
    store.records.create(NewJob({"models": ["x" * 2000]}, "a job of a bench"))
    attempt = store.tasks.claim("worker")
    if attempt is None:
        raise RuntimeError("the job was not there")
    work = json.dumps({"method": "x" * 400})
    phase = ScoringPhase(start=0.1, span=0.8, total=shards * 100, least=0.02)
    models = [f"m{n % 8}" for n in range(shards)]
    of = {model: ModelProgress(done=0, total=100 * models.count(model)) for model in models}
    cut = CutScoring([NewShard(model, 100, f"local:{model}", work) for model in models], phase, of, {})
    if not store.tasks.split(attempt, cut):
        raise RuntimeError("the job was not split")


def claimed(store: JobStore, holds: str = "") -> Attempt | None:
    attempt = store.tasks.claim("worker", holds)
    return attempt if attempt is not None and attempt.is_of_shard else None


def bookkeeping(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """All calls that one shard makes, one after another: claim, record, work, a renewal with progress, and its end."""
    with redis_server(folder / "redis") as url, Redis.from_url(url, decode_responses=True) as redis:
        kept(redis)
        store = store_of(redis)
        cpu, own = redis.info("cpu"), time.process_time()
        start = time.perf_counter()
        split(store, SHARDS)
        of_split = (time.perf_counter() - start) * 1000 / SHARDS
        taken = []
        while True:
            start = time.perf_counter()
            shard = claimed(store, "local:3")
            if shard is None:
                break
            store.records.get(shard.task.job)
            store.tasks.work_of_shard(shard)
            store.tasks.renew(shard, Progress(phase=PhaseName.SCORING, done=50, total=100, unit="examples"))
            store.tasks.finish_shard(shard, "a", 20.0, 100)
            taken.append((time.perf_counter() - start) * 1000 + of_split)
        used = redis.info("cpu")
        server = used["used_cpu_user"] + used["used_cpu_sys"] - cpu["used_cpu_user"] - cpu["used_cpu_sys"]
        processor = (time.process_time() - own + server) * 1000 / SHARDS
        if len(taken) != SHARDS:
            raise RuntimeError(f"{len(taken)} of {SHARDS} shards were made")
        ours = statistics.median(taken)
        what = f"bookkeeping of a shard, ms; median of {SHARDS}, each write on disk"
        yield row(what, ours, f"at most {BOOKKEEPING_MS:g} ms", is_met=ours <= BOOKKEEPING_MS)
        what = "processor time of it, ms; the worker's and that of Redis, whatever else the machine does"
        yield row(what, processor, f"at most {BOOKKEEPING_MS:g} ms", is_met=processor <= BOOKKEEPING_MS)


def simulated(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Workers that sleep in place of the work. An efficiency of 1 is a speed that grows as their number."""
    with redis_server(folder / "redis") as url, Redis.from_url(url, decode_responses=True) as redis:
        kept(redis)
        for workers in WORKERS:
            redis.flushdb()
            store = store_of(redis)
            shards = workers * SHARDS_EACH
            split(store, shards)

            def work() -> None:
                with Redis.from_url(url, decode_responses=True) as own:
                    mine = store_of(own)
                    while (shard := claimed(mine)) is not None:
                        mine.records.get(shard.task.job)
                        mine.tasks.work_of_shard(shard)
                        time.sleep(SIMULATED_S / 2)
                        half = Progress(phase=PhaseName.SCORING, done=50, total=100, unit="examples")
                        mine.tasks.renew(shard, half)
                        time.sleep(SIMULATED_S / 2)
                        mine.tasks.finish_shard(shard, "a", SIMULATED_S, 100)

            threads = [Thread(target=work) for _ in range(workers)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            ours = SHARDS_EACH * SIMULATED_S / (time.perf_counter() - start)
            what = f"efficiency of {workers} workers that only do the bookkeeping; shards of {SIMULATED_S:g} s"
            yield row(what, ours, f"at least {EFFICIENCY:g}", is_met=ours >= EFFICIENCY)


def records(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Copies of one job that ended, with all that Redis keeps of it once its progress is forgotten."""
    with redis_server(folder / "redis") as url, Redis.from_url(url, decode_responses=True) as redis:
        store = store_of(redis)
        first = store.records.create(NewJob({"models": ["x" * 2000]}, "job", {"team": "search"})).job_id
        attempt = store.tasks.claim("worker")
        if attempt is None or not store.tasks.succeed(attempt, RESULT, f"{first}.1"):
            raise RuntimeError("the job did not succeed")
        own = [key for key in redis.scan_iter(f"{PREFIX}:*{first}*") if ":progress:" not in key]
        before = int(redis.info("memory")["used_memory"])
        made = int(first[:12], 16)
        for start in range(0, options.records, COPIED_AT_ONCE):
            with redis.pipeline(transaction=False) as pipeline:
                names = {}
                for number in range(start, min(options.records, start + COPIED_AT_ONCE)):
                    job_id = f"{made - 1 - number:012x}{secrets.token_hex(8)}"
                    names[job_id] = 0
                    for key in own:
                        pipeline.copy(key, key.replace(first, job_id))
                pipeline.zadd(f"{PREFIX}:jobs", names)
                pipeline.zadd(f"{PREFIX}:jobs:default", names)
                pipeline.execute()
        size = (int(redis.info("memory")["used_memory"]) - before) / options.records
        yield row(f"memory of a finished job's record, bytes; {options.records} jobs", size, "", is_met=True)
        with api(url, folder / "data") as found, found.client() as client:
            taken = []
            for _ in range(101):
                start_s = time.perf_counter()
                answer = client.get(f"/jobs?limit={PAGE}")
                taken.append((time.perf_counter() - start_s) * 1000)
                if len(answer.json()["data"]) != PAGE:
                    raise RuntimeError(f"the list was not of {PAGE} jobs")
            ours = statistics.median(taken)
            what = f"GET /jobs?limit={PAGE}, ms; {options.records} finished jobs"
            yield row(what, ours, f"at most {LIST_MS:g} ms", is_met=ours <= LIST_MS)


def workers(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The time that scoring two models takes the service, with one worker and with two, of one thread each."""
    from tests.conftest import make_service
    from tests.tiny import tiny_checkpoint, write_rows

    inputs = folder / "inputs"
    models = []
    for seed, name in enumerate(("a", "b")):
        tiny_checkpoint(inputs / name, seed=seed, hidden=256, layers=6)
        write_rows(inputs / f"{name}.jsonl", count=options.rows, seed=seed)
        dataset = {"source": f"local:{name}.jsonl", "label": "label"}
        models.append({"name": name, "checkpoint": f"local:{name}", "dataset": dataset})
    method = {"name": "mask_fisher", "examples": options.rows, "precision": "float32", "batch_tokens": 1024}
    seconds = {}
    for count in (1, 2):
        (folder / str(count)).mkdir()
        service = make_service(folder / str(count), inputs, MASKMERGE_THREADS="1")
        service.start(count)
        try:
            assert service.process is not None  # noqa: S101 - for the type checker
            idle(service.process.pid)
            posted = service.post("/scores", json={"method": method, "models": models})
            job = service.finished(posted.json()["id"])
        finally:
            service.stop()
        if job["status"] != "succeeded":
            raise RuntimeError(f"the job {job['status']}: {job['error']}")
        seconds[count] = job["result"]["timings"]["score_seconds"]
        yield row(
            f"scoring 2 x {options.rows} rows with {count} workers of one thread, s", seconds[count], "", is_met=True
        )
    ours = seconds[1] / seconds[2]
    yield row("speed of two workers over one", ours, f"at least {SPEEDUP:g}", is_met=ours >= SPEEDUP)


def idle(pid: int) -> None:
    """Wait until a process and those under it do nothing: engines import their libraries while there is no job."""

    def processor_s() -> float:
        found = 0.0
        for process in (own := psutil.Process(pid), *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found += sum(process.cpu_times()[:2])
        return found

    before, now = -1.0, processor_s()
    while now - before > IDLE_SHARE * IDLE_S:
        time.sleep(IDLE_S)
        before, now = now, processor_s()


PARTS = {"bookkeeping": bookkeeping, "simulated": simulated, "records": records, "workers": workers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each model that workers score")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: list[Row] = []
    for part in options.only:
        with TemporaryDirectory() as folder:
            found += PARTS[part](Path(folder), options)
    shown(options.json, found)
    return 0 if all(one["met"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
