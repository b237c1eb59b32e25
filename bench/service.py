"""How soon the service answers under load, what it adds to a job, and how fast it sends an artifact.

    python bench/service.py [--only PART ...] [--seconds N] [--jobs N] [--trials N] [--json FILE]

Every part starts a Redis and a service of its own, with API keys, on loopback. Latencies are judged by the best of
three rounds, since the machine may be busy with something else.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
from redis import Redis

from app.contracts.jobs import Attempt
from app.storage.artifacts.folder import FolderStore
from app.storage.connection import connect_for_rq
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.records import NewJob
from bench.loopback import Answer, Connection, Load, head_of, received, repeated, request, spread
from bench.searched import searched
from bench.servers import PREFIX, ROOT, Api, api, kept, redis_server, started
from bench.table import shown
from worker.engine.catalog.contracts.report import MANIFEST, MergeResult

LIST_MS = 20.0
GET_P99_MS, POST_P99_MS = 10.0, 25.0
CLIENTS, GETS_PER_S, POSTS_PER_S = 100, 200, 4
OVERHEAD_S = 0.5
SHARE_OF_CAT = 0.8
ARTIFACT_BYTES = 2_000_000_000
LISTENERS, LISTENERS_BYTES = 500, 100e6
ROUNDS = 100
REPEATS = 3
MERGES = 10
RECEIVED = 5
TITLE = "the merge of a bench"

Row = dict[str, Any]


def row(what: str, ours: float, reference: float, target: str, *, is_met: bool) -> Row:
    ratio = ours / reference if reference else None
    return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": is_met}


def fill(redis_url: str, jobs: int, result: MergeResult) -> int:
    """Make so many jobs that succeeded; the bytes of one result."""
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        store = JobStore(redis, PREFIX, lease_seconds=10, max_losses=3)
        for number in range(jobs):
            request = {"models": ["x" * 2000]}
            job_id = store.records.create(NewJob(request, f"job {number}", {"team": "search"})).job_id
            attempt = store.tasks.claim("worker")
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


def lists(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Lists of jobs, each of which has the long result of a search."""
    with redis_server(folder / "redis") as url:
        size = fill(url, options.jobs, searched(options.trials))
        with api(url, folder / "data") as found, found.client() as client:
            least = milliseconds(client, "/healthz")
            listed = client.get("/jobs?limit=50").json()["data"]
            if len(listed) != min(50, options.jobs):
                raise RuntimeError(f"{len(listed)} jobs were listed")
            for path in ("/jobs?limit=50", "/jobs?limit=50&label=team:search", "/jobs?limit=50&status=succeeded"):
                ours = milliseconds(client, path)
                what = f"GET {path}, ms; {options.jobs} jobs, each with a result of {size / 1000:.0f} kB"
                yield row(what, ours, least, f"at most {LIST_MS:g} ms", is_met=ours <= LIST_MS)


def recipe(folder: Path) -> dict[str, Any]:
    """Two tiny experts, as files, and a merge of them."""
    from tests.tiny import tiny_checkpoint

    for seed, name in enumerate(("a", "b")):
        tiny_checkpoint(folder / name, labels=2, seed=seed)
    models = [{"name": name, "checkpoint": f"local:{name}"} for name in ("a", "b")]
    return {"method": {"name": "average"}, "models": models}


def queued(redis_url: str, jobs: int) -> list[str]:
    """Make so many jobs that wait, in the queue too, and return their ids."""
    with Redis.from_url(redis_url, decode_responses=True) as redis, connect_for_rq(redis_url) as for_rq:
        store = JobStore(redis, PREFIX, lease_seconds=10, max_losses=3)
        queue = TaskQueue(for_rq, PREFIX, store)
        ids = [store.records.create(NewJob({"models": ["x" * 2000]}, f"job {n}")).job_id for n in range(jobs)]
        queue.wake()
        kept(redis)
        return ids


