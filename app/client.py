"""A small client of the HTTP contract, for scripts and notebooks."""

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from httpx_sse import EventSource, SSEError

CHUNK_BYTES = 1 << 20
RECONNECT_S = 1.0
PATIENCE_S = 60.0  # a service that is started again is back by then


class RequestRefused(Exception):
    """The service refused the request; the problem document says why."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(f"{problem.get('status')} {problem.get('code')}: {problem.get('detail')}")
        self.problem = problem


class NoService(Exception):
    """The answer is not from a maskmerge service, or something between it and here answered instead."""

    def __init__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "nothing").partition(";")[0]
        address = f"{response.url.scheme}://{response.url.netloc.decode()}"
        super().__init__(f"{address} is no maskmerge service: it answers {response.status_code}, {kind}")


@dataclass(frozen=True)
class Event:
    """An event of a job. `kind` is status, progress or log; the reference says what `data` holds."""

    id: str
    kind: str
    data: dict[str, Any]


class Client:
    """Talks to one service; every method raises NoService where something else answers.

    Args:
        base_url: URL of the service, as `http://127.0.0.1:8000`.
        api_key: key to send with each request; that of the variable MASKMERGE_API_KEY when None, if it is set.
    """

    def __init__(self, base_url: str, timeout_s: float = 30, api_key: str | None = None) -> None:
        key = os.environ.get("MASKMERGE_API_KEY") if api_key is None else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=headers)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def merge(self, recipe: dict[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Queue a merge and return the job. Raises RequestRefused."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/merge", json=recipe, headers=headers)

    def put_merge(self, key: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Queue a merge under a name of your own, and return the job. Repeated, it returns the same job.

        Raises RequestRefused, also where the job of this name has another recipe.
        """
        return self._json("PUT", f"/merge/{key}", json=recipe)

    def merge_recipe(self, recipe: bytes, media_type: str) -> dict[str, Any]:
        """Queue a merge by the bytes of a recipe file, and return the job. Raises RequestRefused.

        Args:
            media_type: application/json, or application/yaml, also for mergekit's recipes.
        """
        return self._json("POST", "/merge", content=recipe, headers={"Content-Type": media_type})

    def score(self, recipe: dict[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Queue the computation of scores, as `POST /scores` takes it, and return the job. Raises RequestRefused."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._json("POST", "/scores", json=recipe, headers=headers)

    def validate(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Check a merge, and return what it would do. Raises RequestRefused."""
        return self._json("POST", "/merge/validate", json=recipe)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", f"/jobs/{job_id}")

    def jobs(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield all jobs, newest first. `query` has the parameters of `GET /jobs`."""
        return self._pages("/jobs", query)

    def scores(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield all statistics that are kept, newest first. `query` has the parameters of `GET /scores`."""
        return self._pages("/scores", query)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for the job's end. Raises RequestRefused when it has ended already."""
        return self._json("POST", f"/jobs/{job_id}/cancel")

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue a failed or cancelled job again. Raises RequestRefused."""
        return self._json("POST", f"/jobs/{job_id}/retry")

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """Yield the job's events, from the first or from the one after `last_event_id`, to its end.

        Connects again by itself, without loss or repetition, when the connection or the service goes away; gives up
        when the service is away for a minute. Raises RequestRefused or httpx.TransportError.
        """
        away_since: float | None = None
        while True:
            is_news = False
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            try:
                with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
                    if response.status_code == 204:
                        return
                    if response.is_error:
                        response.read()
                        raise RequestRefused(_content(response))
                    away_since = None
                    for event in EventSource(response).iter_sse():
                        if not event.data:  # a comment, which keeps the connection alive, ends as an event does
                            continue
                        is_news, last_event_id = True, event.id
                        yield Event(event.id, event.event, event.json())
            except SSEError as error:
                raise NoService(response) from error
            except (httpx.TransportError, RequestRefused) as error:
                is_away = isinstance(error, httpx.TransportError) or error.problem.get("status") == 503
                away_since = away_since or time.monotonic()
                if not is_away or time.monotonic() - away_since > PATIENCE_S:
                    raise
            if not is_news:
                time.sleep(RECONNECT_S)

    def wait(self, job_id: str) -> dict[str, Any]:
        """Wait for the job's end, and return it. Raises as `events` does."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def files(self, job_id: str) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = self._json("GET", f"/jobs/{job_id}/artifacts")["files"]
        return files

    def download(self, job_id: str, folder: Path) -> None:
        """Download the whole artifact into `folder`. Each file is checked by its sha256 before it gets its name.

        Files that an earlier download left there are kept. Large files of equal content, as the
        shared backbone, are fetched once and hard-linked. Raises OSError when a file does not arrive as announced,
        would lie outside the folder, or is there with other content.
        """
        fetched: dict[str, Path] = {}
        for file in self.files(job_id):
            path = folder / file["name"]
            if not path.resolve().is_relative_to(folder.resolve()):
                raise OSError(f"{file['name']} would lie outside {folder}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                with path.open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                        raise OSError(f"{path} is there with other content; download to another folder")
            elif path.suffix == ".safetensors" and file["sha256"] in fetched:
                os.link(fetched[file["sha256"]], path)
            else:
                self._fetch(file, path)
            fetched[file["sha256"]] = path

    def _fetch(self, file: dict[str, Any], path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", file["href"]) as response, partial.open("wb") as stream:
                response.raise_for_status()
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
            if digest.hexdigest() != file["sha256"]:
                raise OSError(f"{file['name']} did not arrive as announced; download it again")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _pages(self, path: str, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
        after = None
        while True:
            page = self._json("GET", path, params={**query, **({"after": after} if after else {})})
            yield from page["data"]
            after = page["next"]
            if after is None:
                return

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._http.request(method, path, **options)
        content = _content(response)
        if response.is_error:
            raise RequestRefused(content)
        return content


def _content(response: httpx.Response) -> dict[str, Any]:
    """Return the answer's JSON object: for an error, the problem document. Raises NoService where it is no object."""
    try:
        content = response.json()
    except ValueError as error:
        raise NoService(response) from error
    if not isinstance(content, dict) or (response.is_error and "code" not in content):
        raise NoService(response)
    return content
