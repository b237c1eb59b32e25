"""Requests of the HTTP contract, and how their answers are read. Nothing is sent here, so both clients share it."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from app.client.errors import stranger, unknown_answer
from app.contracts.api_keys import CreatedKey, Key, KeyList, NewKey
from app.contracts.artifacts import Listing
from app.contracts.jobs import Job, JobPage
from app.contracts.methods import MethodDescription, MethodList
from app.contracts.plans import Plan
from app.contracts.scores import ScoresPage
from app.contracts.uploads import Kind, UploadStatus
from app.contracts.webhooks import CreatedSecret, Delivery, DeliveryLog, NewSecret, ReceiverTestOutcome
from worker.engine.catalog.contracts.prediction import Prediction
from worker.engine.catalog.primitives.strict import IGNORE_UNKNOWN

Answer = TypeVar("Answer")
Model = TypeVar("Model", bound=BaseModel)
Recipe = Mapping[str, Any] | str | bytes | BaseModel
"""A request: a dictionary or the text of YAML or JSON, also mergekit's, or a `MergeRequest` or `ScoreRequest`."""

Row = str | Mapping[str, Any]
"""A row as a text, or as columns by name."""

JSON = "application/json"
YAML = "application/yaml"
MERGEKIT_KEY = "merge_method"
"""Key that a recipe of mergekit has, and none of the service's own."""
LONGEST_PREDICTION_S = 620.0  # the service answers within its own limit, which is 600 s at most
IDEMPOTENCY_KEY = "Idempotency-Key"
REPEATABLE = ("GET", "HEAD", "PUT", "DELETE")
"""Methods of which a second request does nothing that the first has not done."""


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request, and the function that reads its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], Answer]
    params: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    timeout_s: float | None = None
    """Seconds to wait for each part of the answer; None: as long as for all others."""

    @property
    def request(self) -> dict[str, Any]:
        """The request as arguments of httpx."""
        return {
            "method": self.method,
            "url": self.path,
            "params": list(self.params) or None,
            "headers": dict(self.headers),
            "content": self.content,
            **({} if self.timeout_s is None else {"timeout": self.timeout_s}),
        }

    @property
    def is_repeatable(self) -> bool:
        """Whether the request may be sent again when nobody knows what became of it."""
        return self.method in REPEATABLE or IDEMPOTENCY_KEY in self.headers


def submit(recipe: Recipe, idempotency_key: str | None = None) -> Call[Job]:
    return _submission("/merge", recipe, idempotency_key)


def submit_scores(recipe: Recipe, idempotency_key: str | None = None) -> Call[Job]:
    return _submission("/scores", recipe, idempotency_key)


def put(key: str, recipe: Recipe) -> Call[Job]:
    content, media_type = body(recipe)
    return Call("PUT", f"/merge/{_part(key)}", _model(Job), headers={"Content-Type": media_type}, content=content)


def validate(recipe: Recipe) -> Call[Plan]:
    content, media_type = body(recipe)
    return Call("POST", "/merge/validate", _model(Plan), headers={"Content-Type": media_type}, content=content)


def job(job_id: str, wait_s: int = 0) -> Call[Job]:
    """Args: wait_s: seconds for which the service waits for a change of a job that has not ended."""
    headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
    return Call("GET", f"/jobs/{_part(job_id)}", _model(Job), headers=headers)


def jobs(after: str | None, status: str | None, labels: Mapping[str, str] | None, page_size: int) -> Call[JobPage]:
    given = [("label", f"{name}:{value}") for name, value in (labels or {}).items()]
    return Call("GET", "/jobs", _model(JobPage), [*_page(after, page_size), *_given(status=status), *given])


def cancel(job_id: str) -> Call[Job]:
    return Call("POST", f"/jobs/{_part(job_id)}/cancel", _model(Job))


def retry(job_id: str) -> Call[Job]:
    return Call("POST", f"/jobs/{_part(job_id)}/retry", _model(Job))


def predict(job_id: str, model: str, rows: Sequence[Row], max_new_tokens: int | None) -> Call[Prediction]:
    asked = {
        "model": model,
        "rows": list(rows),
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
    }
    content, media_type = body(asked)
    path, headers = f"/jobs/{_part(job_id)}/predict", {"Content-Type": media_type}
    return Call("POST", path, _model(Prediction), headers=headers, content=content, timeout_s=LONGEST_PREDICTION_S)


def delete(job_id: str) -> Call[None]:
    return Call("DELETE", f"/jobs/{_part(job_id)}", _nothing)


def events(job_id: str, last_event_id: int | None) -> Call[None]:
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    return Call("GET", f"/jobs/{_part(job_id)}/events", _nothing, headers=headers)


def artifacts(job_id: str) -> Call[Listing]:
    return Call("GET", f"/jobs/{_part(job_id)}/artifacts", _model(Listing))


