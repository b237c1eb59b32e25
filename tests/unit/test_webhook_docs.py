"""The code in docs/webhooks.md verifies what the service signs."""

import base64
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from standardwebhooks import Webhook as Signer

from app.contracts.webhooks import Webhook
from app.services.webhook_messages import signed, trial_message
from tests.conftest import REPOSITORY

Received = Callable[[bytes, dict[str, str], str], dict[str, Any] | None]
PAGE = (REPOSITORY / "docs" / "webhooks.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
BODY = trial_message(datetime.now(UTC))


def new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


@pytest.fixture(params=CODE, ids=["by the library", "by hand"])
def received(request: pytest.FixtureRequest) -> Received:
    names: dict[str, Any] = {}
    exec(request.param, names)  # noqa: S102 - it is ours
    function: Received = names["received"]
    return function


def test_it_takes_what_was_signed_with_the_secret_or_with_its_successor_too(received: Received) -> None:
    former, present = new_secret(), new_secret()
    headers = signed("msg_1", BODY, [present, former])
    for secret in (former, present):
        message = received(BODY, headers, secret)
        assert message is not None
        assert message["type"] == "webhook.test"


def test_it_refuses_what_was_changed_and_what_others_signed(received: Received) -> None:
    secret = new_secret()
    headers = signed("msg_1", BODY, [secret])
    assert received(BODY + b" ", headers, secret) is None
    assert received(BODY, {**headers, "webhook-id": "msg_2"}, secret) is None
    assert received(BODY, headers, new_secret()) is None


def test_it_refuses_what_is_old(received: Received) -> None:
    secret, now = new_secret(), datetime.now(UTC)
    for minutes in (4, 6):
        then = now - timedelta(minutes=minutes)
        signature = Signer(secret).sign("msg_1", then, BODY.decode())
        headers = {
            "webhook-id": "msg_1",
            "webhook-timestamp": str(int(then.timestamp())),
            "webhook-signature": signature,
        }
        assert (received(BODY, headers, secret) is None) == (minutes > 5)


def test_webhooks_in_the_documentation_are_webhooks() -> None:
    found = re.findall(r'"webhook": (\{.*?\})\}', PAGE)
    assert [Webhook.model_validate_json(text) for text in found]
