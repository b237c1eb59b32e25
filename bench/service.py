"""How long the API takes to list jobs when there are many, each with the long result of a search.

    python bench/service.py [--jobs N] [--trials N] [--json FILE]

It starts a Redis and an API of its own. The reference is `GET /healthz`, the least that a request takes;
both are medians.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
from redis import Redis
from redis.exceptions import RedisError

from app.contracts.jobs import Stage, TaskId
from app.embedded_redis import EmbeddedRedis
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from bench.table import shown
from worker.engine.catalog.contracts.report import MergeResult, MetricResult, ModelResult, Search, Timings, Trial

TARGET_MS = 20.0
ROUNDS = 100
PREFIX = "bench"


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The embedded Redis, without its append-only file, which is for writes, and would make filling it take minutes."""
    server = EmbeddedRedis(folder)
    process = subprocess.Popen([*server.command, "--appendonly", "no"], stdout=subprocess.DEVNULL)
    try:
        with Redis.from_url(server.url) as client:
            while True:
                try:
                    client.ping()
                    break
                except RedisError:
                    time.sleep(0.05)
        yield server.url
    finally:
        process.terminate()
        process.wait()
        server.clean()


@contextmanager
def api(redis_url: str, folder: Path) -> Iterator[httpx.Client]:
    """The API as a process, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"REDIS_URL": redis_url, "DATA_DIR": str(folder), "QUEUE": PREFIX, "PORT": str(port)}
    environment = {**os.environ, **{f"MASKMERGE_{name}": value for name, value in settings.items()}}
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "api"], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                try:
                    client.get("/healthz")
                    break
                except httpx.TransportError:
                    if process.poll() is not None:
                        raise RuntimeError("the API does not start; its messages are above") from None
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait()


def searched(trials: int) -> MergeResult:
    """The result of a search over five experts."""
    names = [f"expert-{number}" for number in range(5)]
    kept = dict.fromkeys(names, 0.987654321)
    return MergeResult(
        models=[
            ModelResult(
                name=name, checkpoint=f"local:experts/{name}", digest="0" * 64, examples=2048, weight_share=0.2,
                score_seconds=12.3, score_cached=False, batch_tokens=4096, aligned_examples=512,
                parameters={},
            )
            for name in names
        ],
        metrics={
            name: MetricResult(
                metric="accuracy", expert=0.9, average=0.8, merged=0.88, merged_kept_head=0.87, retention=0.977,
                interval=(0.86, 0.9),
                examples=800, intervals={}, differences={},
            )
            for name in names
        },
        mean_retention=0.977,
        min_retention=0.977,
        search=Search(
            objective="mean_retention", search_rows=dict.fromkeys(names, 400), held_out_rows=dict.fromkeys(names, 400),
            min_retention={}, feasible=True, chosen=0, failed=[],
            trials=[
                Trial(
                    number=number, candidate="mask_fisher", parameters={"scale": 1.234567}, seconds=1.25,
                    rows=400, retentions=kept, smoothed=kept, objective=0.987654321, pruned=False,
                )
                for number in range(trials)
            ],
        ),
        method={"name": "mask_fisher"}, timings=Timings(), peak_memory_bytes=1, device="cpu", notes=[],
    )  # fmt: skip


def fill(redis_url: str, jobs: int, result: MergeResult) -> int:
    """Make so many jobs that succeeded; the bytes of one result."""
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        store = JobStore(redis, PREFIX, lease_seconds=10, max_losses=3)
        for number in range(jobs):
            request = {"models": ["x" * 2000]}
            job_id = store.records.create(NewJob(request, f"job {number}", {"team": "search"})).job_id
            attempt = store.tasks.claim(TaskId(job=job_id, stage=Stage.MERGE), "worker")
            if attempt is None or not store.tasks.succeed(attempt, result, f"{job_id}.1"):
                raise RuntimeError(f"job {job_id} did not succeed")
    return len(result.model_dump_json())


def milliseconds(client: httpx.Client, path: str) -> float:
    """The median of several requests."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        client.get(path).raise_for_status()
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name, redis_server(Path(name) / "redis") as url:
        size = fill(url, options.jobs, searched(options.trials))
        with api(url, Path(name) / "data") as client:
            least = milliseconds(client, "/healthz")
            found = client.get("/jobs?limit=50").json()["data"]
            if len(found) != min(50, options.jobs):
                raise RuntimeError(f"{len(found)} jobs were listed")
            for path in ("/jobs?limit=50", "/jobs?limit=50&label=team:search", "/jobs?limit=50&status=succeeded"):
                ours = milliseconds(client, path)
                rows.append(
                    {
                        "what": f"GET {path}, ms; {options.jobs} jobs, each with a result of {size / 1000:.0f} kB",
                        "ours": ours,
                        "reference": least,
                        "ratio": ours / least,
                        "target": f"below {TARGET_MS:g} ms",
                        "met": ours < TARGET_MS,
                    }
                )
    shown(options.json, rows)


if __name__ == "__main__":
    main()
