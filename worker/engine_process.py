"""Runs the engine in a long-lived process, and has both ends of its pipes.

Loading torch and transformers takes seconds and CUDA does not survive a fork, so the worker keeps one engine process
and feeds it jobs as JSON lines; events come back the same way. The worker kills it when a job must stop, and starts
another when it died, hung or grew too large. It takes jobs as soon as it can merge, and goes on importing the libraries
that load models. Whatever it does, it sends a beat every second, so that the worker can tell when it hangs.
"""

import gc
import json
import logging
import os
import resource
import select
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import psutil
from pydantic import BaseModel, Field, TypeAdapter

from app.contracts.devices import Device
from app.contracts.jobs import JobError, PhaseName
from app.contracts.lifetime import die_with_parent
from app.contracts.settings import Settings
from app.observability.context import facts, process_concerns
from app.observability.logs import adopt, configure
from app.storage.scratch import Scratch
from app.storage.statistics import common_statistics
from worker.engine.catalog.contracts.prediction import Prediction, PredictionSpec
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult, ShardResult
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec, ScoreSpec, ShardSpec, ShardWork
from worker.engine.catalog.primitives.errors import DiskFull, EngineError, OutOfMemory, StorageError
from worker.engine.catalog.primitives.paths import hide
from worker.vitals import Vitals, processor_seconds

if TYPE_CHECKING:
    from worker.engine.jobs.engine import Engine

BEAT_S = 1.0
WELL_S = 10.0  # an engine that is silent and idle for longer is not counted on
START_TIMEOUT_S = 120  # importing torch and transformers from a cold disk
PROGRESS_INTERVAL_S = 0.1  # the worker records at most two a second; the pipe need not carry more than this
READ_BYTES = 1 << 16
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""Settings by which glibc keeps this many bytes of freed memory. By default the blocks of a merge go back to the
kernel, which clears every page again when the next block takes it."""
UNUSED = ("accelerate", "redis")
"""Packages that libraries import where they are installed, and that no job uses: transformers imports accelerate, and
optuna redis. An engine starts in a second less without them."""
FIRST_JOB_S = 0.1  # an engine that was started for a job waits so long for it

logger = logging.getLogger(__name__)


class Ready(BaseModel):
    event: Literal["ready"] = "ready"
    device: Device


class Warm(BaseModel):
    event: Literal["warm"] = "warm"


class Beat(BaseModel):
    event: Literal["beat"] = "beat"


class Progressed(BaseModel):
    event: Literal["progressed"] = "progressed"
    phase: PhaseName
    done: int
    total: int
    unit: str
    models: dict[str, tuple[int, int]]
    """Done and total of each model."""


class Finished(BaseModel):
    event: Literal["finished"] = "finished"
    result: MergeResult | ScoreResult


class ShardDone(BaseModel):
    event: Literal["shard_done"] = "shard_done"
    result: ShardResult


class Predicted(BaseModel):
    event: Literal["predicted"] = "predicted"
    result: Prediction


class CutIntoShards(BaseModel):
    """The job's scoring is left to shards; `batch_tokens` is for `SharedScoring`."""

    event: Literal["cut"] = "cut"
    shards: list[ShardWork]
    batch_tokens: dict[str, int]


class Failed(BaseModel):
    event: Literal["failed"] = "failed"
    error: JobError


AnySpec = MergeSpec | ScoreSpec | ShardSpec | PredictionSpec


class Order(BaseModel):
    """A job for the engine process, and the facts that the lines of its log have."""

    spec: Annotated[AnySpec, Field(discriminator="kind")]
    facts: dict[str, str | int]


Ended = CutIntoShards | ShardDone | Predicted | Finished | Failed
"""Events that end a job."""
Told = Ready | Progressed | Ended
"""Events of which `EngineProcess.poll` tells."""
AnyEvent = Told | Warm | Beat
EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="event")])


class EngineDied(Exception):
    """The process ended by itself, or was killed by another. `out_of_memory`: the kernel killed it to free memory."""

    def __init__(self, returncode: int, out_of_memory: bool) -> None:
        super().__init__(f"the engine process ended with {returncode}")
        self.out_of_memory = out_of_memory
        self.reason = "out_of_memory" if out_of_memory else "ended"
        """What happened, as metrics name it."""


class EngineHung(EngineDied):
    """The process gave no sign of life and was killed."""

    def __init__(self, why: str) -> None:
        super().__init__(-signal.SIGKILL, out_of_memory=False)
        self.args = (f"the engine process hung: {why}",)
        self.reason = "hung"


class EngineStopped(EngineDied):
    """The worker has killed the process, and has not started another yet."""

    def __init__(self) -> None:
        super().__init__(-signal.SIGKILL, out_of_memory=False)
        self.reason = "stopped"


