"""`GET /metrics` tells what Redis counts of all jobs, and what this process counts of requests, for Prometheus."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from app.api.authentication import authenticate
from app.api.strict_route import StrictRoute
from app.contracts.api_keys import Scope
from app.observability import metrics as told
from app.observability.metrics import Metric
from app.storage.jobs import JobStore

Values = Mapping[tuple[str, ...], float]
"""Values of a metric by those of its labels."""
OPEN = "application/openmetrics-text"
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The metrics", "content": {"text/plain": {}, OPEN: {}}}
}


class ApiMetrics:
    """The metrics that one API process tells."""

    def __init__(self, store: JobStore, data_dir: Path) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began is nothing that anybody asks
        self._registry = CollectorRegistry()
        self._registry.register(SharedMetrics(store, data_dir))
        self._requests = Counter(
            told.REQUESTS.name, told.REQUESTS.meaning, told.REQUESTS.label_names, registry=self._registry
        )
        self._latency = Histogram(
            told.LATENCY.name,
            told.LATENCY.meaning,
            told.LATENCY.label_names,
            registry=self._registry,
            buckets=told.LATENCY.buckets,
        )
        ProcessCollector(registry=self._registry)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered after `seconds`."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(seconds)

    def exposed(self, *, is_open: bool, knows_redis: bool = True) -> Response:
        """Return all metrics; where Redis is away, the one that says so. Raises redis exceptions.

        Args:
            is_open: whether the reader takes OpenMetrics, which Prometheus prefers.
        """
        registry = self._registry
        if not knows_redis:
            registry = CollectorRegistry()
            registry.register(_RedisAway())
        generate = cast(
            Callable[[Collector], bytes], openmetrics.generate_latest if is_open else exposition.generate_latest
        )
        media_type = openmetrics.CONTENT_TYPE_LATEST if is_open else exposition.CONTENT_TYPE_PLAIN_0_0_4
        return Response(generate(registry), media_type=media_type, headers={"Cache-Control": "no-store"})


class SharedMetrics(Collector):
    """The metrics of Redis and of the data folder, which all API processes share.

    However many jobs there are, a scrape reads the same few keys.
    """

    def __init__(self, store: JobStore, data_dir: Path) -> None:
        self._store = store
        self._data_dir = data_dir

    def collect(self) -> Iterator[Family]:
        """Yield the metrics. Raises redis exceptions."""
        sums: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for name, value in self._store.sums.read().items():
            metric, *labels = name.split(" ")
            sums[metric][tuple(labels)] = value
        yield _family(told.REDIS_UP, {(): 1})
        yield _family(told.WORKERS, {(): self._store.workers.count()})
        now = self._store.clock()
        active: dict[tuple[str, ...], float] = {}
        oldest: dict[tuple[str, ...], float] = {}
        waiting: dict[tuple[str, ...], float] = defaultdict(float)
        for of in self._store.tasks.counts():
            for lane, count in of.waiting_in.items():
                waiting[(lane,)] += count
            active |= {(of.tenant, "queued"): of.waiting, (of.tenant, "running"): of.running}
            for status, since_ms in (("queued", of.oldest_waiting_ms), ("running", of.first_started_ms)):
                oldest[of.tenant, status] = 0.0 if since_ms is None else (now - since_ms) / 1000
        yield _family(told.ACTIVE, active)
        yield _family(told.OLDEST, oldest)
        yield _family(told.WAITING, waiting)
        with suppress(OSError):  # whether the folder can be used is for /readyz to say
            disk = shutil.disk_usage(self._data_dir)
            yield _family(told.DISK_FREE, {(): disk.free})
            yield _family(told.DISK_SIZE, {(): disk.total})
        for stored in told.STORED:
            yield _family(stored, sums[stored.name])


class _RedisAway(Collector):
    def collect(self) -> Iterator[Family]:
        yield _family(told.REDIS_UP, {(): 0})


def _family(metric: Metric, values: Values) -> Family:
    """Return a metric as Prometheus's library has it. Values that are not there are 0, where labels are known."""
    if metric.kind == "histogram":
        return _histogram(metric, values)
    family = (GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily)(
        metric.name, metric.meaning, labels=metric.label_names
    )
    for labels, value in {**dict.fromkeys(metric.known(), 0.0), **values}.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: Metric, values: Values) -> Family:
    """Return a histogram from its sums: those of each bucket alone, and of all values."""
    family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.label_names)
    parts: dict[tuple[str, ...], dict[str, float]] = {labels: {} for labels in metric.known()}
    for (*labels, part), value in values.items():
        parts.setdefault(tuple(labels), {})[part] = value
    for key, found in parts.items():
        buckets, total = [], 0.0
        for bound in (*metric.buckets, float("inf")):
            total += found.get(told.bucket(bound), 0)
            buckets.append(("+Inf" if bound == float("inf") else f"{bound:.1f}", total))
        family.add_metric(key, buckets, found.get(told.SUM, 0.0))
    return family


class MetricsRoute(StrictRoute):
    """A route that finds out itself who calls: Redis, which knows the keys, may be away."""

    is_public = True


router = APIRouter(tags=["health"], route_class=MetricsRoute)


@router.get("/metrics", response_class=Response, responses=RESPONSES)
def metrics(request: Request) -> Response:
    """Return metrics of all tenants' jobs and of this process's requests, for Prometheus.

    It needs a key with the scope `metrics` or `admin`. While Redis does not answer, no key can be checked, and the
    answer says just that: `maskmerge_redis_up 0`.
    """
    api_metrics: ApiMetrics = request.app.state.metrics
    is_open = any(OPEN in accepted for accepted in request.headers.getlist("accept"))
    try:
        authenticate(request, Scope.METRICS)
        return api_metrics.exposed(is_open=is_open)
    except RedisError:
        return api_metrics.exposed(is_open=is_open, knows_redis=False)
