"""Real jobs, and random faults under them. Whatever dies: every accepted job ends once, in the right state, with the
bits of a run that nothing disturbed, and nothing is left of the attempts that died.

    python -m tests.faults.chaos [--kills N] [--hold SECONDS] [--only FAULT ...] [--seed N] [--json FILE]

A round submits jobs, does a few faults while they run, waits for the jobs and looks at everything. The same seed gives
the same faults, though not at the same instants of the work. As root, where `ip` is, a worker lives in a network
namespace of its own whose wire is cut, and the data folder is a small file system that runs full.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from app.client import Client, Refused, Unreachable
from app.contracts.devices import LANES
from app.contracts.events import LogCode, LogEntry, StatusChange
from app.contracts.jobs import Job, Status
from app.storage.keys import Keys
from bench.table import console, shown
from tests.conftest import tiny_recipe
from tests.faults.fleet import (
    Fault,
    Fleet,
    all_killed,
    configured,
    disconnected,
    full,
    has_namespaces,
    killed,
    suspended,
)
from tests.tiny import tiny_base, tiny_checkpoint, write_rows

Recipe = dict[str, Any]

ROWS = 2000  # scored in about a second, so that most faults meet somebody at work
LEASE_S = 4.0
RECOVERY_S = 15.0
"""Seconds within which a lost task waits again: the promise."""
WEIGHTS = ".safetensors"
FINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
DISK_BYTES = 64_000_000
KILLS = ("engine", "worker", "api", "inspector", "redis", "supervisor", "everything")
FAULTS: Final = (
    *KILLS, "engine stands still", "worker stands still", "redis stands still", "network is cut", "disk is full",
    "redis has no memory", "redis is read-only",
)  # fmt: skip


def faults(rng: random.Random) -> Mapping[str, Fault]:
    """Return all faults by name; which process of several it meets is drawn."""
    one = rng.choice
    return {
        **{role: killed(role, one) for role in KILLS[:-1]},
        "everything": all_killed,
        "engine stands still": suspended("engine", one),
        "worker stands still": suspended("worker", one),
        "redis stands still": suspended("redis", one),
        "network is cut": disconnected,
        "disk is full": full,
        "redis has no memory": configured(("CONFIG", "SET", "maxmemory", "1mb"), ("CONFIG", "SET", "maxmemory", "0")),
        "redis is read-only": configured(("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    }


def recipes(inputs: Path) -> dict[str, Recipe]:
    """Write inputs, and return jobs of several kinds: with and without rows, searching, and measuring alone."""
    tiny_base(inputs / "checkpoints" / "base")
    for seed, (name, labels) in enumerate({"a": 2, "b": 3, "c": 2}.items()):
        tiny_checkpoint(inputs / "checkpoints" / name, labels=labels, seed=seed)
        write_rows(inputs / "rows" / f"{name}.jsonl", count=ROWS, labels=labels, seed=seed)
    found = {
        "average": tiny_recipe("a", "b", "c", name="average"),
        "mask_fisher": tiny_recipe("a", "b", examples=ROWS, batch_tokens=1024),  # otherwise the fastest is looked for
        "regmean": tiny_recipe("b", "c", name="regmean", examples=ROWS),
        "fisher": tiny_recipe("a", "c", name="fisher", examples=200),
    }
    search = tiny_recipe("a", "b", name="auto", candidates=["average", "regmean"], trials=4, examples=400)
    return {**found, "auto": search}


@dataclass
class Tally:
    """What came of a run."""

    kills: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    attempts: int = 0
    wrong: list[str] = field(default_factory=list)
    """What should not be, each with its job."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds from the end of a worker to its task waiting again."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of targets."""
        longest = max(self.recoveries, default=0.0)
        what = f"{self.kills} kills and {sum(self.faults.values()) - self.kills} other faults, {self.jobs} jobs"
        yield {
            "what": f"{what}: lost, doubled, different or left over", "ours": len(self.wrong), "reference": 0,
            "ratio": None, "target": "0", "met": not self.wrong,
        }  # fmt: skip
        yield {
            "what": f"longest recovery of {len(self.recoveries)}, s", "ours": longest, "reference": RECOVERY_S,
            "ratio": longest / RECOVERY_S, "target": f"<= {RECOVERY_S:g}", "met": longest <= RECOVERY_S,
        }  # fmt: skip


class Chaos:
    """Submits jobs to a fleet, does faults, and looks at what is left."""

    def __init__(self, fleet: Fleet, jobs: Mapping[str, Recipe], rng: random.Random, hold_s: float) -> None:
        self._fleet = fleet
        self._recipes = jobs
        self._rng = rng
        self._hold_s = hold_s
        self._faults = faults(rng)
        self._ended: dict[int, float] = {}
        """Times at which processes were killed, by id."""
        self._client = Client(fleet.url, timeout_s=60)
        self.tally = Tally()
        self._accepted: dict[str, str] = {}
        """Names of the recipes of all jobs, by id."""
        self._undisturbed = {name: self._digests(job) for name, job in self._round(list(jobs))}
        self._check()

    def round(self, names: Sequence[str], count: int) -> None:
        """Submit `count` jobs, do the faults of these names, wait, and check."""
        self._forget_statistics()
        submitted = [(name, self._submit(name)) for name in self._rng.choices(list(self._recipes), k=count)]
        for name in names:
            time.sleep(self._rng.uniform(0.1, 1.5))  # the time of the fault is what is tried here
            now = time.time()
            ended = self._faults[name](self._fleet, self._hold_s)
            self._ended.update(dict.fromkeys(ended, now))
            self.tally.kills += bool(ended)
            self.tally.faults[name] += 1
            self._fleet.keep_running()
        for name, job_id in submitted:
            job = self._finished(job_id)
            self.tally.attempts += job.attempt
            if job.status is not Status.SUCCEEDED:
                self._wrong(job_id, f"{job.status}: {job.error}")
            elif self._digests(job) != self._undisturbed[name]:
                self._wrong(job_id, f"its files differ from those of an undisturbed {name}")
        self._check()

    def _round(self, names: Sequence[str]) -> list[tuple[str, Job]]:
        return [(name, self._finished(self._submit(name))) for name in names]

    def _submit(self, name: str) -> str:
        """Have the service accept a job, however often it is away; by its key it is one job."""
        key = f"chaos-{self._rng.getrandbits(64):016x}"
        while True:
            with suppress(Unreachable):
                try:
                    job = self._client.submit(self._recipes[name], idempotency_key=key)
                    break
                except Refused as refused:
                    if refused.status < 500:
                        raise
            self._fleet.keep_running()
            time.sleep(0.2)
        self._accepted[job.id] = name
        self.tally.jobs += 1
        return job.id

    def _finished(self, job_id: str) -> Job:
        """Wait for a job; one that failed for want of disk is tried again, as its error says."""
        while True:
            with suppress(Unreachable, Refused):
                job = self._client.job(job_id)
                if job.status in FINAL and job.error is not None and job.error.code == "disk_full":
                    self._client.retry(job_id)
                elif job.status in FINAL:
                    return job
            self._fleet.keep_running()
            time.sleep(0.1)

    def _digests(self, job: Job) -> dict[str, str]:
        """Return the digests of the weights. Cards and manifests have the job's id and times."""
        return {file.name: file.sha256 for file in self._client.artifacts(job.id).files if file.name.endswith(WEIGHTS)}

    def _forget_statistics(self) -> None:
        """Have everything measured again; nothing runs now."""
        for entry in (self._fleet.data_dir / "statistics").glob("*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _wrong(self, subject: str, why: str) -> None:
        console.print(f"[red]{subject}: {why}", highlight=False)
        self.tally.wrong.append(f"{subject}: {why}")

    # --- what is left -------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Look at all jobs, at Redis, at the data folder and at the processes. Nothing runs now."""
        listed = Counter(job.id for job in self._client.jobs())
        for job_id in {*listed} | {*self._accepted}:
            if listed[job_id] != 1 or job_id not in self._accepted:
                self._wrong(job_id, f"is listed {listed[job_id]} times")
            self._check_events(job_id)
        kept = sorted(path.name.partition(".")[0] for path in (self._fleet.data_dir / "artifacts").iterdir())
        if kept != sorted(self._accepted):
            self._wrong("artifacts", f"{len(kept)} folders of {len(self._accepted)} jobs: {kept}")
        for left in self._left_after(self._fleet.data_dir / "work"):
            self._wrong("work", f"{left} is left")
        for orphan in self._fleet.orphans():
            self._wrong("processes", f"{orphan} has no parent")
        for left in self._left_in_redis():
            self._wrong("redis", left)

    def _check_events(self, job_id: str) -> None:
        workers: dict[int, int] = {}
        ends = 0
        for event in self._client.events(job_id):
            if isinstance(event.data, StatusChange):
                ends += event.data.status in FINAL and event.data.error is None
            elif isinstance(event.data, LogEntry):
                self._note_attempt(event.data, workers)
        if ends != 1:
            self._wrong(job_id, f"ended {ends} times")

    def _note_attempt(self, entry: LogEntry, workers: dict[int, int]) -> None:
        """Take the time from the end of the worker of an attempt, whose name has its id, to the loss of the attempt."""
        named = re.search(r"on worker \S*?-(\d+)-\w+", entry.message)
        if entry.code is LogCode.ATTEMPT_STARTED and named:
            workers[entry.attempt] = int(named[1])
        elif entry.code is LogCode.ATTEMPT_LOST and (ended := self._ended.get(workers.get(entry.attempt, 0))):
            seconds = entry.at.timestamp() - ended
            if seconds > 0:  # otherwise it stood still, and was killed when its attempt was lost already
                self.tally.recoveries.append(seconds)

    @staticmethod
    def _left_after(folder: Path, seconds: float = 20.0) -> list[str]:
        """Return what is in a folder that the sweep of the service should have emptied by then."""
        deadline = time.monotonic() + seconds
        while (found := [path.name for path in folder.glob("*")]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _left_in_redis(self) -> Iterator[str]:
        keys = Keys("maskmerge")
        with self._fleet.redis() as redis:
            for tenant in redis.zrange(keys.tenants, 0, -1):
                for key in (*(keys.waiting(tenant, lane) for lane in LANES), keys.running(tenant)):
                    if redis.exists(key):
                        yield f"{key} has {redis.zrange(key, 0, -1)}"
            for tenant, count in redis.hgetall(keys.reserved).items():
                if int(count):
                    yield f"{count} bytes are reserved for {tenant}"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in a folder. It takes root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def possible(asked: Sequence[str]) -> list[str]:
    """Return the faults that can be done here; those that were asked for and cannot are told."""
    missing = set() if os.geteuid() == 0 else {"disk is full"}
    missing |= set() if has_namespaces() else {"network is cut"}
    for name in missing & {*asked}:
        console.print(f"'{name}' is left out: it takes root{' and ip' * (name == 'network is cut')}")
    return [name for name in asked if name not in missing]


def run(
    folder: Path, names: Sequence[str], *, kills: int, hold_s: float, seed: int, jobs: int = 4, each: int = 3
) -> Tally:
    """Do faults in rounds, `each` in one with `jobs` jobs, until so many of them were kills."""
    rng = random.Random(seed)
    order: list[str] = []
    settings = {"lease_seconds": f"{LEASE_S:g}", "heartbeat_seconds": f"{LEASE_S:g}", "max_losses": "1000"}
    settings["threads"] = "1"  # bits depend on their number, and the remote worker would take all cores
    settings["min_free_bytes"] = "0"  # jobs should meet the full disk, instead of being refused before
    with ExitStack() as stack:
        data = stack.enter_context(small_disk(folder / "data")) if "disk is full" in names else None
        asked = recipes(folder / "inputs")
        fleet = stack.enter_context(Fleet(folder, folder / "inputs", settings=settings).started())
        assert data is None or fleet.data_dir == data
        chaos = Chaos(fleet, asked, rng, hold_s)
        while chaos.tally.kills < kills:
            while len(order) < each:
                order += rng.sample(list(names), len(names))  # every one as often as the others
            turn, order = order[:each], order[each:]
            chaos.round(turn, jobs)
            console.print(f"{chaos.tally.kills} kills, {chaos.tally.jobs} jobs, {len(chaos.tally.wrong)} wrong: {turn}")
        return chaos.tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Random faults under real jobs.")
    parser.add_argument("--kills", type=int, default=1000, help="at least (%(default)s)")
    parser.add_argument("--hold", type=float, default=45, help="seconds that a fault lasts (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, metavar="FAULT", help="(all of them)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    options = parser.parse_args()
    names = possible(options.only)
    if not {*names} & {*KILLS}:
        parser.error("name a fault that kills, since kills are counted")
    with TemporaryDirectory(prefix="maskmerge-chaos-", ignore_cleanup_errors=True) as folder:
        found = run(Path(folder), names, kills=options.kills, hold_s=options.hold, seed=options.seed)
        shown(options.json, list(found.rows()))
        if found.wrong:
            shutil.copy(Path(folder) / "fleet.log", "chaos.log")
            sys.exit(f"{len(found.wrong)} things are wrong; chaos.log has the log of all processes")


if __name__ == "__main__":
    main()
