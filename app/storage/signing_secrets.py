"""The secrets that sign what webhooks are told.

They are kept as they are, and not as digests: whoever signs needs the secret itself. So whoever reads Redis, or its
files in the data folder, can sign too. No log has them.
"""

import base64
import secrets
from datetime import UTC, datetime
from typing import cast

from redis import Redis

from app.contracts.webhooks import CreatedSecret
from app.storage.keys import Keys
from app.storage.scripts import Clock, redis_clock, source

MOST_SECRETS = 5  # each adds 47 bytes to the header webhook-signature


class TooManySecrets(Exception):
    """The holder has as many signing secrets as it may have at once."""


class SigningSecrets:
    """Makes, rotates and finds secrets. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
        clock: the clock of Redis by default.
    """

    def __init__(self, redis: Redis, prefix: str, clock: Clock | None = None) -> None:
        self._redis = redis
        self._keys = Keys(prefix)
        self._clock = clock or redis_clock(redis)
        self._rotate = redis.register_script(source("rotate_secret"))

    def rotate(self, signer: str, overlap_seconds: float) -> CreatedSecret:
        """Make a secret. Former ones sign beside it for as long as they would have, but at most for the overlap.

        Raises TooManySecrets.
        """
        now = self._clock()
        secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
        until = now + int(overlap_seconds * 1000)
        made = self._rotate(keys=[self._keys.secrets(signer)], args=[now, secret, until, MOST_SECRETS])
        if not made:
            raise TooManySecrets(
                f"{MOST_SECRETS} secrets sign at present, because they were rotated within their overlaps; end the "
                "former ones with an overlap of 0 seconds, or wait"
            )
        former_until = datetime.fromtimestamp(until / 1000, UTC) if made == 2 else None
        return CreatedSecret(secret=secret, signer=signer, former_until=former_until)

    def active(self, signer: str) -> list[str]:
        """Return the secrets that sign now, the newest first; none where none was ever made."""
        found = self._redis.zrevrangebyscore(self._keys.secrets(signer), "+inf", f"({self._clock()}")
        return cast(list[str], found)

    def exist(self, signer: str) -> bool:
        """Return whether a secret was made; the newest one signs for ever."""
        return bool(self._redis.exists(self._keys.secrets(signer)))
