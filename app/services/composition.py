"""What the API's routes work with, made once per app."""

from dataclasses import dataclass

from app.contracts.settings import Settings
from app.services.merges import Merges
from app.storage.artifacts import ArtifactFolder
from app.storage.connection import connect, connect_for_rq
from app.storage.hub import Hub
from app.storage.inputs import LocalInputs
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.reaper import Reaper


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: JobStore
    artifacts: ArtifactFolder
    merges: Merges
    reaper: Reaper


def compose(settings: Settings) -> Services:
    """Raises ValueError when no Redis is named."""
    if settings.redis_url is None:
        raise ValueError("MASKMERGE_REDIS_URL is not set; set it, or use 'maskmerge serve', which brings its own Redis")
    url = settings.redis_url.get_secret_value()
    store = JobStore(connect(url, patience=2), settings.queue, settings.lease_seconds, settings.max_losses)
    queue = TaskQueue(connect_for_rq(url), settings.queue, store)
    artifacts = ArtifactFolder(settings.data_dir)
    artifacts.prepare()
    merges = Merges(store, queue, LocalInputs(settings.local_roots), Hub(), settings.idempotency_seconds)
    return Services(settings, store, artifacts, merges, Reaper(store, queue))