class EngineProcess:
    """The worker's end of the engine process.

    Only one thread may use it, except for `is_well`; it must be started from the main thread (see `die_with_parent`).

    Args:
        heartbeat_seconds, stall_seconds: times after which it counts as hung, see `Vitals`.
        device: the setting MASKMERGE_DEVICE.
    """

    def __init__(
        self,
        threads: int,
        heartbeat_seconds: float = 30,
        stall_seconds: float = 600,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        self._threads = threads
        self._device = device
        self._limits = (heartbeat_seconds, stall_seconds)
        self._vitals: Vitals | None = None
        self._is_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Scratch | None = None
        self._events = -1
        self._buffer = b""
        self._oom_kills = 0
        self.is_warm = False
        """Whether it has imported all libraries, also those that only some jobs need. `poll` sets it."""

    def start(self) -> None:
        """Start it and wait until it takes jobs. Raises EngineDied when that fails."""
        self.kill()
        self._is_ready = False
        self._scratch = Scratch()
        read_end, write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.engine_process", str(os.getpid()), str(write_end)],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=[write_end],
            env={
                **MALLOC,  # the worker's own environment takes precedence
                **{
                    name: value for name, value in os.environ.items() if name != "MASKMERGE_REDIS_URL"
                },  # Redis's URL holds a password
                "TMPDIR": str(self._scratch.path),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "OMP_NUM_THREADS": str(self._threads),
                "MASKMERGE_DEVICE": self._device,
                "TOKENIZERS_PARALLELISM": "false",
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        os.close(write_end)
        os.set_blocking(read_end, False)
        self._events, self._buffer, self._oom_kills, self.is_warm = read_end, b"", _oom_kills(), False
        self._vitals = Vitals(*self._limits, partial(processor_seconds, self._process.pid))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := [event for event in self.poll(1.0) if isinstance(event, Ready)]):
            if time.monotonic() > deadline:
                self.kill()
                raise EngineHung(f"it was not ready after {START_TIMEOUT_S} s")
        self._device = ready[0].device  # its successors must not go on with another, where a GPU gets lost
        self._is_ready = True

    def run(self, spec: JobSpec) -> None:
        """Begin a job, whose events come from `poll`. Raises EngineDied."""
        process = self._running()
        try:
            assert process.stdin is not None  # noqa: S101 - it is a pipe, see start
            process.stdin.write(Order(spec=spec, facts=dict(facts())).model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        self._signs.begins()

    def poll(self, timeout_s: float) -> list[Told]:
        """Return the events since the last call, after waiting at most `timeout_s` for one. Raises EngineDied.

        Call it often, also while there is no job: it notices a hanging process and kills it.
        """
        events = self._read(timeout_s)
        for event in events:
            self._signs.heard(progresses=not isinstance(event, Beat))
            if isinstance(event, Ended):
                self._signs.ends()
        why = self._signs.look()
        if why is not None:
            self.kill()
            raise EngineHung(why)
        self.is_warm |= any(isinstance(event, Warm) for event in events)
        return [event for event in events if not isinstance(event, Warm | Beat)]

    def _read(self, timeout_s: float) -> list[AnyEvent]:
        self._running()
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return []
        try:
            data = os.read(self._events, READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise self._death()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [EVENT.validate_json(line) for line in lines]

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            process, self._process = self._process, None
            os.close(self._events)
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # closing sends the rest, which a dead process does not take
                    process.stdin.close()
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def is_well(self) -> bool:
        """Return whether the process takes jobs, as far as is known. Any thread may call this."""
        return self._process is not None and self._is_ready and self._signs.seems_well(WELL_S)

    @property
    def device(self) -> Device:
        """The device on which it computes, from its first start on."""
        if self._device == "auto":
            raise EngineStopped
        return self._device

    @property
    def pid(self) -> int:
        return self._running().pid

    def resident_bytes(self) -> int:
        """Return the bytes of memory that the process holds; 0 when it is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    @property
    def _signs(self) -> Vitals:
        if self._vitals is None:
            raise EngineStopped
        return self._vitals

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EngineStopped
        return self._process

    def _death(self) -> EngineDied:
        process = self._running()
        returncode = process.wait()
        out_of_memory = returncode == -9 and _oom_kills() > self._oom_kills
        self.kill()
        return EngineDied(returncode, out_of_memory)


def _oom_kills() -> int:
    """Return the number of kills for want of memory so far, in this control group and on this machine."""
    found = 0
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return found


# --- the engine's end

_sending = Lock()  # two threads send events, a line at a time


def serve(requests: BinaryIO, events: int, settings: Settings) -> None:
    """Run jobs one after the other until the worker closes the pipe. It exits where there is no such device.

    Libraries that only some jobs need are imported while there is no job yet, or after the first job.
    """
    Thread(target=_beat, args=(events,), daemon=True).start()
    # Nothing that is imported will become garbage. Looking for garbage takes a tenth of the time of importing, and in
    # jobs a tenth of a second now and then.
    gc.disable()
    for name in UNUSED:
        sys.modules[name] = None  # type: ignore[assignment]  # to `import` and `find_spec`, it is not installed
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from worker.engine.jobs.cutting import Cut
    from worker.engine.jobs.engine import Engine
    from worker.engine.runtime.device import chosen_device
    from worker.engine.runtime.libraries import preload
    from worker.engine.runtime.protocols import forbid_others
    from worker.engine.runtime.threads import pool
    from worker.engine.runtime.time_limits import are_late

    forbid_others()
    try:
        chosen = chosen_device(settings.device)
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(2)
    engine = Engine(chosen, common=common_statistics(settings.kept_in, settings.object_storage))
    pool(torch.get_num_threads())
    gc.freeze()
    gc.enable()
    _send(events, Ready.model_validate({"device": chosen.type}))

    def warm() -> None:
        preload()
        adopt()
        gc.freeze()
        _send(events, Warm())

    warming = Thread(target=warm)
    if not select.select([requests], [], [], FIRST_JOB_S)[0]:
        warming.start()
    for request in requests:
        try:
            order = Order.model_validate_json(request)
            process_concerns(order.facts)
            told = Throttled(events)
            done = _run(engine, order.spec, told)
        except Cut as cut:
            _send(events, CutIntoShards(shards=list(cut.shards), batch_tokens=cut.batch_tokens))
        except Exception as error:
            _send(events, Failed(error=_job_error(error)))
        else:
            _send(events, done)
        process_concerns({})
        if are_late():  # it would take time from the next jobs; the worker starts another process
            logger.warning("a call that takes too long goes on, so the engine process ends")
            os._exit(1)
        if warming.ident is None:
            warming.start()


def _run(engine: "Engine", spec: AnySpec, told: "Throttled") -> ShardDone | Predicted | Finished:
    if isinstance(spec, ShardSpec):
        return ShardDone(result=engine.shard(spec, told))
    if isinstance(spec, PredictionSpec):
        return Predicted(result=engine.predict(spec, told))
    return Finished(result=engine.run(spec, told))


class Throttled:
    """Sends progress, but no more often than anybody reads it. The first and last of a phase are always sent."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._last = 0.0

    def __call__(self, phase: str, done: int, total: int, unit: str, models: Mapping[str, tuple[int, int]]) -> None:
        now = time.monotonic()
        if done in (0, total) or now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            told = Progressed(phase=PhaseName(phase), done=done, total=total, unit=unit, models=dict(models))
            _send(self._events, told)


def _job_error(error: Exception) -> JobError:
    """Turn any exception into a job's error; no other place does so."""
    import errno

    from worker.engine.runtime.resources import is_out_of_memory

    if is_out_of_memory(error):
        error = OutOfMemory("the job needs more memory than there is; use fewer or smaller models, or a larger worker")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = DiskFull("there is no space left in the data folder")
    elif isinstance(error, OSError) and error.errno == errno.EFBIG:
        error = DiskFull(
            "a file became larger than the disk of the data folder or the worker's limit on files (ulimit -f) allows; "
            "ask for a smaller output.max_shard_bytes"
        )
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        error = StorageError(
            "as many files are open as the worker may have; raise its limit on open files (ulimit -n), or use "
            "checkpoints of fewer files"
        )
    if isinstance(error, EngineError):
        return as_job_error(error)
    # The trace goes to the log without the exception's text, which may quote a row.
    logger.error("unexpected %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    message = f"unexpected {type(error).__name__} in the engine; the worker's log has the trace"
    return JobError.model_validate({"code": "internal", "message": message})


def as_job_error(error: EngineError) -> JobError:
    """Return the error as the job's record keeps it."""
    detail: dict[str, Any] = json.loads(json.dumps(error.detail, default=str))
    return JobError.model_validate(
        {"code": error.code, "message": error.message, "retryable": error.retryable, "detail": detail}
    )


def _open_as_many_files_as_allowed() -> None:
    """Raise the limit of open files: a merge holds all weight files open. The usual limit is for the sake of select."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _beat(events: int) -> None:
    while True:
        _send(events, Beat())
        time.sleep(BEAT_S)


def _send(events: int, event: BaseModel) -> None:
    data = event.model_dump_json().encode() + b"\n"
    with _sending:
        while data:
            data = data[os.write(events, data) :]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    _open_as_many_files_as_allowed()
    configured = Settings()
    hide(*configured.hidden_folders)
    configure(configured.log_level, configured.log_format, "engine")
    serve(sys.stdin.buffer, int(sys.argv[2]), configured)