def file(path: str, first_byte: int = 0, etag: str = "") -> Call[None]:
    """Ask for a file from a byte on, if it is still the one with this ETag; otherwise for the whole of it."""
    headers = {"Accept-Encoding": "identity"}  # a range is of the bytes that are stored
    if first_byte:
        headers.update({"Range": f"bytes={first_byte}-", "If-Range": etag})
    return Call("GET", path, _nothing, headers=headers)


def archive(job_id: str) -> Call[None]:
    return file(f"/jobs/{_part(job_id)}/archive")


def scores(after: str | None, checkpoint: str | None, statistic: str | None, page_size: int) -> Call[ScoresPage]:
    given = _given(checkpoint=checkpoint, statistic=statistic)
    return Call("GET", "/scores", _model(ScoresPage), [*_page(after, page_size), *given])


def methods() -> Call[list[MethodDescription]]:
    return Call("GET", "/methods", lambda response: _model(MethodList)(response).data)


def keys() -> Call[list[Key]]:
    return Call("GET", "/keys", lambda response: _model(KeyList)(response).data)


def create_key(new: NewKey) -> Call[CreatedKey]:
    content, media_type = body(new)
    return Call("POST", "/keys", _model(CreatedKey), headers={"Content-Type": media_type}, content=content)


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", f"/keys/{_part(key_id)}", _nothing)


def deliveries(job_id: str) -> Call[list[Delivery]]:
    return Call("GET", f"/jobs/{_part(job_id)}/deliveries", lambda response: _model(DeliveryLog)(response).data)


def redeliver(job_id: str, n: int) -> Call[Delivery]:
    return Call("POST", f"/jobs/{_part(job_id)}/deliveries/{n}/redeliver", _model(Delivery))


def rotate_webhook_secret(overlap_seconds: int | None) -> Call[CreatedSecret]:
    new = NewSecret() if overlap_seconds is None else NewSecret(overlap_seconds=overlap_seconds)
    content, media_type = body(new)
    answer = _model(CreatedSecret)
    return Call("POST", "/webhooks/secret", answer, headers={"Content-Type": media_type}, content=content)


def test_webhook(url: str) -> Call[ReceiverTestOutcome]:
    content, media_type = body({"url": url})
    answer = _model(ReceiverTestOutcome)
    return Call("POST", "/webhooks/test", answer, headers={"Content-Type": media_type}, content=content)


def upload(sha256: str) -> Call[UploadStatus]:
    return Call("GET", f"/uploads/{_part(sha256)}", _model(UploadStatus))


def send_upload(
    sha256: str, kind: Kind, name: str | None, first: int, content: bytes, total: int
) -> Call[UploadStatus]:
    """Send bytes of an upload from `first` on; without any, a whole upload is finished."""
    range_ = f"bytes {first}-{first + len(content) - 1}/{total}" if content else f"bytes */{total}"
    headers = {"Content-Range": range_, "Content-Type": "application/octet-stream"}
    params = [("kind", kind), *_given(name=name)]
    return Call("PUT", f"/uploads/{_part(sha256)}", _model(UploadStatus), params, headers, content)


def ready() -> Call[None]:
    return Call("GET", "/readyz", _nothing)


def body(recipe: Recipe) -> tuple[bytes, str]:
    """Return a request's body and its media type."""
    if isinstance(recipe, BaseModel):  # defaults are left out, since what was not said may be told from what was
        return recipe.model_dump_json(exclude_unset=True).encode(), JSON
    if isinstance(recipe, str | bytes):  # JSON is a part of YAML
        return recipe.encode() if isinstance(recipe, str) else recipe, YAML
    # Recipes of mergekit are taken as YAML alone, of which JSON is a part.
    return json.dumps(recipe, allow_nan=False).encode(), YAML if MERGEKIT_KEY in recipe else JSON


def _submission(path: str, recipe: Recipe, idempotency_key: str | None) -> Call[Job]:
    content, media_type = body(recipe)
    headers = {"Content-Type": media_type, IDEMPOTENCY_KEY: idempotency_key or uuid.uuid4().hex}
    return Call("POST", path, _model(Job), headers=headers, content=content)


def _model(kind: type[Model]) -> Callable[[httpx.Response], Model]:
    """Return the reader of an answer of this kind. It passes over fields that a newer service may have added."""

    def read(response: httpx.Response) -> Model:
        if response.headers.get("content-type", "").partition(";")[0] != JSON:
            raise stranger(response)
        try:
            return kind.model_validate_json(response.content, context=IGNORE_UNKNOWN, extra="ignore")
        except ValidationError as error:
            raise unknown_answer(response, error) from error

    return read


def _nothing(response: httpx.Response) -> None:
    """Read an answer that has no content, or is read as a stream."""


def _page(after: str | None, page_size: int) -> list[tuple[str, str]]:
    return [("limit", str(page_size)), *_given(after=after)]


def _given(**params: str | None) -> list[tuple[str, str]]:
    return [(name, value) for name, value in params.items() if value is not None]


def _part(text: str) -> str:
    """Return one part of a path; whatever is in it, the request goes to no other route."""
    return quote(text, safe="") if text.strip(".") else text.replace(".", "%2E") or "%20"
