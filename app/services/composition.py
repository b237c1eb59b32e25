"""The services that the API's routes work with, made once per app."""

from dataclasses import dataclass

from redis import Redis

from app.contracts.limits import TenantLimits
from app.contracts.settings import Settings
from app.services.deliverer import Deliverer
from app.services.inspection import Inspectors
from app.services.jobs import Jobs
from app.services.limits import Room
from app.services.predictions import Predictions
from app.services.targets import Targets
from app.services.uploads import Uploads
from app.services.webhook_sender import Sender
from app.services.webhooks import Webhooks
from app.storage.api_keys import ApiKeys
from app.storage.artifacts import open_artifacts
from app.storage.artifacts.store import ArtifactStore
from app.storage.connection import connect_for_answers, connect_for_dispatching, connect_for_watching
from app.storage.events import TURN_MS, JobWatcher
from app.storage.jobs import JobStore
from app.storage.keys import Keys
from app.storage.queue import TaskQueue
from app.storage.rates import Rates
from app.storage.reaper import Reaper
from app.storage.searches import SearchFolder
from app.storage.sessions import Sessions
from app.storage.signing_secrets import SigningSecrets
from app.storage.statistics import KeptStatistics
from app.storage.uploads import UploadFolders
from app.storage.versions import RedisUpgrade, upgrade_folder
from worker.engine.catalog.primitives.paths import hide

WATCHING = 256  # connections to Redis; with as many to clients, half of the 1,024 files that a process usually may open


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: JobStore
    watcher: JobWatcher
    artifacts: ArtifactStore
    searches: SearchFolder
    inspectors: Inspectors
    jobs: Jobs
    predictions: Predictions
    room: Room
    statistics: KeptStatistics
    reaper: Reaper
    api_keys: ApiKeys
    sessions: Sessions
    uploads: Uploads
    upgrade: RedisUpgrade
    webhooks: Webhooks
    deliverer: Deliverer
    rates: Rates
    limits: TenantLimits
    connections: tuple[Redis, ...]
    """Clients of Redis, which whoever made the services closes after all else."""

    def close(self) -> None:
        """Close the connections to Redis that block; the watcher closes its own."""
        for redis in self.connections:
            redis.close()


def compose(settings: Settings) -> Services:
    """Make the services.

    Raises:
        ValueError: no Redis is named, or something that is none, or no store of artifacts.
        NewerData: a newer release has written the data folder.
    """
    if settings.redis_url is None:
        raise ValueError("MASKMERGE_REDIS_URL is not set; set it, or use 'maskmerge serve', which brings its own Redis")
    hide(*settings.hidden_folders)
    url = settings.redis_url.get_secret_value()
    redis = connect_for_answers(url)
    store = JobStore(
        redis,
        settings.prefix,
        settings.lease_seconds,
        settings.max_losses,
        retention_seconds=settings.job_retention,
        limits=settings.limits,
        replicas=settings.replicas,
    )
    dispatching = connect_for_dispatching(url)
    queue = TaskQueue(dispatching, settings.queue, store)
    artifacts = open_artifacts(settings.artifact_store, settings.data_dir, settings.object_storage)
    artifacts.prepare()
    upgrade_folder(settings.data_dir)
    inspectors = Inspectors(
        settings.local_roots, settings.data_dir, settings.artifact_store, objects=settings.object_storage
    )
    secrets = SigningSecrets(redis, settings.prefix)
    sender = Sender(allow_private=settings.webhook_allow_private, timeout_s=settings.webhook_seconds)
    webhooks = Webhooks(
        secrets,
        sender,
        allow_private=settings.webhook_allow_private,
        progress_seconds=settings.webhook_progress_seconds,
    )
    statistics = KeptStatistics(settings.data_dir, settings.kept_in, settings.object_storage)
    uploads = UploadFolders(settings.data_dir)
    room = Room(store.usage, artifacts, statistics.folders, uploads, settings.limits, settings.min_free_bytes)
    jobs = Jobs(
        store, queue, inspectors, webhooks, room, settings.limits, settings.idempotency_seconds, Targets(settings)
    )
    watching = connect_for_watching(url, most=WATCHING, longest_wait_s=TURN_MS / 1000)
    watcher = JobWatcher(watching, settings.prefix)
    searches = SearchFolder(settings.data_dir)
    api_keys = ApiKeys(redis, settings.prefix)
    return Services(
        settings=settings,
        store=store,
        watcher=watcher,
        artifacts=artifacts,
        searches=searches,
        inspectors=inspectors,
        jobs=jobs,
        predictions=Predictions(store, queue, watcher, settings.predict_seconds),
        room=room,
        statistics=statistics,
        reaper=Reaper(store, queue),
        api_keys=api_keys,
        sessions=Sessions(redis, settings.prefix, api_keys),
        uploads=Uploads(
            uploads,
            inspectors,
            store.active.uploads_read,
            room,
            settings.max_upload_bytes,
            settings.upload_retention,
        ),
        upgrade=RedisUpgrade(redis, Keys(settings.prefix)),
        webhooks=webhooks,
        deliverer=Deliverer(store, secrets, sender, settings.webhook_seconds),
        rates=Rates(redis, settings.prefix),
        limits=settings.limits,
        connections=(redis, dispatching),
    )
