"""The use cases around webhooks: whether one is taken, the secrets that sign, and trying out a receiver."""

import secrets
from datetime import UTC, datetime

from anyio.to_thread import run_sync
from pydantic import HttpUrl

from app.contracts.addresses import literal_refusal
from app.contracts.api_keys import Caller
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.webhooks import CreatedSecret, JobWebhook, ReceiverTestOutcome, Webhook, signer_of
from app.services.webhook_messages import signed, trial_message
from app.services.webhook_sender import Sender
from app.storage.signing_secrets import SigningSecrets, TooManySecrets

MOST_TESTS = 8  # at once, since each holds a connection of the API's for as long as its receiver likes

HOW = "make one with POST /webhooks/secret or `maskmerge keys secret`"


class Webhooks:
    """Decides about webhooks for callers.

    Args:
        allow_private: whether addresses that are not public are allowed.
        progress_seconds: least time between two events of a job's progress.
    """

    def __init__(
        self, signing: SigningSecrets, sender: Sender, *, allow_private: bool, progress_seconds: float
    ) -> None:
        self._signing = signing
        self._sender = sender
        self._allow_private = allow_private
        self._progress_seconds = progress_seconds
        self._tests = 0

    def accepted(self, asked: Webhook, caller: Caller) -> JobWebhook:
        """Return the webhook of a caller's new job. Raises ProblemError: its URL is refused, or nothing can sign."""
        self._check_address(asked.url, "webhook.url")
        signer = signer_of(caller)
        if not self._signing.exist(signer):
            message = f"there is no secret to sign with; {HOW}"
            raise ProblemError(
                Problem.INVALID_REQUEST, f"webhook: {message}", [FieldError(field="webhook", message=message)]
            )
        return JobWebhook.of(asked, caller.tenant, signer, self._progress_seconds)

    def rotate(self, caller: Caller, overlap_seconds: int) -> CreatedSecret:
        """Make the caller's secret, or a new one. Raises ProblemError when too many sign at present."""
        try:
            return self._signing.rotate(signer_of(caller), overlap_seconds)
        except TooManySecrets as error:
            raise ProblemError(Problem.CONFLICT, str(error)) from error

    async def test(self, url: HttpUrl, caller: Caller) -> ReceiverTestOutcome:
        """Send the event `webhook.test` once, and return how it went. Raises ProblemError when it cannot be sent."""
        self._check_address(url, "url")
        active = await run_sync(self._signing.active, signer_of(caller))
        if not active:
            raise ProblemError(Problem.CONFLICT, f"there is no secret to sign with; {HOW}")
        if self._tests >= MOST_TESTS:
            detail = f"{MOST_TESTS} receivers are being tried out; try again"
            raise ProblemError(Problem.TOO_BUSY, detail, None, **{"Retry-After": "5"})
        message_id, body = f"msg_test_{secrets.token_hex(8)}", trial_message(datetime.now(UTC))
        self._tests += 1
        try:
            answer = await self._sender.send(str(url), signed(message_id, body, active), body)
        finally:
            self._tests -= 1
        return ReceiverTestOutcome(
            id=message_id,
            delivered=answer.error is None,
            at=datetime.now(UTC),
            seconds=round(answer.seconds, 3),
            status=answer.status,
            error=answer.error,
        )

    def _check_address(self, url: HttpUrl, field: str) -> None:
        kind = None if self._allow_private else literal_refusal(url.host or "")
        if kind is not None:
            message = (
                f"its address is {kind}, and webhooks are sent to public ones alone; whoever runs the service may "
                "allow others with MASKMERGE_WEBHOOK_ALLOW_PRIVATE=true"
            )
            raise ProblemError(
                Problem.INVALID_REQUEST, f"{field}: {message}", [FieldError(field=field, message=message)]
            )
