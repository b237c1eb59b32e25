"""Everything that Redis holds of jobs: their records, the tasks that do their work, what webhooks
are told of them, and live workers.

Each change of a job's status or progress is an event in its log, added by the script that makes the change;
`app.storage.events` reads it.
"""

from redis import Redis

from app.contracts.limits import UNLIMITED, TenantLimits
from app.storage.active import ActiveJobs
from app.storage.deliveries import Deliveries
from app.storage.events import JobLog
from app.storage.keys import Keys
from app.storage.metrics import Sums
from app.storage.predictions import Predictions
from app.storage.records import Records
from app.storage.scripts import Clock, JobScripts
from app.storage.tasks import Tasks
from app.storage.usage import Usage
from app.storage.workers import Workers


class JobStore:
    """Records, tasks, deliveries and workers below one prefix; see `Records` and `Tasks` for the arguments.

    Args:
        clock: the clock of Redis by default, so that the machines of a deployment need not agree on the time.
        replicas: number of Redis' replicas that must have a change of a job before it counts.
    """

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        lease_seconds: float,
        max_losses: int,
        clock: Clock | None = None,
        retention_seconds: float | None = None,
        limits: TenantLimits = UNLIMITED,
        replicas: int = 0,
    ) -> None:
        keys = Keys(prefix)
        scripts = JobScripts(redis, keys, clock, replicas)
        self.clock = scripts.clock
        self.records = Records(redis, keys, scripts, retention_seconds, limits)
        self.tasks = Tasks(redis, keys, scripts, lease_seconds, max_losses, limits)
        self.deliveries = Deliveries(redis, keys, scripts)
        self.active = ActiveJobs(redis, keys)
        self.usage = Usage(redis, keys)
        self.workers = Workers(redis, keys, scripts.clock)
        self.sums = Sums(redis, keys)
        self.predictions = Predictions(redis, keys)
        self.log = JobLog(redis, keys)
