"""The client for programs with an event loop (asyncio)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx
from httpx_retries import aretry_request
from httpx_sse import EventSource

from app.client import calls, downloads, steps, transport, uploads
from app.client.blocking import Client
from app.client.calls import Call, Recipe, Row
from app.client.downloads import OnBytes
from app.client.errors import Refused, Unreachable
from app.client.steps import Do, Emit, Next, Open, Send, Sleep, Step, Steps, proceed
from app.contracts.api_keys import CreatedKey, Key, NewKey
from app.contracts.artifacts import Listing
from app.contracts.events import Event, LogEntry
from app.contracts.jobs import Job, JobSummary
from app.contracts.methods import MethodDescription
from app.contracts.plans import Plan
from app.contracts.scores import ScoresEntry
from app.contracts.webhooks import CreatedSecret, Delivery, ReceiverTestOutcome
from worker.engine.catalog.contracts.prediction import Prediction

Answer = TypeVar("Answer")


class AsyncClient:
    """Talks to one service, as `Client` does; its methods are to be awaited, and its iterators are asynchronous.

    It takes the same arguments, and its methods have the same descriptions.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = transport.TIMEOUT_S,
        retries: int = transport.RETRIES,
    ) -> None:
        self._http = httpx.AsyncClient(**transport.options(url, api_key, timeout_s))
        self._retries = transport.retries(retries)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def is_ready(self) -> bool:
        try:
            await self._send(calls.ready(), is_repeatable=False)
        except (Refused, Unreachable):
            return False
        return True

    async def submit(self, recipe: Recipe, *, idempotency_key: str | None = None) -> Job:
        return await self._send(calls.submit(recipe, idempotency_key))

    async def put(self, key: str, recipe: Recipe) -> Job:
        return await self._send(calls.put(key, recipe))

    async def submit_scores(self, recipe: Recipe, *, idempotency_key: str | None = None) -> Job:
        return await self._send(calls.submit_scores(recipe, idempotency_key))

    async def validate(self, recipe: Recipe) -> Plan:
        return await self._send(calls.validate(recipe))

    async def job(self, job_id: str) -> Job:
        return await self._send(calls.job(job_id))

    def jobs(
        self, *, status: str | None = None, labels: Mapping[str, str] | None = None, page_size: int = 100
    ) -> AsyncIterator[JobSummary]:
        return self._each(steps.each_job(status, labels, page_size))

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        job: Job = await self._done(steps.wait(job_id, timeout_s))
        return job

    def events(self, job_id: str, last_event_id: int | None = None) -> AsyncIterator[Event]:
        return self._each(steps.events(job_id, last_event_id))

    def log(self, job_id: str, last_event_id: int | None = None) -> AsyncIterator[LogEntry]:
        return self._each(steps.log(job_id, last_event_id))

    async def cancel(self, job_id: str) -> Job:
        return await self._send(calls.cancel(job_id))

    async def retry(self, job_id: str) -> Job:
        return await self._send(calls.retry(job_id))

    async def predict(
        self, job_id: str, model: str, rows: Sequence[Row], *, max_new_tokens: int | None = None
    ) -> Prediction:
        return await self._send(calls.predict(job_id, model, rows, max_new_tokens))

    async def delete(self, job_id: str) -> None:
        await self._send(calls.delete(job_id))

    async def artifacts(self, job_id: str) -> Listing:
        return await self._send(calls.artifacts(job_id))

    async def download(self, job_id: str, folder: Path | str, *, on_bytes: OnBytes | None = None) -> None:
        await self._done(downloads.download(job_id, Path(folder), on_bytes))

    async def upload(self, path: Path | str, *, on_bytes: OnBytes | None = None) -> str:
        reference: str = await self._done(uploads.upload(Path(path), on_bytes))
        return reference

    async def archive(self, job_id: str, path: Path | str) -> None:
        await self._done(downloads.archive(job_id, Path(path)))

    def scores(
        self, *, checkpoint: str | None = None, statistic: str | None = None, page_size: int = 100
    ) -> AsyncIterator[ScoresEntry]:
        return self._each(steps.each_score(checkpoint, statistic, page_size))

    async def methods(self) -> list[MethodDescription]:
        return await self._send(calls.methods())

    async def keys(self) -> list[Key]:
        return await self._send(calls.keys())

    async def create_key(self, new: NewKey) -> CreatedKey:
        return await self._send(calls.create_key(new))

    async def revoke_key(self, key_id: str) -> None:
        await self._send(calls.revoke_key(key_id))

    async def deliveries(self, job_id: str) -> list[Delivery]:
        return await self._send(calls.deliveries(job_id))

    async def redeliver(self, job_id: str, n: int) -> Delivery:
        return await self._send(calls.redeliver(job_id, n))

    async def rotate_webhook_secret(self, overlap_seconds: int | None = None) -> CreatedSecret:
        return await self._send(calls.rotate_webhook_secret(overlap_seconds))

    async def test_webhook(self, url: str) -> ReceiverTestOutcome:
        return await self._send(calls.test_webhook(url))

    async def _send(self, call: Call[Answer], *, is_repeatable: bool = True) -> Answer:
        with transport.translated():
            try:
                if is_repeatable and call.is_repeatable:
                    response = await aretry_request(self._http, retry=self._retries, **call.request)
                else:
                    response = await self._http.request(**call.request)
            except transport.AskedToWait as asked:
                response = asked.response
        return transport.answer(call, response)

    async def _done(self, operation: Steps) -> Any:
        """Do all steps, and return the item that they emit."""
        emitted = [item async for item in self._each(operation)]
        return emitted[-1] if emitted else None

    async def _each(self, operation: Steps) -> AsyncIterator[Any]:
        """Do the steps, and yield the items that they emit."""
        async with aclosing(_Opened(self._http)) as opened:
            with closing(operation):
                step = proceed(operation)
                while step is not None:
                    if isinstance(step, Emit):
                        yield step.item
                        step = proceed(operation)
                        continue
                    try:
                        found = await self._perform(step, opened)
                    except Exception as error:
                        step = proceed(operation, error=error)
                    else:
                        step = proceed(operation, found)

    async def _perform(self, step: Step, opened: "_Opened") -> Any:
        match step:
            case Send(call):
                return await self._send(call)
            case Open(call, as_events):
                return await opened.open(call, as_events)
            case Next():
                return await opened.next()
            case Sleep(seconds):
                await anyio.sleep(seconds)
            case Do(function):
                return await anyio.to_thread.run_sync(function)
        return None


class _Opened:
    """The answer that an operation reads as it comes."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._content: AsyncIterator[Any]

    async def open(self, call: Call[None], as_events: bool) -> httpx.Response:
        await self.aclose()
        with transport.translated():
            request = self._http.build_request(**call.request)
            self._response = response = await self._http.send(request, stream=True, follow_redirects=not as_events)
            if not response.is_success:
                await response.aread()
        transport.check(call, response)
        self._content = EventSource(response).aiter_sse() if as_events else response.aiter_raw()
        return response

    async def next(self) -> Any:
        with transport.translated(self._response):
            return await anext(self._content, None)

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()


for _name, _method in vars(AsyncClient).items():
    if not _name.startswith("_") and _method.__doc__ is None:  # what is said of `Client` counts for both
        _method.__doc__ = getattr(Client, _name).__doc__
