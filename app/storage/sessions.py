"""Sessions of people who have signed in to the dashboard with an API key.

A session is known by a token of 256 random bits, of which Redis holds the digest and the id of the key. The key itself
is stored nowhere, and is looked at with every request: once it is revoked or has expired, its sessions are over.
"""

import hashlib
import secrets
from typing import cast

from redis import Redis

from app.contracts.api_keys import Caller
from app.storage.api_keys import ApiKeys, KeyRefused
from app.storage.keys import Keys

SESSION_S = 12 * 3600  # a working day; then the key is asked for again


class Sessions:
    """Begins, finds and ends sessions. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, prefix: str, api_keys: ApiKeys) -> None:
        self._redis = redis
        self._keys = Keys(prefix)
        self._api_keys = api_keys

    def begin(self, key: str) -> str:
        """Begin a session of who holds an API key, and return its token. Raises KeyRefused."""
        caller = self._api_keys.caller(key)
        token = secrets.token_urlsafe(32)
        self._redis.set(self._name(token), str(caller.key_id), ex=SESSION_S)
        return token

    def caller(self, token: str) -> Caller:
        """Return whose session it is. Raises KeyRefused where it is over, or its key is refused."""
        key_id = cast(str | None, self._redis.get(self._name(token)))
        if key_id is None:
            raise KeyRefused("the session is over; sign in again")
        return self._api_keys.holder(key_id)

    def end(self, token: str) -> None:
        """End a session, if there is one with this token."""
        self._redis.delete(self._name(token))

    def _name(self, token: str) -> str:
        return self._keys.session(hashlib.sha256(token.encode()).hexdigest())
