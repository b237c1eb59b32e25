"""The API's end of inspections: the inputs that a request names are read in a process that can be killed.

Checkpoints and data sets come from outside, and may be made to take for ever to read, or all memory. So one process,
the inspector, loads all that checks need and then only copies itself, once for each request. The copy reads, plans,
answers and ends (see `app.services.inspector`). It cannot disturb other requests, and has the limits of one request. To
make it takes some milliseconds, so that the next one is made ahead of its request.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.jobs import Gone, JobKind, Outcome
from app.contracts.models import ModelRequest
from app.contracts.object_storage import NO_BUCKETS, ObjectStorage
from app.contracts.requests import MergeRequest, ScoreRequest
from app.services.bodies import Body
from app.services.checks import Accepted
from app.services.previews import Preview, RowsAsked
from app.storage.scratch import Scratch
from app.storage.sources import is_remote
from app.storage.sources.source import DEADLINE_S, REQUEST_TIMEOUT_S
from app.storage.tenants import roots_of

HUB_S = DEADLINE_S + REQUEST_TIMEOUT_S  # the hub's own deadline is looked at between two requests
START_S = 60.0  # loading what checks need, on a machine that is busy
MAX_ANSWER_BYTES = 64_000_000  # a request has 1 MB; with all defaults filled in, and twice in a plan, less than this
LONGEST_QUOTE = 200  # characters of a reference that a message quotes
LONGEST_PLACE = 16_000
"""Number of bytes that two quotes and the name of a field take at most, each character as an escape."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0  # a caller waits; a tokenizer of 260,000 tokens takes 1.5 s where both cores are busy
    """Seconds of reading and planning for one request."""
    memory_bytes: int = 4_000_000_000  # such a tokenizer takes 0.3 GB; hostile ones of 50 MB, some GB
    """Bytes of memory for one request."""
    places: int = max(2, min(8, os.cpu_count() or 1))  # one takes a core for as long as it lasts
    """Number of requests that are inspected at once."""
    hub_places: int = 8  # they wait for it most of the time
    """Number of requests that name the hub and are inspected beside these."""
    queue_seconds: float = 30.0  # a caller waits
    """Seconds for which a request waits for its turn."""


