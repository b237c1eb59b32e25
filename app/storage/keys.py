"""The names of everything that Redis holds."""

import hashlib
from dataclasses import dataclass

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.devices import ANY
from app.contracts.jobs import TaskId


@dataclass(frozen=True)
class Keys:
    """Names of keys, all below one prefix."""

    prefix: str

    def record(self, job_id: str) -> str:
        """Name the hash of a job's record, without its result."""
        return self._key("job", job_id)

    def result(self, job_id: str) -> str:
        """Name the result of a succeeded job, as JSON. Releases that had no such key kept it in the record."""
        return self._key("result", job_id)

    def events(self, job_id: str) -> str:
        """Name the stream of a job's events of status and log."""
        return self._key("events", job_id)

    def progress(self, job_id: str) -> str:
        """Name the stream of a job's events of progress."""
        return self._key("progress", job_id)

    def prediction(self, name: str) -> str:
        """Name the order of a prediction, as JSON, until a worker takes it."""
        return self._key("prediction", name)

    def prediction_outcome(self, name: str) -> str:
        """Name the list of the one answer to such an order."""
        return self._key("prediction-outcome", name)

    def deliveries(self, job_id: str) -> str:
        """Name the sorted set of the numbers of a job's deliveries. Each is a hash, named after it and its number."""
        return self._key("deliveries", job_id)

    def secrets(self, signer: str) -> str:
        """Name the sorted set of a signer's webhook secrets, by the time until which each signs."""
        return self._key("webhook-secrets", signer)

    def gone(self, job_id: str) -> str:
        """Name the reason why a job that existed is gone."""
        return self._key("gone", job_id)

    def task(self, task: TaskId | str) -> str:
        """Name the hash of a task: its state, attempt, losses and worker."""
        return self._key("task", str(task))

    def claim(self, token: str) -> str:
        """Name the attempt that a claim started, so that the same claim, sent again, starts no other."""
        return self._key("claim", token)

    def waiting(self, tenant: str, lane: str = ANY) -> str:
        """Sorted set of a tenant's waiting tasks in a lane: the highest priority first, the oldest of equal ones."""
        return self._key(_in_lane("waiting", lane), tenant)

    def running(self, tenant: str) -> str:
        """Sorted set of a tenant's running tasks, by the time that their attempt began."""
        return self._key("running", tenant)

    def idempotency(self, tenant: str, key: str) -> str:
        """Name the job that a tenant's Idempotency-Key made. The key is digested, because it may hold any text."""
        # Keys of releases without tenants are those of the default tenant. No header has the character between.
        text = key if tenant == DEFAULT_TENANT else f"{tenant}\0{key}"
        return self._key("idempotency", hashlib.sha256(text.encode()).hexdigest())

    def named(self, tenant: str, name: str) -> str:
        """Name the job that has a tenant's own name. The name is digested as an Idempotency-Key is."""
        return self._key("named", hashlib.sha256(f"{tenant}\0{name}".encode()).hexdigest())

    def api_key(self, key_id: str) -> str:
        """Name the hash of an API key: its digest, its tenant, its scopes, and when it was made, used and revoked."""
        return self._key("key", key_id)

    def session(self, digest: str) -> str:
        """Name the id of the API key with which somebody signed in to the dashboard, by the digest of the session."""
        return self._key("session", digest)

    @property
    def jobs(self) -> str:
        """Sorted set of all job ids, which sort by time."""
        return self._key("jobs")

    def jobs_of(self, tenant: str) -> str:
        """Sorted set of a tenant's job ids, which sort by time."""
        return self._key("jobs", tenant)

    @property
    def format(self) -> str:
        """Name the form in which the rest is stored, and the release that brought it there, as JSON."""
        return self._key("format")

    @property
    def api_keys(self) -> str:
        """Sorted set of the ids of all API keys, by the time that they were made."""
        return self._key("keys")

    @property
    def tenants(self) -> str:
        """Sorted set of the tenants that ever had a job, by the number of the start that was theirs last."""
        return self._key("tenants")

    def turns(self, lane: str) -> str:
        """Sorted set of tenants that wait in a lane: fewest running tasks first, then least recently served."""
        return self._key(_in_lane("turns", lane))

    def ranks(self, lane: str) -> str:
        """Sorted set of the same tenants: by the priority of their first task, and by turns where it is equal."""
        return self._key(_in_lane("ranks", lane))

    @property
    def reserved(self) -> str:
        """Hash of the bytes that each tenant's waiting and running jobs are going to write."""
        return self._key("reserved")

    @property
    def shards(self) -> str:
        """Hash of the numbers of shards among each tenant's waiting tasks."""
        return self._key("shards")

    @property
    def stored(self) -> str:
        """Hash of the bytes that are stored for each tenant."""
        return self._key("stored")

    def rate(self, of: str) -> str:
        """Name the time at which somebody may again send as many requests as at first."""
        return self._key("rate", of)

    @property
    def due(self) -> str:
        """Sorted set of tasks that processes of the last release made to wait. They are moved to `waiting`."""
        return self._key("due")

    @property
    def leases(self) -> str:
        """Sorted set of running tasks, by the time their lease ends."""
        return self._key("leases")

    @property
    def deadlines(self) -> str:
        """Sorted set of active tasks of jobs that have a deadline, by that deadline."""
        return self._key("deadlines")

    @property
    def receivers(self) -> str:
        """Sorted set of receivers of webhooks, by the time from which each is sent something; each has a queue."""
        return self._key("receivers")

    @property
    def workers(self) -> str:
        """Sorted set of live workers, by the time from which they count as gone."""
        return self._key("workers")

    def workers_with(self, device: str) -> str:
        """Sorted set of those of them that compute on a device."""
        return self._key("workers", device)

    @property
    def replicated(self) -> str:
        """Name what is written last, so that replicas that have it have everything before."""
        return self._key("replicated")

    @property
    def sums(self) -> str:
        """Hash of the sums that metrics tell, by the name of the metric and the values of its labels."""
        return self._key("sums")

    def _key(self, *parts: str) -> str:
        return ":".join((self.prefix, *parts))


def _in_lane(name: str, lane: str) -> str:
    """Name something of a lane. Releases without lanes had what is of the lane for any worker."""
    return name if lane == ANY else f"{name}-{lane}"
