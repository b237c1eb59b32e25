"""The client of the service, for programs.

What takes one request is in `calls`, what takes several in `steps`, `downloads` and `uploads`. None of them does any
I/O, so that `Client` and `AsyncClient` share all of it.
"""

from typing import TYPE_CHECKING, Any

from app.client.asynchronous import AsyncClient
from app.client.blocking import Client
from app.client.errors import ClientError, DownloadFailed, NoService, Refused, TimedOut, Unreachable, UploadFailed
from app.contracts.api_keys import CreatedKey, Key, NewKey, Scope
from app.contracts.artifacts import FileEntry, Listing
from app.contracts.errors import FieldError
from app.contracts.events import Event, EventKind, LogEntry, StatusChange
from app.contracts.jobs import Job, JobSummary, Progress, Status
from app.contracts.methods import MethodDescription
from app.contracts.plans import Plan
from app.contracts.scores import ScoresEntry
from app.contracts.webhooks import CreatedSecret, Delivery, DeliveryState, ReceiverTestOutcome
from worker.engine.catalog.contracts.prediction import Prediction
from worker.engine.catalog.contracts.report import MergeResult, MergeSummary, MetricResult, ScoreResult

if TYPE_CHECKING:
    from app.contracts.requests import MergeRequest, ScoreRequest

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "CreatedKey",
    "CreatedSecret",
    "Delivery",
    "DeliveryState",
    "DownloadFailed",
    "Event",
    "EventKind",
    "FieldError",
    "FileEntry",
    "Job",
    "JobSummary",
    "Key",
    "Listing",
    "LogEntry",
    "MergeRequest",
    "MergeResult",
    "MergeSummary",
    "MethodDescription",
    "MetricResult",
    "NewKey",
    "NoService",
    "Plan",
    "Prediction",
    "Progress",
    "ReceiverTestOutcome",
    "Refused",
    "Scope",
    "ScoreRequest",
    "ScoreResult",
    "ScoresEntry",
    "Status",
    "StatusChange",
    "TimedOut",
    "Unreachable",
    "UploadFailed",
]


def __getattr__(name: str) -> Any:
    """Load the models of requests when they are asked for, since most programs send dictionaries or YAML."""
    if name in ("MergeRequest", "ScoreRequest"):
        from app.contracts import requests

        return getattr(requests, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
