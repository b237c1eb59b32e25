"""Every metric of the service: its name, its labels, and what it says.

Jobs are counted where they change, by the Lua script that makes the change, in one hash in Redis: so each is counted
once, whichever process dies, and every API tells the same numbers. Requests are counted by the API process that
answers them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.devices import LANES
from app.contracts.jobs import ErrorCode, JobKind, Status
from app.contracts.webhooks import DeliveryState
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult

SUM = "sum"  # part of a sum's name, in the place of a bucket
SECONDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0, 86_400.0)
ANSWER_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BYTES = tuple(float(2**power) for power in range(28, 40))  # 256 MiB to 512 GiB


@dataclass(frozen=True)
class Metric:
    """A metric. `labels` maps each label to the values that are known before anything happened."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    meaning: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without infinity."""

    @property
    def label_names(self) -> list[str]:
        return [name for name, _ in self.labels]

    def known(self) -> Iterator[tuple[str, ...]]:
        """Yield the values of the labels that are told, as 0, before anything happened."""
        yield from product(*(values for _, values in self.labels))


TENANT = ("tenant", (DEFAULT_TENANT,))
KIND = ("kind", tuple(JobKind))
PHASES = ("queue", "load", "score", "search", "merge", "align", "evaluate", "interference", "publish")
RESTARTS = ("stopped", "ended", "hung", "out_of_memory", "grew")

REDIS_UP = Metric("gauge", "maskmerge_redis_up", "1 if Redis answers. If it does not, this is the only metric.")
WORKERS = Metric("gauge", "maskmerge_workers", "Workers that are alive, with an engine process that is well.")
ACTIVE = Metric(
    "gauge",
    "maskmerge_jobs_active",
    "Jobs that wait for a worker, and jobs that run or are being cancelled.",
    (TENANT, ("status", ("queued", "running"))),
)
OLDEST = Metric(
    "gauge",
    "maskmerge_jobs_oldest_age_seconds",
    "Of waiting jobs, the time since the oldest was accepted; of running ones, since the first of them was begun.",
    ACTIVE.labels,
)
WAITING = Metric(
    "gauge",
    "maskmerge_tasks_waiting",
    "Jobs and shards that wait, by the device that the job asks for; `any` where it asks for none.",
    (("device", LANES),),
)
DISK_FREE = Metric("gauge", "maskmerge_disk_free_bytes", "Room that the service may still use beside the data folder.")
DISK_SIZE = Metric("gauge", "maskmerge_disk_size_bytes", "Size of the file system of the data folder.")

ACCEPTED = Metric("counter", "maskmerge_jobs_accepted_total", "Jobs that were accepted.", (TENANT, KIND))
FINISHED = Metric(
    "counter",
    "maskmerge_jobs_finished_total",
    "Jobs that ended, by outcome. A job that is retried ends again.",
    (TENANT, KIND, ("outcome", tuple(status for status in Status if status.is_final))),
)
FAILURES = Metric(
    "counter",
    "maskmerge_job_failures_total",
    "Jobs that failed, by the code of their error.",
    (TENANT, ("code", tuple(ErrorCode))),
)
STARTED = Metric("counter", "maskmerge_attempts_started_total", "Attempts that workers began.", (TENANT,))
LOST = Metric(
    "counter",
    "maskmerge_attempts_lost_total",
    "Attempts that ended without an outcome: the lease ran out, or the engine process ended or hung.",
    (TENANT, ("cause", ("lease", "engine"))),
)
PHASE = Metric(
    "histogram",
    "maskmerge_job_phase_seconds",
    "Duration of each phase of jobs that succeeded; those that a job skips are left out.",
    (("phase", PHASES),),
    SECONDS,
)
PEAK = Metric(
    "histogram",
    "maskmerge_job_peak_memory_bytes",
    "Largest resident memory of the engine process during a job that succeeded.",
    (("device", ("cpu",)),),
    BYTES,
)
EXAMPLES = Metric("counter", "maskmerge_examples_measured_total", "Rows measured for statistics of models.")
MEASURING = Metric("counter", "maskmerge_examples_measuring_seconds_total", "Time that measuring these rows took.")
LOOKUPS = Metric(
    "counter",
    "maskmerge_statistics_lookups_total",
    "Models whose statistics a job that succeeded needed: `hit` if all of them were kept from another job.",
    (("result", ("hit", "miss")),),
)
ENGINE_RESTARTS = Metric(
    "counter",
    "maskmerge_engine_restarts_total",
    "Engine processes that were replaced: `stopped` by the worker, because a job was not wanted any more; `ended` by "
    "itself or killed; `hung`; `out_of_memory`; `grew` beyond MASKMERGE_MAX_WORKER_BYTES.",
    (("reason", RESTARTS),),
)
WEBHOOK_ATTEMPTS = Metric(
    "counter",
    "maskmerge_webhook_attempts_total",
    "Attempts at deliveries to webhooks, by what the delivery is after it: `pending` if another attempt follows.",
    (("state", tuple(DeliveryState)),),
)

STORED = (
    ACCEPTED, FINISHED, FAILURES, STARTED, LOST, PHASE, PEAK, EXAMPLES, MEASURING, LOOKUPS, ENGINE_RESTARTS,
    WEBHOOK_ATTEMPTS
)  # fmt: skip
"""Metrics that Redis holds, as sums that only grow."""

REQUESTS = Metric(
    "counter",
    "maskmerge_http_requests_total",
    "Requests that were answered. `route` is the template of the path; it is empty where there is no such route.",
    (("method", ()), ("route", ()), ("status", ())),
)
LATENCY = Metric(
    "histogram",
    "maskmerge_http_request_duration_seconds",
    "Time from a request's headers to the first byte of its answer, with the waiting that `Prefer: wait` asks for.",
    (("method", ()), ("route", ())),
    ANSWER_SECONDS,
)
METRICS = (REDIS_UP, WORKERS, ACTIVE, OLDEST, WAITING, DISK_FREE, DISK_SIZE, *STORED, REQUESTS, LATENCY)

Count = tuple[str, float]
"""The name of a sum in Redis, and by how much it grows."""


def counted(metric: Metric, *labels: str, by: float = 1) -> Count:
    """Return the count that adds to a counter."""
    assert len(labels) == len(metric.labels)  # noqa: S101 - a mistake in the code, not of a caller
    return " ".join((metric.name, *labels)), by


def observed(metric: Metric, value: float, *labels: str) -> Sequence[Count]:
    """Return the counts that add a value to a histogram: to the one bucket that it falls in, and to the sum."""
    name, _ = counted(metric, *labels)
    bound = next((bound for bound in metric.buckets if value <= bound), float("inf"))
    return [(f"{name} {bucket(bound)}", 1), (f"{name} {SUM}", value)]


def bucket(bound: float) -> str:
    """Return the part of a sum's name that says which bucket of a histogram it counts."""
    return f"{bound:.15g}"


def counts_of(result: MergeResult | ScoreResult) -> list[Count]:
    """Return what a job's success adds."""
    counts = [*observed(PEAK, result.peak_memory_bytes, result.device.partition(":")[0] or "cpu")]
    for phase in PHASES:
        seconds = getattr(result.timings, f"{phase}_seconds")
        if seconds > 0:
            counts += observed(PHASE, seconds, phase)
    for model in result.models:
        if model.examples:
            counts.append(counted(LOOKUPS, "hit" if model.score_cached else "miss"))
            if not model.score_cached:
                counts += [counted(EXAMPLES, by=model.examples), counted(MEASURING, by=model.score_seconds)]
    return counts
