"""The form in which things are stored, as a number in the data folder and one in Redis.

A release that changes the form adds one to `FORMAT`, and a step that brings what is there from the form before to the
new one. Each process that writes takes the steps that are missing when it starts, and refuses what a newer release has
written, which it would misread. Releases before form 2 left no number.
"""

import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import cast

from redis import Redis

from app.contracts.api_keys import DEFAULT_TENANT
from app.storage.keys import Keys

FORMAT = 3
FIRST = 1
"""Format of what has no number."""
MARK = "format.json"
NEWER_DATA_STATUS = 7
"""Exit status of a process that was to open what a newer release has written; `Exit.NEWER_DATA` of the commands."""
PAGE = 100

logger = logging.getLogger(__name__)


class NewerData(Exception):
    """A newer release has written what is there, and this one cannot read it; the message says what to do."""


def check_folder(data_dir: Path) -> int:
    """Return the format of a data folder. Raises NewerData, and ValueError when its number cannot be read."""
    try:
        text = (data_dir / MARK).read_text()
    except FileNotFoundError:
        return FIRST
    return _checked(text, f"the data folder {data_dir}")


def upgrade_folder(data_dir: Path) -> None:
    """Bring a data folder, which exists, to the present form. Raises as `check_folder` does, and OSError."""
    if check_folder(data_dir) < FORMAT:  # form 2 only adds a folder for uploads, made when it is needed; form 3 none
        unfinished = data_dir / f"{MARK}.part"
        unfinished.write_text(_mark())
        unfinished.replace(data_dir / MARK)


def check_redis(redis: Redis, keys: Keys) -> int:
    """Return the format of what Redis holds. Raises as `check_folder` does, and redis exceptions.

    Args:
        redis: a client with decode_responses.
    """
    text = cast(str | None, redis.get(keys.format))
    return FIRST if text is None else _checked(text, "what Redis holds")


def upgrade_redis(redis: Redis, keys: Keys) -> None:
    """Bring what Redis holds to the present form. Several processes may do so at once. Raises as `check_redis` does."""
    found = check_redis(redis, keys)
    for step in range(found, FORMAT):
        logger.info("Redis is brought from form %d to form %d; a new one begins at %d", step, step + 1, FIRST)
        OF_REDIS[step](redis, keys)
    if found < FORMAT:
        redis.set(keys.format, _mark())


class RedisUpgrade:
    """Upgrades Redis for a process that starts while Redis may be away."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._is_done = False
        self.refused: NewerData | None = None
        """Why this process cannot use what Redis holds, once that is known."""

    def run(self) -> None:
        """Upgrade, if it was not done yet. Raises redis exceptions when Redis is away, and ValueError."""
        if self._is_done or self.refused is not None:
            return
        try:
            upgrade_redis(self._redis, self._keys)
            self._is_done = True
        except NewerData as error:
            self.refused = error


def _list_jobs_by_tenant(redis: Redis, keys: Keys) -> None:
    """Add the jobs of releases without tenants to the default tenant's list; their records are read as they are."""
    position = "-"
    while True:
        ids = cast(list[str], redis.zrangebylex(keys.jobs, position, "+", start=0, num=PAGE))
        older = [job_id for job_id in ids if redis.hget(keys.record(job_id), "tenant") is None]
        if older:
            redis.zadd(keys.jobs_of(DEFAULT_TENANT), dict.fromkeys(older, 0))
        if len(ids) < PAGE:
            return
        position = f"({ids[-1]}"


def _nothing(redis: Redis, keys: Keys) -> None:
    """Change nothing: tasks of form 2 are as before. Form 3 has shards too, which processes of form 2 do not know."""


OF_REDIS: Mapping[int, Callable[[Redis, Keys], None]] = {1: _list_jobs_by_tenant, 2: _nothing}
"""Steps to the next form, by the form that they begin with. A step may be taken twice, and by two processes at once."""


def _mark() -> str:
    return json.dumps({"format": FORMAT, "release": version("maskmerge")})


def _checked(text: str, what: str) -> int:
    try:
        mark = json.loads(text)
        found, release = int(mark["format"]), str(mark["release"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what} does not tell its form: {MARK} is not as it was written; restore a backup") from error
    if found > FORMAT:
        raise NewerData(
            f"{what} was written by maskmerge {release} in form {found}, and this is {version('maskmerge')}, which "
            f"reads forms up to {FORMAT}; start that release, or restore a backup from before the upgrade"
        )
    return found
