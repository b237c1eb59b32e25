"""A real merge tells a real receiver what happens to it, whatever happens to the process that tells."""

import json
from collections.abc import Callable

from standardwebhooks import Webhook as Verifier

from app.client import Client, DeliveryState
from tests.conftest import Service, tiny_recipe, wait_until
from tests.receivers import answering, receiving, stalling


def test_a_merge_that_is_not_accepted_is_told_as_succeeded_although_the_api_is_killed(
    new_service: Callable[..., Service],
) -> None:
    service = new_service(MASKMERGE_WEBHOOK_ALLOW_PRIVATE="true", MASKMERGE_WEBHOOK_SECONDS="1")
    service.start()
    client = Client(service.url)
    secret = client.rotate_webhook_secret().secret
    with receiving(stalling, answering(204)) as receiver:
        recipe = {**tiny_recipe("a", "b", name="average"), "accept": {"min_mean_retention": 2.0}}
        job_id = service.submit({**recipe, "webhook": {"url": receiver.url, "events": ["job.succeeded"]}})
        wait_until(lambda: receiver.received, "the first attempt")
        service.processes()["api"].kill()
        wait_until(lambda: len(receiver.received) > 1, "another attempt, by the next process")
        wait_until(lambda: client.deliveries(job_id)[0].state is DeliveryState.DELIVERED, "the attempt to be recorded")
        assert client.redeliver(job_id, 1).state is DeliveryState.PENDING
        wait_until(lambda: len(receiver.received) > 2, "the delivery once more")
        outcome = client.test_webhook(receiver.url)
    client.close()
    assert (outcome.delivered, outcome.status) == (True, 204)
    assert receiver.received[2].body == receiver.received[1].body
    assert json.loads(receiver.received[3].body)["type"] == "webhook.test"
    first, second = receiver.received[:2]
    assert first.body == second.body
    message = Verifier(secret).verify(second.body, second.headers)
    assert (message["type"], message["data"]["id"]) == ("job.succeeded", job_id)
    assert message["data"]["result"]["accepted"] is False
    assert "request" not in message["data"]
    job = service.finished(job_id)
    assert job["request"]["webhook"]["url"] == receiver.url
    artifact = service.get(f"/jobs/{job_id}/artifacts/recipe.json").json()
    assert "webhook" not in artifact
    assert "hidden-word" not in json.dumps(artifact)
    assert "hidden-word" not in service.log
    assert secret.removeprefix("whsec_") not in service.log
