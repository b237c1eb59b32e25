"""The client for programs without an event loop."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from httpx_retries import retry_request
from httpx_sse import EventSource

from app.client import calls, downloads, steps, transport, uploads
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


class Client:
    """Talks to one service. It may be used as a context, and by one thread at a time.

    Every method raises `Refused` with the problem that the service answers, `Unreachable` where no answer comes, and
    `NoService` where something else answers; all are `ClientError`. A request is sent again, after a growing pause or
    the one that the service asks for, if a second one does no harm.

    Args:
        url: URL of the service; that of the variable MASKMERGE_URL when None, or else http://127.0.0.1:8000.
        api_key: key to send with each request; that of the variable MASKMERGE_API_KEY when None, if it is set.
        timeout_s: seconds to wait for a connection, and for each part of an answer.
        retries: number of times that a request is sent again.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = transport.TIMEOUT_S,
        retries: int = transport.RETRIES,
    ) -> None:
        self._http = httpx.Client(**transport.options(url, api_key, timeout_s))
        self._retries = transport.retries(retries)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def is_ready(self) -> bool:
        """Return whether the service takes jobs and has a worker. It is asked once."""
        try:
            self._send(calls.ready(), is_repeatable=False)
        except (Refused, Unreachable):
            return False
        return True

    def submit(self, recipe: Recipe, *, idempotency_key: str | None = None) -> Job:
        """Queue a merge, and return the job.

        Args:
            recipe: a dictionary or the text of YAML or JSON, which may be a recipe of mergekit, or a `MergeRequest`.
            idempotency_key: with the same key, the same recipe gives the same job; one is made when None, so that the
                request can be sent again without making two jobs.
        """
        return self._send(calls.submit(recipe, idempotency_key))

    def put(self, key: str, recipe: Recipe) -> Job:
        """Queue a merge under a name of your own, and return the job. Repeated, it returns the same job.

        Raises Refused (409 `conflict`) where the job of this name has another recipe.
        """
        return self._send(calls.put(key, recipe))

    def submit_scores(self, recipe: Recipe, *, idempotency_key: str | None = None) -> Job:
        """Queue the computation of statistics, as `POST /scores` takes it, and return the job; see `submit`."""
        return self._send(calls.submit_scores(recipe, idempotency_key))

    def validate(self, recipe: Recipe) -> Plan:
        """Check a merge, and return what it would do. Nothing is queued."""
        return self._send(calls.validate(recipe))

    def job(self, job_id: str) -> Job:
        """Return a job."""
        return self._send(calls.job(job_id))

    def jobs(
        self, *, status: str | None = None, labels: Mapping[str, str] | None = None, page_size: int = 100
    ) -> Iterator[JobSummary]:
        """Yield all jobs in this state and with these labels, newest first. Pages are fetched as they are needed."""
        return self._each(steps.each_job(status, labels, page_size))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Wait for the job's end, and return it. A service that is away is waited for, for at most a minute.

        Args:
            timeout_s: seconds after which `TimedOut` is raised while the job goes on; None waits for its end, however
                long that takes. `deadline_seconds` of a request ends the job itself.
        """
        job: Job = self._done(steps.wait(job_id, timeout_s))
        return job

    def events(self, job_id: str, last_event_id: int | None = None) -> Iterator[Event]:
        """Yield the job's events, from the first or from the one after `last_event_id`, to its end.

        It connects again by itself, without loss or repetition, and gives up when the service is away for a minute.
        """
        return self._each(steps.events(job_id, last_event_id))

    def log(self, job_id: str, last_event_id: int | None = None) -> Iterator[LogEntry]:
        """Yield the job's messages for people, as `events` does with all events."""
        return self._each(steps.log(job_id, last_event_id))

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end, and return it. Raises Refused (409 `conflict`) when it has ended already."""
        return self._send(calls.cancel(job_id))

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again, and return it. Raises Refused (409 `conflict`) when it is neither."""
        return self._send(calls.retry(job_id))

    def predict(self, job_id: str, model: str, rows: Sequence[Row], *, max_new_tokens: int | None = None) -> Prediction:
        """Try a merge that has succeeded: answers of one of its experts, the plain average and the merge to a few rows.

        Args:
            model: name of the expert in the job's request.
            rows: texts, or columns by name.
            max_new_tokens: largest number of tokens that a language model writes; None leaves it to the service.
        """
        return self._send(calls.predict(job_id, model, rows, max_new_tokens))

    def delete(self, job_id: str) -> None:
        """Remove a job that has ended, with its artifact. Raises Refused (409 `conflict`) while it has not."""
        self._send(calls.delete(job_id))

    def artifacts(self, job_id: str) -> Listing:
        """Return the list of files of a succeeded job."""
        return self._send(calls.artifacts(job_id))

    def download(self, job_id: str, folder: Path | str, *, on_bytes: OnBytes | None = None) -> None:
        """Download the whole artifact into a folder. Each file is checked by its sha256 before it gets its name.

        A file that was cut is gone on with, now or by a later download. Files that are there are kept. What has the
        same content is fetched once; weights are hard-linked then.

        Args:
            on_bytes: called with the number of bytes that are there, and the number in all.

        Raises:
            DownloadFailed: a file does not arrive as announced, would lie outside the folder, or is there with other
                content.
            OSError: a file cannot be written.
        """
        self._done(downloads.download(job_id, Path(folder), on_bytes))

    def upload(self, path: Path | str, *, on_bytes: OnBytes | None = None) -> str:
        """Upload a file, or a folder such as a checkpoint, and return the reference that recipes name it by.

        What the service has already is not sent again, and what was cut goes on, now or by a later call. Of a folder,
        files that the service does not take, as pickles, are left out.

        Args:
            on_bytes: called with the number of bytes that are there, and the number in all.

        Raises:
            UploadFailed: there is no such file or folder, or the service takes nothing of it.
            OSError: a file cannot be read.
        """
        reference: str = self._done(uploads.upload(Path(path), on_bytes))
        return reference

    def archive(self, job_id: str, path: Path | str) -> None:
        """Download the whole artifact as one tar, to this path. A cut one is not gone on with; see `download`."""
        self._done(downloads.archive(job_id, Path(path)))

    def scores(
        self, *, checkpoint: str | None = None, statistic: str | None = None, page_size: int = 100
    ) -> Iterator[ScoresEntry]:
        """Yield all statistics that are kept, newest first.

        Args:
            checkpoint: digest of the only checkpoint that is asked for.
            statistic: the only kind that is asked for.
        """
        return self._each(steps.each_score(checkpoint, statistic, page_size))

    def methods(self) -> list[MethodDescription]:
        """Return every merge method, with the JSON Schema of its parameters."""
        return self._send(calls.methods())

    def keys(self) -> list[Key]:
        """Return all API keys, without their secrets. It needs a key with the scope `admin`, as do all of keys."""
        return self._send(calls.keys())

    def create_key(self, new: NewKey) -> CreatedKey:
        """Make an API key. Its secret is in the answer alone."""
        return self._send(calls.create_key(new))

    def revoke_key(self, key_id: str) -> None:
        """Refuse a key from now on."""
        self._send(calls.revoke_key(key_id))

    def deliveries(self, job_id: str) -> list[Delivery]:
        """Return what the job's webhook was told and is to be told, newest first."""
        return self._send(calls.deliveries(job_id))

    def redeliver(self, job_id: str, n: int) -> Delivery:
        """Send a delivery to the job's webhook again, from now on."""
        return self._send(calls.redeliver(job_id, n))

    def rotate_webhook_secret(self, overlap_seconds: int | None = None) -> CreatedSecret:
        """Make the secret that signs what your webhooks are told, or a new one. It is in the answer alone.

        Args:
            overlap_seconds: time for which a former secret signs too; a day when None.
        """
        return self._send(calls.rotate_webhook_secret(overlap_seconds))

    def test_webhook(self, url: str) -> ReceiverTestOutcome:
        """Send the event `webhook.test` to a receiver, once, and return how it went."""
        return self._send(calls.test_webhook(url))

    def _send(self, call: Call[Answer], *, is_repeatable: bool = True) -> Answer:
        with transport.translated():
            try:
                if is_repeatable and call.is_repeatable:
                    response = retry_request(self._http, retry=self._retries, **call.request)
                else:
                    response = self._http.request(**call.request)
            except transport.AskedToWait as asked:
                response = asked.response
        return transport.answer(call, response)

    def _done(self, operation: Steps) -> Any:
        """Do all steps, and return the item that they emit."""
        emitted = list(self._each(operation))
        return emitted[-1] if emitted else None

    def _each(self, operation: Steps) -> Iterator[Any]:
        """Do the steps, and yield the items that they emit."""
        with closing(operation), closing(_Opened(self._http)) as opened:
            step = proceed(operation)
            while step is not None:
                if isinstance(step, Emit):
                    yield step.item
                    step = proceed(operation)
                    continue
                try:
                    found = self._perform(step, opened)
                except Exception as error:
                    step = proceed(operation, error=error)
                else:
                    step = proceed(operation, found)

    def _perform(self, step: Step, opened: "_Opened") -> Any:
        match step:
            case Send(call):
                return self._send(call)
            case Open(call, as_events):
                return opened.open(call, as_events)
            case Next():
                return opened.next()
            case Sleep(seconds):
                time.sleep(seconds)
            case Do(function):
                return function()
        return None


class _Opened:
    """The answer that an operation reads as it comes."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._content: Iterator[Any]

    def open(self, call: Call[None], as_events: bool) -> httpx.Response:
        self.close()
        with transport.translated():
            request = self._http.build_request(**call.request)
            self._response = response = self._http.send(request, stream=True, follow_redirects=not as_events)
            if not response.is_success:
                response.read()
        transport.check(call, response)
        self._content = EventSource(response).iter_sse() if as_events else response.iter_raw()
        return response

    def next(self) -> Any:
        with transport.translated(self._response):
            return next(self._content, None)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
