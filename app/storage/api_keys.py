"""API keys in Redis: of each the digest of the key, its tenant, and what it allows.

A key has 256 random bits, so its digest needs no salt and no slow hash: nobody can try them all.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, cast

from redis import Redis

from app.contracts.addresses import is_loopback
from app.contracts.api_keys import Caller, CreatedKey, Key, NewKey, Scope
from app.contracts.settings import Settings
from app.storage.keys import Keys

TOKEN = re.compile(r"(?P<prefix>mm_(?P<id>[0-9a-f]{16}))_[A-Za-z0-9_-]{43}")
LAST_USE_MS = 60_000  # how exactly the last use is known, so that most requests write nothing


class KeyRefused(Exception):
    """A key is unknown, expired or revoked; the message says which only to who has the key's secret."""


class ApiKeys:
    """Makes, finds and revokes keys. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._keys = Keys(prefix)

    def create(self, asked: NewKey) -> CreatedKey:
        """Make a key. The answer alone has its secret."""
        key_id, now = secrets.token_hex(8), _now()
        prefix = f"mm_{key_id}"
        token = f"{prefix}_{secrets.token_urlsafe(32)}"
        fields: dict[str, str | int] = {
            "digest": _digest(token),
            "name": asked.name,
            "tenant": asked.tenant,
            "scopes": ",".join(sorted(set(asked.scopes))),
            "created_ms": now,
        }
        if asked.expires_at is not None:
            fields["expires_ms"] = int(asked.expires_at.timestamp() * 1000)
        with self._redis.pipeline() as both:
            both.hset(self._keys.api_key(key_id), mapping=cast(dict[Any, Any], fields))
            both.zadd(self._keys.api_keys, {key_id: time.time_ns() // 1000})  # two may be made in a millisecond
            both.execute()
        found = self._found(key_id)
        assert found is not None  # noqa: S101 - for the type checker: keys are never removed
        return CreatedKey(**found.model_dump(), key=token)

    def all(self) -> Iterator[Key]:
        """Yield every key, oldest first, revoked ones too."""
        for key_id in cast(list[str], self._redis.zrange(self._keys.api_keys, 0, -1)):
            found = self._found(key_id)
            if found is not None:
                yield found

    def revoke(self, key_id: str) -> bool:
        """Refuse a key from now on. Returns False where there is none with this id."""
        name = self._keys.api_key(key_id)
        if not self._redis.exists(name):
            return False
        self._redis.hsetnx(name, "revoked_ms", str(_now()))
        return True

    def exist(self) -> bool:
        """Return whether a key was ever made. From then on every caller needs one, even if it is revoked."""
        return bool(self._redis.exists(self._keys.api_keys))

    def require(self, settings: Settings) -> None:
        """Raise ValueError where the API would listen to other machines, and no key was ever made."""
        if settings.host == "localhost" or is_loopback(settings.host) or self.exist():
            return
        where = "" if settings.redis_url is not None else f" --data-dir {settings.data_dir}"
        raise ValueError(
            f"MASKMERGE_HOST is {settings.host}, and without API keys the service listens on loopback alone; make a "
            f"key first: maskmerge keys create --scope admin{where}"
        )

    def caller(self, token: str) -> Caller:
        """Return whom a key stands for. Raises KeyRefused."""
        parts = TOKEN.fullmatch(token)
        if parts is None:
            raise KeyRefused("the key does not have the form mm_ID_SECRET; send all of what `keys create` printed")
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.api_key(parts["id"])))
        if not hmac.compare_digest(fields.get("digest", ""), _digest(token)):
            raise KeyRefused("the key is unknown")
        return self._valid(parts["id"], fields)

    def holder(self, key_id: str) -> Caller:
        """Return whom the key with an id stands for, to somebody who has shown it before. Raises KeyRefused."""
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.api_key(key_id)))
        if not fields:
            raise KeyRefused("the key is unknown")
        return self._valid(key_id, fields)

    def _valid(self, key_id: str, fields: Mapping[str, str]) -> Caller:
        """Return whom a key stands for, and note its use. Raises KeyRefused where it was revoked or has expired."""
        now = _now()
        if "revoked_ms" in fields:
            raise KeyRefused("the key was revoked")
        if now >= int(fields.get("expires_ms", now + 1)):
            raise KeyRefused("the key has expired")
        if now - int(fields.get("used_ms", 0)) >= LAST_USE_MS:
            self._redis.hset(self._keys.api_key(key_id), "used_ms", str(now))
        scopes = frozenset(map(Scope, fields["scopes"].split(",")))
        return Caller(tenant=fields["tenant"], scopes=scopes, key_id=key_id)

    def _found(self, key_id: str) -> Key | None:
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.api_key(key_id)))
        if not fields:
            return None

        def time_of(name: str) -> datetime | None:
            return datetime.fromtimestamp(int(fields[name]) / 1000, UTC) if name in fields else None

        created = time_of("created_ms")
        assert created is not None  # noqa: S101 - for the type checker
        return Key(
            id=key_id,
            prefix=f"mm_{key_id}",
            name=fields["name"],
            tenant=fields["tenant"],
            scopes=[scope for scope in Scope if scope in fields["scopes"].split(",")],
            created_at=created,
            expires_at=time_of("expires_ms"),
            last_used_at=time_of("used_ms"),
            revoked_at=time_of("revoked_ms"),
        )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> int:
    return int(time.time() * 1000)
