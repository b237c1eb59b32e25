"""Errors of the client.

ClientError
├── Refused          the service answered with a problem
├── Unreachable      no answer came
├── TimedOut         a job had not ended in the time that was given
├── NoService        the answer is not from a service that this client knows
├── DownloadFailed   a file did not arrive as it was announced, or cannot be put where it belongs
└── UploadFailed     there is nothing that could be uploaded
"""

import httpx
from pydantic import BaseModel, ValidationError

from app.contracts.errors import FieldError
from worker.engine.catalog.primitives.words import message_of

REQUEST_ID = "X-Request-ID"
OF_PROXIES = (502, 503, 504)
"""Statuses by which a proxy says that it does not reach the service."""


class _Problem(BaseModel):
    """The part of a problem document that services of all versions have."""

    code: str
    detail: str
    errors: list[FieldError] = []


class ClientError(Exception):
    """The client could not do what it was asked."""


class Refused(ClientError):
    """The service refused the request, or failed on it; its problem document (RFC 9457) says why.

    Args:
        code: stable code of the problem, such as `invalid_request`; the reference lists all.
        status: HTTP status.
        detail: text for people.
        errors: messages by field, where the problem is in fields of the request.
        request_id: name of the request in the service's log; None where the service gives none.
        retry_after_s: seconds after which the service asks to try again; None where it does not.
    """

    def __init__(
        self,
        code: str,
        status: int,
        detail: str,
        errors: list[FieldError],
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}{f' (request {request_id})' if request_id else ''}")
        self.code = code
        self.status = status
        self.detail = detail
        self.errors = errors
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class Unreachable(ClientError):
    """No whole answer came: nothing listens there, the connection was lost, or the time was over."""


class TimedOut(ClientError, TimeoutError):
    """A job had not ended in the time that was given. It goes on."""


class NoService(ClientError):
    """The answer is not from a maskmerge service, or from one whose answers this client does not know."""


class DownloadFailed(ClientError):
    """A file did not arrive as announced, or cannot be put where it belongs."""


class UploadFailed(ClientError):
    """There is no such file or folder, or nothing of it is taken by the service."""


def refusal(response: httpx.Response) -> ClientError:
    """Return the error that an answer, read to its end, stands for."""
    try:
        problem = _Problem.model_validate_json(response.content)
    except ValidationError:
        if response.status_code in OF_PROXIES:
            return Unreachable(
                f"{_address(response.url)} does not answer: what is before it says {response.status_code}"
            )
        return stranger(response)
    after = response.headers.get("Retry-After", "")
    return Refused(
        problem.code,
        response.status_code,
        problem.detail,
        problem.errors,
        response.headers.get(REQUEST_ID),
        float(after) if after.isascii() and after.isdigit() else None,
    )


def unreachable(error: httpx.RequestError) -> Unreachable:
    """Return the error that a failed request stands for."""
    address = _address(error.request.url) if error._request is not None else "the service"
    return Unreachable(f"{address} does not answer: {str(error) or type(error).__name__}")


def stranger(response: httpx.Response) -> NoService:
    """Return the error for an answer that no service gives."""
    kind = response.headers.get("content-type", "nothing").partition(";")[0]
    address = _address(response.url)
    return NoService(f"{address} is no maskmerge service: it answers {response.status_code}, {kind}")


def unknown_answer(response: httpx.Response, error: ValidationError) -> NoService:
    """Return the error for an answer that this client cannot read."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return NoService(
        f"{_address(response.url)} gives an answer that this client does not know ({where}: {message_of(first)}); "
        "install the client of the service's version"
    )


def _address(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode()}"
