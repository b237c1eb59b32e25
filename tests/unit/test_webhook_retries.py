"""When a delivery is sent again, and when it is given up."""

from dataclasses import replace

import pytest

from app.contracts.webhooks import DeliveryState, JobWebhook, WebhookEvent
from app.services.deliverer import FIRST_DELAY_S, LONGEST_DELAY_S, RETRY_FOR_MS, judged
from app.services.webhook_sender import Answer
from app.storage.deliveries import Claimed

HOUR_MS = 3_600_000
WEBHOOK = JobWebhook(
    url="https://example.org/",
    events=(WebhookEvent.FAILED,),
    progress_ms=1,
    signer="default",
    receiver="example.org:443",
)
CLAIMED = Claimed(
    job_id="0" * 28, n=1, claim=1, event=WebhookEvent.FAILED, created_ms=0, since_ms=0, tries=0, snapshot={},
    webhook=WEBHOOK,
)  # fmt: skip
FAILED = Answer(0.1, 500, "the receiver answered 500")


def test_the_longest_wait_doubles_up_to_six_hours_and_chance_decides_within_it() -> None:
    def wait_s(tries: int, chance: float) -> float:
        state, next_ms = judged(replace(CLAIMED, tries=tries), FAILED, 1000, chance)
        assert state is DeliveryState.PENDING
        assert next_ms is not None
        return (next_ms - 1000) / 1000

    assert [wait_s(tries, 1.0) for tries in range(4)] == [FIRST_DELAY_S * factor for factor in (1, 2, 4, 8)]
    assert wait_s(3, 0.25) == FIRST_DELAY_S * 2
    assert wait_s(3, 0.0) == 0.0
    assert wait_s(20, 1.0) == wait_s(10_000, 1.0) == LONGEST_DELAY_S


def test_the_last_attempt_is_made_when_72_hours_are_over() -> None:
    late = RETRY_FOR_MS - 1000
    assert judged(replace(CLAIMED, tries=30), FAILED, late, 1.0) == (DeliveryState.PENDING, RETRY_FOR_MS)
    assert judged(replace(CLAIMED, tries=31), FAILED, RETRY_FOR_MS, 1.0) == (DeliveryState.FAILED, None)
    again = replace(CLAIMED, since_ms=RETRY_FOR_MS)  # a redelivery has as long again
    assert judged(again, FAILED, RETRY_FOR_MS, 0.0) == (DeliveryState.PENDING, RETRY_FOR_MS)


@pytest.mark.parametrize(("asked_s", "wait_ms"), [(0.0, 5000), (3.0, 5000), (120.0, 120_000), (1e9, 6 * HOUR_MS)])
def test_a_receiver_may_ask_for_a_longer_wait_of_at_most_six_hours(asked_s: float, wait_ms: int) -> None:
    answer = replace(FAILED, status=503, retry_after_s=asked_s)
    assert judged(CLAIMED, answer, 0, 0.5) == (DeliveryState.PENDING, wait_ms)


def test_success_and_gone_are_final_and_progress_is_sent_once() -> None:
    assert judged(CLAIMED, Answer(0.1, 204), 0, 1.0) == (DeliveryState.DELIVERED, None)
    assert judged(CLAIMED, Answer(0.1, 410, "gone"), 0, 1.0) == (DeliveryState.FAILED, None)
    assert judged(replace(CLAIMED, event=WebhookEvent.PROGRESS), FAILED, 0, 1.0) == (DeliveryState.FAILED, None)
