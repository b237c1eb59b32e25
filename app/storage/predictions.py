"""Rows on their way to a worker, and the answer on its way back. Redis forgets both when nobody waits any more."""

import secrets
from math import ceil
from typing import cast

from redis import Redis

from app.contracts.predictions import PredictionOrder, PredictionOutcome
from app.storage.keys import Keys


class Predictions:
    """Hands over predictions. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def put(self, order: PredictionOrder, seconds: float) -> str:
        """Leave an order for a worker for so long, and return its id."""
        name = secrets.token_hex(16)
        self._redis.set(self._keys.prediction(name), order.model_dump_json(), px=ceil(1000 * seconds))
        return name

    def take(self, name: str) -> PredictionOrder | None:
        """Return an order, which no other worker gets then; None if nobody waits for it any more."""
        text = cast(str | None, self._redis.getdel(self._keys.prediction(name)))
        return None if text is None else PredictionOrder.model_validate_json(text)

    def answer(self, name: str, outcome: PredictionOutcome, seconds: float) -> None:
        """Answer an order; the answer is there for so long."""
        key = self._keys.prediction_outcome(name)
        with self._redis.pipeline() as writes:
            writes.rpush(key, outcome.model_dump_json())
            writes.pexpire(key, ceil(1000 * seconds))
            writes.execute()

    def outcome_key(self, name: str) -> str:
        """Return the key of the list to which the answer of an order is pushed."""
        return self._keys.prediction_outcome(name)

    def forget(self, name: str) -> None:
        """Remove an order for which nobody waits any more."""
        self._redis.delete(self._keys.prediction(name), self._keys.prediction_outcome(name))
