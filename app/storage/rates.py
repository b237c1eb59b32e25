"""How often somebody may do something, counted in Redis, so that all processes of the API count together."""

from dataclasses import dataclass

from redis import Redis

from app.storage.keys import Keys
from app.storage.scripts import source

MINUTE_MS = 60_000


@dataclass(frozen=True)
class Turn:
    """The answer to a request for one more. Times are in seconds, rounded up."""

    allowed: bool
    left: int
    """Number that may follow at once."""
    next_s: int
    """Time after which one more is allowed."""
    full_s: int
    """Time after which as many are allowed as ever."""


class Rates:
    """Counts what may be done so many times in a minute. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._keys = Keys(prefix)
        self._take = redis.register_script(source("rate"))

    def take(self, name: str, per_minute: int) -> Turn:
        """Ask for one more. A minute's number may come at once, and from then on one whenever its time has passed.

        Args:
            name: what is counted, and for whom.
        """
        allowed, left, next_s, full_s = self._take(keys=[self._keys.rate(name)], args=[per_minute, MINUTE_MS])
        return Turn(bool(allowed), int(left), int(next_s), int(full_s))
