"""`python -m worker.health` has exit status 0 while a worker of this host lives, as a container's health check asks."""

import socket
import sys

from redis.exceptions import RedisError

from app.contracts.settings import Settings
from app.storage.connection import connect
from app.storage.jobs import JobStore


def problem(settings: Settings) -> str | None:
    """Say what is wrong, or return None."""
    if settings.redis_url is None:
        return "MASKMERGE_REDIS_URL is not set"
    try:
        redis = connect(settings.redis_url.get_secret_value(), patience=0, timeout_s=3)
    except ValueError as error:
        return str(error)
    store = JobStore(redis, settings.prefix, settings.lease_seconds, settings.max_losses)
    host = socket.gethostname()
    try:
        # A worker's name is its host, its process id and a random part.
        if host in {name.rsplit("-", 2)[0] for name in store.workers.names()}:
            return None
    except RedisError as error:
        return f"Redis does not answer: {error}"
    return f"no worker of {host} is alive"


if __name__ == "__main__":
    sys.exit(problem(Settings()))