class Text(BaseModel):
    """A body to be read."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    asks: Literal["text"] = "text"
    body: bytes
    is_yaml: bool
    memory_bytes: int
    cpu_seconds: int


class Inputs(BaseModel):
    """Folders in which the inputs of a question lie, and the limits of reading them."""

    local_roots: tuple[Path, ...]
    data_dir: Path
    tenant: str
    artifact_store: str
    objects: ObjectStorage
    jobs: dict[str, Outcome | Gone]
    """The jobs that the request names, by id: those that exist, and those of which it is known why they are gone."""
    scratch: Path
    """Folder for temporary files, which a killed process leaves behind."""
    memory_bytes: int
    cpu_seconds: int
    """Processor time after which the kernel ends the copy, in case the API is gone and cannot."""


class Inspection(Inputs):
    """A request to be inspected."""

    asks: Literal["inspection"] = "inspection"
    kind: JobKind
    request: dict[str, Any]
    """The request as it was sent, without defaults."""


class Previews(Inputs):
    """Data sets whose first rows are to be shown."""

    asks: Literal["previews"] = "previews"
    asked: list[RowsAsked]


class Weights(BaseModel):
    """A file of weights that was uploaded, whose header is to be checked."""

    asks: Literal["weights"] = "weights"
    path: Path
    source: str
    memory_bytes: int
    cpu_seconds: int


Question = Text | Inspection | Previews | Weights
QUESTION: TypeAdapter[Question] = TypeAdapter(Annotated[Question, Field(discriminator="asks")])


class Began(BaseModel):
    event: Literal["began"] = "began"
    pid: int


class ReadingInput(BaseModel):
    """The file that a copy reads. `field` is the request's, `source` the reference of a checkpoint or data set.

    A copy writes it before each file into memory that it shares with the API, which looks there once the copy has not
    answered. As messages they would take the API more time than all the rest.
    """

    field: str = ""
    source: str = ""
    file: str = ""

    def write(self, place: int) -> None:
        """Write it over the last one, of which what is longer stays behind the end of the line."""
        os.pwrite(place, self.model_dump_json().encode() + b"\n", 0)

    @classmethod
    def read(cls, place: int) -> "ReadingInput":
        line, end, _ = os.pread(place, LONGEST_PLACE, 0).partition(b"\n")
        return cls.model_validate_json(line) if end else cls()


class AskedHub(BaseModel):
    """Sent before the hub is waited for, and after it."""

    event: Literal["hub"] = "hub"
    is_waited_for: bool


class Allowed(BaseModel):
    event: Literal["allowed"] = "allowed"
    accepted: Accepted


class Read(BaseModel):
    """The content of a body: `Body.content` and `Body.fields_there` as JSON. It is ASCII, because texts may have halves
    of characters."""

    event: Literal["read"] = "read"
    text: str


class Sound(BaseModel):
    """Nothing is wrong with the header of a file of weights."""

    event: Literal["sound"] = "sound"


class Seen(BaseModel):
    """The first rows of data sets."""

    event: Literal["seen"] = "seen"
    previews: list[Preview]


class Refused(BaseModel):
    event: Literal["refused"] = "refused"
    code: str
    detail: str
    errors: list[FieldError]
    headers: dict[str, str]


class Exhausted(BaseModel):
    """Memory ran out, or the input is nested too deeply for its reader."""

    event: Literal["exhausted"] = "exhausted"
    problem: str


class Broken(BaseModel):
    """An unexpected error, whose trace is in the log."""

    event: Literal["broken"] = "broken"
    error: str


InspectorEvent = Began | AskedHub | Allowed | Read | Seen | Sound | Refused | Exhausted | Broken
EVENT: TypeAdapter[InspectorEvent] = TypeAdapter(Annotated[InspectorEvent, Field(discriminator="event")])


class InspectorDied(Exception):
    """The inspector ended before it took the request, so the request is not to blame."""


class InspectorHangs(InspectorDied):
    """The copy that waited does not take the request, so the inspector makes no other."""


class Inspectors:
    """Asks copies of the inspector. Only the event loop's thread may use it: they die with it (`die_with_parent`)."""

    def __init__(
        self,
        local_roots: tuple[Path, ...],
        data_dir: Path,
        artifact_store: str,
        limits: Limits = Limits(),
        objects: ObjectStorage = NO_BUCKETS,
    ) -> None:
        self._local_roots = tuple(root.absolute() for root in local_roots)
        self._data_dir = data_dir.absolute()
        self._artifact_store = artifact_store
        self._objects = objects
        self._limits = limits
        self._places = asyncio.Semaphore(limits.places)
        self._hub_places = asyncio.Semaphore(limits.hub_places)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._scratch: Scratch | None = None
        self._removing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the inspector. Questions that come before it is loaded wait for it."""
        self._end()
        self._scratch = self._scratch or Scratch()
        scratch = self._scratch.path
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.services.inspector", *map(str, (os.getpid(), theirs.fileno(), scratch))],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the process that started it
                # Redis's URL holds a password.
                env={name: value for name, value in os.environ.items() if name != "MASKMERGE_REDIS_URL"},
            )
        self._control = ours

    def close(self) -> None:
        """End the inspector and all of its copies."""
        self._end()
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    async def check(
        self, request: MergeRequest | ScoreRequest, tenant: str, jobs: Mapping[str, Outcome | Gone]
    ) -> Accepted:
        """Return the answer of `Checker.check`.

        Args:
            tenant: whose local roots and uploads count.
            jobs: outcome of each job that the request names, or why it is gone.

        Raises:
            ProblemError: the recipe or an input is refused, also for the time or the memory that inspecting it takes;
                or too many requests wait already.
        """
        names_hub = any(map(is_remote, sources(request)))
        async with self._place(names_hub=names_hub), self._inputs(tenant, jobs) as inputs:
            inspection = Inspection(
                **inputs,
                kind=JobKind.MERGE if isinstance(request, MergeRequest) else JobKind.SCORES,
                request=request.model_dump(mode="json", exclude_unset=True),
            )
            answer = await self._ask(inspection)
        assert isinstance(answer, Allowed)  # noqa: S101 - for the type checker
        return answer.accepted

    async def preview(
        self, asked: Sequence[RowsAsked], tenant: str, jobs: Mapping[str, Outcome | Gone]
    ) -> list[Preview]:
        """Return the first rows of each data set, and what a checkpoint's head reads of them; see `previewed`.

        Raises ProblemError, also for the time or the memory that reading takes, or if too many requests wait already.
        """
        names_hub = any(is_remote(name) for one in asked for name in (one.source, one.checkpoint or ""))
        async with self._place(names_hub=names_hub), self._inputs(tenant, jobs) as inputs:
            answer = await self._ask(Previews(**inputs, asked=list(asked)))
        assert isinstance(answer, Seen)  # noqa: S101 - for the type checker
        return answer.previews

    @asynccontextmanager
    async def _inputs(self, tenant: str, jobs: Mapping[str, Outcome | Gone]) -> AsyncIterator[dict[str, Any]]:
        """Yield the fields of `Inputs`. The scratch folder is removed soon after the end."""
        scratch = self._new_folder()
        try:
            yield {
                "local_roots": roots_of(self._local_roots, tenant),
                "data_dir": self._data_dir,
                "tenant": tenant,
                "artifact_store": self._artifact_store,
                "objects": self._objects,
                "jobs": dict(jobs),
                "scratch": scratch,
                "memory_bytes": self._limits.memory_bytes,
                "cpu_seconds": ceil(2 * self._limits.seconds),
            }
        finally:
            self._remove_later(scratch)

    def _new_folder(self) -> Path:
        """Make a scratch folder for one request."""
        if self._scratch is not None and not self._scratch.path.is_dir():  # whatever tidies up has removed it
            self._scratch.remove()
            self._scratch = None
            self.start()
        return Path(mkdtemp(dir=self._scratch.path if self._scratch else None))

    def _remove_later(self, folder: Path) -> None:
        """Remove a folder while its request is answered: some file systems take milliseconds for each."""
        removing = asyncio.create_task(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)

    async def read(self, body: bytes, *, is_yaml: bool) -> Body:
        """Return the answer of `read_body`. Raises ProblemError, also where too many requests wait already."""
        async with self._place():
            text = Text(
                body=body,
                is_yaml=is_yaml,
                memory_bytes=self._limits.memory_bytes,
                cpu_seconds=ceil(2 * self._limits.seconds),
            )
            answer = await self._ask(text)
        assert isinstance(answer, Read)  # noqa: S101 - for the type checker
        return Body(*json.loads(answer.text))

    async def check_weights(self, path: Path, source: str) -> None:
        """Check the header of a safetensors file. Raises ProblemError, also where too many requests wait already."""
        async with self._place():
            weights = Weights(
                path=path,
                source=source,
                memory_bytes=self._limits.memory_bytes,
                cpu_seconds=ceil(2 * self._limits.seconds),
            )
            await self._ask(weights)

    @asynccontextmanager
    async def _place(self, *, names_hub: bool = False) -> AsyncIterator[None]:
        """Wait for a place; a slow hub only holds up requests that name it."""
        places = self._hub_places if names_hub else self._places
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                await places.acquire()
        except TimeoutError:
            count = self._limits.hub_places if names_hub else self._limits.places
            problem, detail = Problem.TOO_BUSY, f"what {count} requests name is being inspected; more must wait"
            if names_hub:
                problem, detail = Problem.HUB_UNAVAILABLE, f"{count} requests are waiting for the hub already"
            raise ProblemError(problem, detail, None, **{"Retry-After": "10"}) from None
        try:
            yield
        finally:
            places.release()

    async def _ask(self, question: Question) -> Allowed | Read | Seen | Sound:
        for _ in range(2):  # another inspector is soon there, whatever ended this one
            place = os.memfd_create("place")
            try:
                reader, writer = await asyncio.open_unix_connection(sock=self._copy(place), limit=MAX_ANSWER_BYTES)
            except BaseException:
                os.close(place)
                raise
            conversation = _Conversation(reader, writer, self._limits.seconds, place)
            try:
                return await conversation.hold(question)
            except InspectorDied as error:
                logger.warning("the inspector ended or hangs, and is started again")
                if isinstance(error, InspectorHangs):
                    self._end()
            finally:
                conversation.end()
        detail = "nothing can be inspected now, since processes of this service are being ended"
        raise ProblemError(Problem.TOO_BUSY, detail, None, **{"Retry-After": "2"})

    def _copy(self, place: int) -> socket.socket:
        """Connect to the next copy of the inspector, and start the inspector if it is gone.

        Args:
            place: descriptor of the memory in which the copy writes what it reads.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            for _ in range(2):
                if self._control is None or self._process is None or self._process.poll() is not None:
                    self.start()
                assert self._control is not None  # noqa: S101 - for the type checker, see start
                try:
                    socket.send_fds(self._control, [b"x"], [theirs.fileno(), place])
                    break
                except OSError:  # it is just ending
                    self._end()
        return ours


