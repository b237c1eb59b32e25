"""Answers rows on which a merge is tried. It is no job's work: a failure is told to the caller, and not tried again."""

import logging
import traceback
from collections.abc import Callable

from pydantic import ValidationError
from redis.exceptions import RedisError

from app.contracts.jobs import ErrorCode, JobError
from app.contracts.predictions import PredictionOrder, PredictionOutcome
from app.observability.context import add_facts, concerning
from app.storage.queue import PREDICT
from app.storage.sources import Sources
from app.storage.sources.source import FetchedInput, InputKind
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine_process import EngineDied, EngineProcess, Failed, Predicted, as_job_error
from worker.specs import Inputs, prediction_spec
from worker.tasks import TICK_S, Storage, fetched

KEPT_S = 5.0  # an answer for which nobody waits any more

logger = logging.getLogger(__name__)


class Late(Exception):
    """Nobody waits for the answer any more."""


class Stopping(Exception):
    """The worker was asked to end."""


class Predictor:
    """Answers one order at a time in the worker's engine process, between its tasks.

    Args:
        look_after_engine: sees to it that there is an engine process, and returns whether there is.
        is_stopping: tells whether the worker was asked to end; the caller hears of it then.
    """

    def __init__(
        self,
        storage: Storage,
        engine: EngineProcess,
        look_after_engine: Callable[[], bool],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._store = storage.store
        self._of_tenant = storage.of_tenant
        self._engine = engine
        self._look_after_engine = look_after_engine
        self._is_stopping = is_stopping

    @property
    def functions(self) -> dict[str, Callable[..., None]]:
        """Table of the functions that a message from the queue may run."""
        return {PREDICT: self.run}

    def run(self, name: str) -> None:
        """Answer an order. Whatever happens, the worker lives on, and no row gets into the log."""
        try:
            order = self._store.predictions.take(name)
        except RedisError as error:
            logger.warning("Redis is away, and rows are not answered: %s", error)
            return
        except ValidationError:  # its text quotes rows
            logger.error("rows are not answered: they come from another release of the service")
            return
        if order is None:
            return
        try:
            made_by = {"request_id": order.request_id} if order.request_id else {}
            with concerning(job=order.job, **made_by):
                outcome = self._outcome(order)
                said = "answered" if outcome.error is None else outcome.error.code
                logger.info("%d rows to try: %s", len(order.request.rows), said)
                self._store.predictions.answer(name, outcome, KEPT_S)
        except RedisError as error:
            logger.warning("Redis is away, and rows are not answered: %s", error)

    def _outcome(self, order: PredictionOrder) -> PredictionOutcome:
        try:
            return self._answered(order)
        except EngineError as error:
            return PredictionOutcome(error=as_job_error(error))
        except EngineDied as death:
            logger.warning("%s", death)
            code = ErrorCode.OUT_OF_MEMORY if death.out_of_memory else ErrorCode.WORKER_LOST
            why = " for want of memory" if death.out_of_memory else ""
            return _failed(code, f"the engine process ended{why} while it answered; ask again")
        except Stopping:
            self._engine.kill()
            return _failed(ErrorCode.WORKER_LOST, "the worker was stopped while it answered; ask again")
        except Late:
            self._engine.kill()
            return _failed(ErrorCode.TIMEOUT, "the answer would have come too late")
        except RedisError:
            raise
        except Exception as error:
            self._engine.kill()  # it may still be at work, and the next task must not get its events
            # The trace goes to the log without the exception's text, which may quote a row.
            logger.error("unexpected %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            return _failed(ErrorCode.INTERNAL, "unexpected error in the worker; its log has the trace")

    def _answered(self, order: PredictionOrder) -> PredictionOutcome:
        """Have the engine answer. Raises EngineError, EngineDied, Late or Stopping."""
        if not self._look_after_engine():
            return _failed(ErrorCode.WORKER_LOST, "the worker's engine process does not start; ask again")
        record = self._store.records.get(order.job)
        if record is None:
            return _failed(ErrorCode.INVALID_REQUEST, f"job {order.job} was deleted")
        add_facts(tenant=record.tenant)
        own = self._of_tenant(record.tenant)

        def fetch(reference: str, kind: InputKind, state: str | None) -> FetchedInput:
            return self._fetch(order, own.sources, reference, kind, state)

        with own.inputs:
            merged = fetch(f"job:{record.id}/{order.merged}", "checkpoint", None)
            spec = prediction_spec(record, order.request, merged, Inputs(record, fetch), own.statistics)
            self._engine.run(spec)
            while True:
                for event in self._engine.poll(TICK_S):
                    if isinstance(event, Predicted):
                        return PredictionOutcome(prediction=event.result)
                    if isinstance(event, Failed):
                        if event.error.code is ErrorCode.OUT_OF_MEMORY:
                            self._engine.kill()  # libraries remember what they could not make
                        return PredictionOutcome(error=event.error)
                self._check_wanted(order)

    def _fetch(
        self, order: PredictionOrder, sources: Sources, reference: str, kind: InputKind, state: str | None
    ) -> FetchedInput:
        return fetched(sources, reference, kind, state, lambda done, total: self._check_wanted(order))

    def _check_wanted(self, order: PredictionOrder) -> None:
        """Raise Late or Stopping where the answer is not worked at any more."""
        if self._is_stopping():
            raise Stopping
        if self._store.clock() > order.deadline_ms:
            raise Late


def _failed(code: ErrorCode, message: str) -> PredictionOutcome:
    return PredictionOutcome(error=JobError(code=code, message=message, retryable=True))
