"""The spans of one attempt: its wait in the queue, the attempt, and in it a span for each phase."""

from app.contracts.jobs import Attempt, Record
from app.observability.traces import Span, Tracer


class AttemptTrace:
    """Follows an attempt by what its worker hears of it.

    Args:
        record: the job's record, after the attempt was claimed.
    """

    def __init__(self, tracer: Tracer, record: Record, attempt: Attempt) -> None:
        self._tracer = tracer
        is_whole = not attempt.is_of_shard
        began = record.started_ms if attempt.number == record.attempt and is_whole else None
        if attempt.number == 1 and is_whole:  # of later attempts it is not known when the job was queued again
            queue = tracer.span("queue", parent=record.traceparent, start_ms=record.created_ms)
            queue.end(at_ms=record.started_ms)
        name = "attempt" if is_whole else "shard"
        self._attempt = tracer.span(name, "consumer", record.traceparent, began)
        self._attempt.add(
            maskmerge__job=record.id,
            maskmerge__attempt=attempt.number,
            maskmerge__kind=record.kind,
            maskmerge__tenant=record.tenant,
        )
        self.facts = self._attempt.facts
        self.outcome, self.failed = "lost", True
        """How the attempt ends, such as `succeeded`, or the code of its error; and whether that is a failure."""
        self._phase: Span | None = None
        self._name = ""

    def enters(self, phase: str) -> None:
        """Note that the attempt is in this phase now."""
        if phase == self._name:
            return
        self._end_phase(failed=False)
        self._phase, self._name = self._tracer.span(phase, parent=self._attempt.traceparent), phase

    def ends(self) -> None:
        """Note that the attempt ends now."""
        self._end_phase(failed=self.failed)
        self._attempt.add(maskmerge__outcome=self.outcome)
        self._attempt.end(failed=self.failed)

    def _end_phase(self, *, failed: bool) -> None:
        if self._phase is not None:
            self._phase.end(failed=failed)
            self._phase = None
