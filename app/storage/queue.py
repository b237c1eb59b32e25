"""RQ as transport: it wakes workers, which then claim whatever is next. `Tasks` knows which tasks wait.

Requests to predict have a queue of their own, and a worker goes from one queue to the other. So such a request waits
for the task in hand alone, and a task waits for one such request.
"""

import secrets
from math import ceil

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from app.contracts.devices import ANY, DEVICES, LANES, Device, lane_of
from app.storage.jobs import JobStore

WORK = "work"
"""Name of the function that a message asks for, in the worker's table."""
PREDICT = "predict"
"""Name of the function that a message of the queue of predictions asks for, with the id of an order."""


def queue_of_tasks(name: str, lane: str) -> str:
    """Return the name of the queue of a lane's tasks."""
    return name if lane == ANY else f"{name}-{lane}"


def queue_of_predictions(name: str, lane: str) -> str:
    """Return the name of the queue of predictions beside a lane's queue of tasks."""
    return queue_of_tasks(f"{name}-predictions", lane)


class TaskQueue:
    """Wakes workers through RQ. A message says that there is work, and names none.

    Each lane has queues of its own, so that only workers are woken that may do the work.

    Args:
        redis: a client without decode_responses, as RQ needs it.
    """

    def __init__(self, redis: Redis, name: str, store: JobStore) -> None:
        def queue(name: str) -> Queue:
            return Queue(name, connection=redis, serializer=JSONSerializer)

        self.name = name
        self._tasks = {lane: queue(queue_of_tasks(name, lane)) for lane in LANES}
        self._predictions = {lane: queue(queue_of_predictions(name, lane)) for lane in LANES}
        self._store = store

    def wake(self) -> int:
        """See to it that RQ has a message for each task that may start, and returns how many it added.

        Of each lane, there are never more messages than workers, since a worker that ends a task calls this again. So
        it is called whenever a task may have become one that can start; what a crash leaves undone, and what RQ loses,
        the next sweep makes good.
        """
        return self._wake(ANY, None) + sum(self._wake(device, device) for device in DEVICES)

    def _wake(self, lane: str, device: Device | None) -> int:
        wanted = self._store.tasks.startable(max(1, self._store.workers.count(device)), lane)
        missing = max(0, wanted - self._tasks[lane].count) if wanted else 0
        for _ in range(missing):
            self._tasks[lane].enqueue_call(
                WORK,  # never imported
                job_id=secrets.token_hex(8),
                timeout=-1,  # leases watch over the work, see `app.storage.tasks`
                result_ttl=0,
                failure_ttl=3600,
                description="there is work",
            )
        return missing

    def ask_to_predict(self, order: str, seconds: float, device: Device | None) -> None:
        """Have a worker answer an order, by its id, within so many seconds, on a device if one is named."""
        self._predictions[lane_of(device)].enqueue_call(
            PREDICT,  # never imported
            args=(order,),
            job_id=order,
            timeout=-1,  # the order has a deadline
            ttl=ceil(seconds),
            result_ttl=0,
            failure_ttl=3600,
            description="rows wait for answers",
        )

    def predictions_waiting(self) -> int:
        """Return how many orders wait for a worker."""
        return sum(int(queue.count) for queue in self._predictions.values())

    def forget_prediction(self, order: str, device: Device | None) -> None:
        """Take an order out of its queue, if it is still there."""
        self._predictions[lane_of(device)].remove(order)