@dataclass
class _Conversation:
    """A conversation with one copy of the inspector about one request."""

    reader: StreamReader
    writer: StreamWriter
    seconds: float
    """Seconds that the inspection may take, without waiting for the hub."""
    place: int
    """Descriptor of the memory in which the copy writes what it reads."""
    process: int = -1
    """Descriptor of the process, so that no other process with the same number is ended."""

    async def hold(self, question: Question) -> Allowed | Read | Seen | Sound:
        try:
            began = await self._next(START_S)
        except TimeoutError:
            raise InspectorHangs from None
        if not isinstance(began, Began):
            raise InspectorDied
        try:
            self.process = os.pidfd_open(began.pid)
            self.writer.write(question.model_dump_json().encode() + b"\n")
            await self.writer.drain()
        except OSError:
            raise InspectorDied from None
        left = {False: self.seconds, True: HUB_S}
        waits_for_hub = False
        while True:
            since = time.monotonic()
            try:
                event = await self._next(left[waits_for_hub])
            except TimeoutError:
                raise self._too_slow(waits_for_hub) from None
            left[waits_for_hub] -= time.monotonic() - since
            match event:
                case AskedHub():
                    waits_for_hub = event.is_waited_for
                case Allowed() | Read() | Seen() | Sound():
                    return event
                case Refused():
                    problem = next(problem for problem in Problem if problem.code == event.code)
                    raise ProblemError(problem, event.detail, event.errors, **event.headers)
                case Exhausted():
                    raise self._refused(event.problem)
                case Broken():
                    raise RuntimeError(f"an inspection ended with {event.error}")
                case None if ReadingInput.read(self.place).field:
                    raise self._refused("reading it ended the process that inspects it, as want of memory does")
                case _:
                    raise InspectorDied

    def end(self) -> None:
        """End the copy, whatever it is doing."""
        if self.process >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, signal.SIGKILL)
            os.close(self.process)
        os.close(self.place)
        self.writer.close()

    async def _next(self, timeout_s: float) -> InspectorEvent | None:
        """Return the next message; None when the copy has ended. Raises TimeoutError."""
        async with asyncio.timeout(max(0.0, timeout_s)):
            try:
                line = await self.reader.readline()
            except ConnectionError:
                return None
        return EVENT.validate_json(line) if line.endswith(b"\n") else None

    def _too_slow(self, waits_for_hub: bool) -> ProblemError:
        if not waits_for_hub:
            return self._refused(f"what the request names takes more than {self.seconds:g} s to inspect, up to here")
        detail = f"the hub takes more than {DEADLINE_S:.0f} s to describe what the request names"
        errors = [FieldError(field=ReadingInput.read(self.place).field, message=detail)]
        return ProblemError(Problem.HUB_UNAVAILABLE, detail, errors, **{"Retry-After": "10"})

    def _refused(self, why: str) -> ProblemError:
        """Return the refusal of the file that is being read now."""
        place = ReadingInput.read(self.place)
        what, problem = "checkpoint", Problem.INVALID_CHECKPOINT
        if place.field.endswith((".dataset", ".evaluation")):
            what, problem = "data set", Problem.INVALID_DATASET
        elif ".statistics." in place.field:
            what, problem = "statistics", Problem.INVALID_STATISTICS
        where = f"{what} {place.source[:LONGEST_QUOTE]}: {place.file}: " if place.source else ""
        message = f"{where}{why}"
        return ProblemError(problem, message, [FieldError(field=place.field, message=message)])


def sources(request: MergeRequest | ScoreRequest) -> Iterator[str]:
    """Yields every reference in the request."""
    for model in request.models:
        yield model.checkpoint
        if model.dataset is not None:
            yield model.dataset.source
        if isinstance(model, ModelRequest):
            yield from model.given.values()
            if model.evaluation is not None:
                yield model.evaluation.source
    if isinstance(request, MergeRequest) and request.base is not None:
        yield request.base
