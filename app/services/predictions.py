"""Has a worker answer rows while the caller waits."""

from collections.abc import Awaitable, Callable, Mapping

from anyio.to_thread import run_sync

from app.contracts.devices import Device
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.jobs import ErrorCode, JobError, JobKind, Record, Status
from app.contracts.predictions import PredictionOrder, PredictionOutcome, PredictionRequest
from app.observability.context import request_id
from app.storage.events import JobWatcher
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from worker.engine.catalog.contracts.prediction import Prediction
from worker.engine.catalog.primitives.strict import did_you_mean

MOST_WAITING = 32  # requests that wait for a worker, of all callers together
RETRY_S = 10

PROBLEMS: Mapping[ErrorCode, Problem] = {
    ErrorCode.INVALID_REQUEST: Problem.INVALID_REQUEST,
    ErrorCode.INVALID_CHECKPOINT: Problem.INVALID_CHECKPOINT,
    ErrorCode.INCOMPATIBLE_CHECKPOINTS: Problem.INCOMPATIBLE_CHECKPOINTS,
    ErrorCode.INVALID_DATASET: Problem.INVALID_DATASET,
    ErrorCode.TIMEOUT: Problem.NO_ANSWER,
    ErrorCode.STORAGE_ERROR: Problem.STORAGE_UNAVAILABLE,
}
"""Problems of the errors that are the caller's to mend, or pass; others are faults of the service."""


class Predictions:
    """The use case behind `POST /jobs/{id}/predict`.

    Args:
        seconds: time within which a worker must answer.
    """

    def __init__(self, store: JobStore, queue: TaskQueue, watcher: JobWatcher, seconds: float) -> None:
        self._store = store
        self._queue = queue
        self._watcher = watcher
        self._seconds = seconds

    async def predict(
        self, record: Record, request: PredictionRequest, files: list[str], is_gone: Callable[[], Awaitable[bool]]
    ) -> Prediction:
        """Return the answers of a merge, of one of its experts and of the plain average.

        Args:
            record: a merge that has succeeded, see `require_merge`.
            files: names of the artifact's files.
            is_gone: tells whether the caller hung up. Its rows then take no worker's time, if none has them yet.

        Raises:
            ProblemError: the job has no such model, the rows do not suit it, an input is not what it was, or no worker
                answers in time.
        """
        _require_model(record, request.model)
        one = f"models/{request.model}/"
        merged = request.model if any(name.startswith(one) for name in files) else "model"
        device = record.request.get("device")
        name = await run_sync(self._ask, record, request, merged, device)
        try:
            text = await self._watcher.pop(self._store.predictions.outcome_key(name), self._seconds, is_gone)
        finally:
            await run_sync(self._forget, name, device)
        if text is not None:
            outcome = PredictionOutcome.model_validate_json(text)
            if outcome.prediction is not None:
                return outcome.prediction
            if outcome.error is not None:
                raise _problem(outcome.error)
        if await is_gone():
            raise ProblemError(Problem.MALFORMED, "the caller hung up")  # for the log; nobody is there to hear it
        if self._watcher.is_stopping:
            raise ProblemError(Problem.NOT_READY, "the service stops; ask again", None, **{"Retry-After": "5"})
        lacking = await run_sync(self._store.workers.lacking_for, device)
        why = f"it needs {lacking}" if lacking else "they are at work, or the models take longer to load"
        detail = f"no worker answered within {self._seconds:g} s (MASKMERGE_PREDICT_SECONDS): {why}; ask again"
        raise ProblemError(Problem.NO_ANSWER, detail)

    def _ask(self, record: Record, request: PredictionRequest, merged: str, device: Device | None) -> str:
        """Leave the rows for a worker, and return the id under which it answers."""
        if self._queue.predictions_waiting() >= MOST_WAITING:
            detail = f"{MOST_WAITING} requests to predict wait for a worker already; try again"
            raise ProblemError(Problem.TOO_BUSY, detail, None, **{"Retry-After": str(RETRY_S)})
        deadline = self._store.clock() + int(1000 * self._seconds)
        order = PredictionOrder(
            job=record.id, merged=merged, request=request, deadline_ms=deadline, request_id=request_id()
        )
        name = self._store.predictions.put(order, self._seconds)
        self._queue.ask_to_predict(name, self._seconds, device)
        return name

    def _forget(self, name: str, device: Device | None) -> None:
        self._queue.forget_prediction(name, device)
        self._store.predictions.forget(name)


def require_merge(record: Record) -> None:
    """Raise ProblemError where a job is no merge that has succeeded."""
    if record.kind is not JobKind.MERGE:
        raise ProblemError(Problem.CONFLICT, f"job {record.id} is one of scores; only a merge can be tried")
    if record.status is not Status.SUCCEEDED:
        detail = f"job {record.id} is {record.status.value}; its models can be tried when it has succeeded"
        raise ProblemError(Problem.CONFLICT, detail)


def _require_model(record: Record, name: str) -> None:
    known = [model["name"] for model in record.request["models"]]
    if name not in known:
        message = f"the job has no model '{name}'{did_you_mean(name, known)}"
        raise ProblemError(Problem.INVALID_REQUEST, message, [FieldError(field="model", message=message)])


def _problem(error: JobError) -> ProblemError:
    problem = PROBLEMS.get(error.code, Problem.PREDICTION_FAILED)
    field, row = error.detail.get("field"), error.detail.get("row")
    if error.detail.get("available") is False:
        problem = Problem.NOT_AVAILABLE
    if error.code is ErrorCode.INVALID_DATASET and isinstance(row, int):
        field = f"rows.{row - 1}"
    errors = [FieldError(field=field, message=error.message)] if isinstance(field, str) else None
    return ProblemError(problem, error.message, errors)