async def polled(found: Api, ids: list[str], body: bytes, seconds: float) -> tuple[Load, Load]:
    """Poll jobs with many clients while another posts merges, and return how long each took."""
    draw, gets, posts = random.Random(0), Load(), Load()
    clients = [await Connection.open(found.port, found.key) for _ in range(CLIENTS)]
    poster = await Connection.open(found.port, found.key)
    await poster.ask("POST", "/merge", body)  # the first waits for the inspector to have started
    every_s = CLIENTS / GETS_PER_S
    until = time.perf_counter() + seconds

    def asking(client: Connection) -> Callable[[], Awaitable[Answer]]:
        return lambda: client.ask("GET", f"/jobs/{draw.choice(ids)}")

    pairs = zip(clients, spread(CLIENTS, every_s), strict=True)
    await asyncio.gather(
        *(repeated(asking(client), every_s, first, until, gets) for client, first in pairs),
        repeated(lambda: poster.ask("POST", "/merge", body), 1 / POSTS_PER_S, 0.1, until, posts),
    )
    for client in (*clients, poster):
        client.close()
    return gets, posts


async def least(found: Api) -> Load:
    load = Load()
    connection = await Connection.open(found.port, found.key)
    await repeated(lambda: connection.ask("GET", "/healthz"), 1 / GETS_PER_S, 0, time.perf_counter() + 2, load)
    connection.close()
    return load


