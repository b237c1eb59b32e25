"""The API's answers when it does not do what it was asked: one table, one body shape (RFC 9457)."""

from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MEDIA_TYPE = "application/problem+json"


class Problem(Enum):
    """The kinds of problem. Each has a stable code, an HTTP status and a title."""

    MALFORMED = ("malformed", 400, "The request is malformed")
    UNAUTHENTICATED = ("unauthenticated", 401, "The request has no valid API key")
    INSUFFICIENT_SCOPE = ("insufficient_scope", 403, "The API key does not allow this")
    FOREIGN_ORIGIN = ("foreign_origin", 403, "The request comes from another site's page")
    NOT_FOUND = ("not_found", 404, "There is no such thing")
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "The route does not take this method")
    REQUEST_TIMEOUT = ("request_timeout", 408, "The request did not arrive in time")
    CONFLICT = ("conflict", 409, "The state does not allow this")
    WRONG_OFFSET = ("wrong_offset", 409, "The bytes do not follow those that are there")
    PRECONDITION_FAILED = ("precondition_failed", 412, "The thing is not as the request supposes")
    TOO_LARGE = ("too_large", 413, "The body is too large")
    STORAGE_FULL = ("storage_full", 413, "The tenant's artifacts and uploads would take more room than they may")
    UNSUPPORTED_MEDIA_TYPE = ("unsupported_media_type", 415, "The body is of another media type")
    RANGE_NOT_SATISFIABLE = ("range_not_satisfiable", 416, "The range lies outside the file")
    UNKNOWN_HOST = ("unknown_host", 421, "The request names a host that the service is not")
    INVALID_REQUEST = ("invalid_request", 422, "The recipe is refused")
    NOT_AVAILABLE = ("not_available", 422, "The recipe asks for what this version cannot do yet")
    INVALID_CHECKPOINT = ("invalid_checkpoint", 422, "A checkpoint is refused")
    INCOMPATIBLE_CHECKPOINTS = ("incompatible_checkpoints", 422, "The checkpoints do not fit each other")
    INVALID_DATASET = ("invalid_dataset", 422, "A data set is refused")
    INVALID_STATISTICS = ("invalid_statistics", 422, "A file of statistics is refused")
    UPLOAD_REFUSED = ("upload_refused", 422, "The upload is refused")
    IDEMPOTENCY_MISMATCH = ("idempotency_mismatch", 422, "The Idempotency-Key came with another body before")
    RATE_LIMITED = ("rate_limited", 429, "There are too many requests; try again later")
    QUEUE_FULL = ("queue_full", 429, "As many of the tenant's jobs wait as may; try again later")
    HEADERS_TOO_LARGE = ("headers_too_large", 431, "The headers are too large")
    INTERNAL = ("internal", 500, "The service failed; this is not the caller's fault")
    ARTIFACT_DAMAGED = ("artifact_damaged", 500, "Files of an artifact are not what was written")
    PREDICTION_FAILED = ("prediction_failed", 500, "The worker could not answer")
    REDIS_UNAVAILABLE = ("redis_unavailable", 503, "Redis is away; try again")
    HUB_UNAVAILABLE = ("hub_unavailable", 503, "The Hugging Face hub does not answer; try again")
    STORAGE_UNAVAILABLE = ("storage_unavailable", 503, "The object storage does not answer; try again")
    TOO_BUSY = ("too_busy", 503, "The service has as much to do as it takes; try again")
    NOT_READY = ("not_ready", 503, "The service is not ready")
    NO_ANSWER = ("no_answer", 504, "No worker answered in time; try again")
    NO_SPACE = ("no_space", 507, "There is no space left")

    def __init__(self, code: str, status: int, title: str) -> None:
        self.code = code
        self.status = status
        self.title = title


class FieldError(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    field: str
    """Path of the field, such as `models.0.checkpoint`."""
    message: str
    """What is wrong with it, and what to write instead."""


class ProblemBody(BaseModel):
    """Body of every answer that is not a success, `application/problem+json`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    """Always `about:blank`; the code tells problems apart."""
    title: str
    """What kind of problem it is, for people."""
    status: int
    """The HTTP status."""
    code: Annotated[str, Field(json_schema_extra={"enum": [problem.code for problem in Problem]})]
    """Stable code of the problem."""
    detail: str
    """What is wrong with this request, and what to do."""
    instance: str
    """Path of the request."""
    errors: list[FieldError] = []
    """The fields of the request that are wrong, if there are any."""
    request_id: str
    """The request's id, as in the header `X-Request-ID` and in the service's log."""


class ProblemError(Exception):
    """Ends a request from anywhere in the app, and becomes its answer."""

    def __init__(self, problem: Problem, detail: str, errors: list[FieldError] | None = None, **headers: str) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail
        self.errors = errors or []
        self.headers = headers

    def body(self, instance: str, request_id: str) -> dict[str, Any]:
        return ProblemBody(
            title=self.problem.title,
            status=self.problem.status,
            code=self.problem.code,
            detail=self.detail,
            instance=instance,
            errors=self.errors,
            request_id=request_id,
        ).model_dump()