def latency(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Requests while many jobs wait and many clients poll."""
    body = json.dumps(recipe(folder / "inputs")).encode()
    with redis_server(folder / "redis") as url:
        ids = queued(url, options.jobs)
        with api(url, folder / "data", local_roots=str(folder / "inputs")) as found:
            rounds, cpu_ms = [], []
            for _ in range(REPEATS):
                before = found.cpu_s()
                gets, posts = asyncio.run(polled(found, ids, body, options.seconds))
                cpu_ms.append(1000 * (found.cpu_s() - before) / len(gets.seconds))
                rounds.append((gets, posts))
            healthz = asyncio.run(least(found)).percentile_ms(99)
    get_ms = min(gets.percentile_ms(99) for gets, _ in rounds)
    post_ms = min(posts.percentile_ms(99) for _, posts in rounds)
    under = f"{options.jobs} jobs queued, {CLIENTS} clients polling, {GETS_PER_S} requests a second"
    yield row(
        f"GET /jobs/ID, p99, ms; {under}", get_ms, healthz, f"at most {GET_P99_MS:g} ms", is_met=get_ms <= GET_P99_MS
    )
    median = min(gets.percentile_ms(50) for gets, _ in rounds)
    yield row("the same, median, ms", median, healthz, f"at most {GET_P99_MS:g} ms", is_met=median <= GET_P99_MS)
    post_what = f"POST /merge, p99, ms, {POSTS_PER_S} a second beside these"
    yield row(post_what, post_ms, healthz, f"at most {POST_P99_MS:g} ms", is_met=post_ms <= POST_P99_MS)
    most_ms = 1000 / GETS_PER_S
    what = "processor time of the API for each GET, ms, with its share of the POSTs"
    yield row(what, min(cpu_ms), most_ms, f"at most {most_ms:g} ms", is_met=min(cpu_ms) <= most_ms)


def overhead(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """What the service adds to a job that its engine works on, from its acceptance to its end."""
    merge = recipe(folder / "inputs")
    create = [sys.executable, "-m", "app.cli", "keys", "create", "--data-dir", str(folder / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    key = subprocess.run(create, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    settings = {"data_dir": str(folder / "data"), "local_roots": str(folder / "inputs")}
    added, whole = [], []
    with started("serve", key, "/readyz", **settings) as found, found.client() as client:
        for number in range(MERGES + 1):
            job = client.post("/merge", json={**merge, "name": f"{TITLE} {number}"}).raise_for_status().json()
            while job["finished_at"] is None:
                job = client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=10"}).raise_for_status().json()
            if job["status"] != "succeeded":
                raise RuntimeError(f"the job has {job['status']}: {job['error']}")
            timings = {name: seconds for name, seconds in job["result"]["timings"].items() if name != "queue_seconds"}
            start, end = (time_of(job[name]) for name in ("created_at", "finished_at"))
            if number > 0:  # the first one warms
                whole.append(end - start)
                added.append(end - start - sum(timings.values()))
    ours = statistics.median(added)
    what = "warm job, accepted to succeeded, less the engine's own seconds, s; reference: all of it"
    yield row(what, ours, statistics.median(whole), f"at most {OVERHEAD_S:g} s", is_met=ours <= OVERHEAD_S)


def time_of(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def large_artifact(redis_url: str, data: Path) -> tuple[str, Path]:
    """Make a job with an artifact of one file, most of it holes, and return the file's path in the API and on disk."""
    store = FolderStore(data)
    store.prepare()
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        jobs = JobStore(redis, PREFIX, lease_seconds=3600, max_losses=3)
        job_id = jobs.records.create(NewJob({}, TITLE)).job_id
        attempt = jobs.tasks.claim("bench")
        assert isinstance(attempt, Attempt)  # noqa: S101 - nobody else is there to claim it
        folder = store.begin(attempt)
        path = folder / "model.safetensors"
        with path.open("wb") as stream:
            stream.truncate(ARTIFACT_BYTES)
            for place in range(0, ARTIFACT_BYTES - 4096, ARTIFACT_BYTES // 64):
                stream.seek(place)
                stream.write(random.Random(place).randbytes(4096))
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        files = [{"name": path.name, "bytes": ARTIFACT_BYTES, "sha256": sha256}]
        (folder / MANIFEST).write_text(json.dumps({"files": files}))
        if not jobs.tasks.succeed(attempt, searched(0), store.publish(attempt)):
            raise RuntimeError("the job did not succeed")
    return f"/jobs/{job_id}/artifacts/{path.name}", data / "artifacts" / f"{job_id}.1" / path.name


def asked_for(found: Api, path: str, **headers: str) -> tuple[socket.socket, dict[str, str]]:
    """Ask for a file, and return the connection with the file's bytes still in it, and the headers before them."""
    stream = socket.create_connection(("127.0.0.1", found.port))
    stream.sendall(request("GET", path, found.key, b"", **headers))
    status, answered = head_of(stream)
    if status not in (200, 206):
        raise RuntimeError(f"{path} is answered {status}")
    return stream, answered


def bytes_per_s(found: Api, path: str) -> float:
    start = time.perf_counter()
    stream, headers = asked_for(found, path)
    with stream:
        count = received(stream, most=int(headers["content-length"]))
    if count != ARTIFACT_BYTES:
        raise RuntimeError(f"{count} bytes came")
    return count / (time.perf_counter() - start)


def cat_bytes_per_s(path: Path) -> float:
    """The same file by `cat` to a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as writer:
        reader, _ = server.accept()
        start = time.perf_counter()
        with reader, subprocess.Popen(["cat", str(path)], stdout=writer.fileno()):
            count = received(reader, most=ARTIFACT_BYTES)
            return count / (time.perf_counter() - start)


def download(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """A large file of an artifact, whole, and again with the connection cut in the middle."""
    with redis_server(folder / "redis") as url:
        path, file = large_artifact(url, folder / "data")
        with api(url, folder / "data") as found:
            rates = [(bytes_per_s(found, path), cat_bytes_per_s(file)) for _ in range(REPEATS)]
            digest, cut_at = hashlib.sha256(), ARTIFACT_BYTES // 3
            stream, headers = asked_for(found, path)
            with stream:
                received(stream, digest.update, cut_at)
            stream, rest = asked_for(found, path, Range=f"bytes={cut_at}-", If_Range=headers["etag"])
            with stream:
                received(stream, digest.update, int(rest["content-length"]))
            with file.open("rb") as whole:
                is_same = digest.digest() == hashlib.file_digest(whole, "sha256").digest()
    ours, cat = max(rates, key=lambda pair: pair[0] / pair[1])
    size = f"{ARTIFACT_BYTES / 1e9:g} GB"
    target = f"at least {SHARE_OF_CAT:g} of cat to loopback"
    yield row(f"download of {size}, MB/s", ours / 1e6, cat / 1e6, target, is_met=ours >= SHARE_OF_CAT * cat)
    yield row(f"{size} after a cut at a third: 1 where it is the same file", is_same, 1, "1", is_met=is_same)


async def listened(found: Api, ids: list[str]) -> tuple[int, int]:
    """Open the event streams, and return how many told the queueing of their job, and what memory they take."""
    before = found.process.memory_info().rss
    streams = [await Connection.open(found.port, found.key) for _ in range(LISTENERS)]

    async def first(stream: Connection, job_id: str) -> bool:
        status, _ = await stream.begin("GET", f"/jobs/{job_id}/events")
        async for line in stream.lines():
            if line.startswith(b"data:"):
                return status == 200 and b"queued" in line
        return False

    told = await asyncio.gather(*(first(stream, job_id) for stream, job_id in zip(streams, ids, strict=True)))
    await asyncio.sleep(2)  # by then each waits for news
    after = found.process.memory_info().rss
    for stream in streams:
        stream.close()
    return sum(told), after - before


def listeners(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Readers of events, each of a job of its own."""
    with redis_server(folder / "redis") as url:
        ids = queued(url, LISTENERS)
        with api(url, folder / "data") as found:
            with found.client() as client:
                client.get(f"/jobs/{ids[0]}").raise_for_status()
            told, taken = asyncio.run(listened(found, ids))
    if told != LISTENERS:
        raise RuntimeError(f"{told} of {LISTENERS} streams told of their job")
    target = f"at most {LISTENERS_BYTES / 1e6:g} MB"
    yield row(f"{LISTENERS} event listeners, MB", taken / 1e6, LISTENERS_BYTES / 1e6, target,
              is_met=taken <= LISTENERS_BYTES)  # fmt: skip


def webhooks(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Deliveries to a receiver that fails, stalls, redirects and answers 410 in turn, each sent again by request."""
    from tests.receivers import answering, receiving, stalling

    merge = recipe(folder / "inputs")
    settings = {"webhook_allow_private": "true", "webhook_seconds": "0.5", "local_roots": str(folder / "inputs")}
    faults = [answering(500), stalling, answering(302, Location="/elsewhere"), answering(410)]
    with (
        redis_server(folder / "redis") as url,
        api(url, folder / "data", **settings) as found,
        found.client() as client,
        receiving(*faults * RECEIVED, answering(204)) as receiver,
    ):
        client.post("/webhooks/secret", json={}).raise_for_status()
        hook = {"url": receiver.url, "events": ["job.cancelled"]}
        paths, lost = [], 0
        for number in range(RECEIVED):
            job = client.post("/merge", json={**merge, "name": f"{TITLE} {number}", "webhook": hook}).raise_for_status()
            paths.append(f"/jobs/{job.json()['id']}")
            client.post(f"{paths[-1]}/cancel").raise_for_status()
        for path in paths:
            lost += not is_delivered(client, path)
        if len(receiver.received) < len(faults) * RECEIVED:
            raise RuntimeError(
                f"the receiver was asked {len(receiver.received)} times and has not shown all its faults"
            )
    what = f"of {RECEIVED} webhooks lost by a receiver that fails, stalls, redirects and answers 410"
    yield row(what, lost, 0, "0", is_met=lost == 0)


def is_delivered(client: httpx.Client, path: str) -> bool:
    """Ask for a job's delivery again whenever an attempt has failed, and return whether it arrives in the end."""
    attempts, deadline = 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        (delivery,) = client.get(f"{path}/deliveries").raise_for_status().json()["data"]
        if delivery["state"] == "delivered":
            return True
        if len(delivery["attempts"]) > attempts:
            attempts = len(delivery["attempts"])
            client.post(f"{path}/deliveries/{delivery['n']}/redeliver").raise_for_status()
        time.sleep(0.05)
    return False


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    "latency": latency, "overhead": overhead, "download": download, "listeners": listeners, "webhooks": webhooks,
    "lists": lists,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=15, help="length of each of three rounds of polling")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.only:
        with TemporaryDirectory() as folder:
            rows += PARTS[name](Path(folder), options)
    shown(options.json, rows)


if __name__ == "__main__":
    main()
