"""The inspector's end of inspections; `app.services.inspection` is the API's.

The inspector itself reads nothing from outside. It copies itself (`fork`), and the copy waits for the next socket that
the API hands over, and answers the question that comes through it. As soon as it has one, the inspector makes the next.
"""

import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.jobs import JobKind
from app.contracts.lifetime import die_with_parent
from app.contracts.requests import MergeRequest, ScoreRequest
from app.contracts.settings import Settings
from app.observability.logs import configure
from app.services.bodies import read_body
from app.services.checks import Checker
from app.services.inspection import (
    LONGEST_QUOTE,
    QUESTION,
    Allowed,
    AskedHub,
    Began,
    Broken,
    Exhausted,
    Inspection,
    Previews,
    Question,
    Read,
    ReadingInput,
    Refused,
    Seen,
    Sound,
    Weights,
)
from app.services.previews import previewed
from app.services.warm_up import OwnMerge
from app.storage.artifacts import open_artifacts
from app.storage.sources import Sources, preload
from app.storage.sources.source import SourceContext
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.library import activations
from worker.engine.catalog.checkpoints.reading import observed
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

WARM_AFTER_S = 0.15  # questions that follow each other fast do not wait for it

logger = logging.getLogger(__name__)


def serve(control: socket.socket, scratch: Path) -> None:
    """Serve until the process at the other end closes it or ends.

    Args:
        scratch: folder for files that are needed as long.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the API ends this one
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how copies ended
    activations()  # so that copies have read the table of the library's models
    preload()
    own_merge = OwnMerge(Path(tempfile.mkdtemp(dir=scratch)))
    own_merge.inspect()
    gc.collect()
    gc.freeze()  # so that collecting garbage in a copy does not write to all that it shares with this process
    while _copied(control, own_merge):
        pass


def _copied(control: socket.socket, own_merge: OwnMerge) -> bool:
    """Make a copy, and return once it has a question, or whether there will be another if it ends without one."""
    inspector = os.getpid()
    ours, theirs = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:  # there are as many processes as there may be
        logger.error("no process can be made: %s", error)
        os.close(ours)
        os.close(theirs)
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        for descriptor in descriptors:  # its question is told so by the end of the connection
            os.close(descriptor)
        return bool(message)
    if pid == 0:
        try:
            die_with_parent(inspector)
            os.close(ours)
            _warm(control, own_merge)
            _take(control, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    has_question = bool(os.read(ours, 1))
    os.close(ours)
    if not has_question:
        time.sleep(0.1)  # whatever ends one may end the next
    return has_question or _is_open(control)


def _warm(control: socket.socket, own_merge: OwnMerge) -> None:
    """Inspect the own merge, unless a question comes soon; till then the processor is for the copy before this one."""
    if not select.select([control], [], [], WARM_AFTER_S)[0]:
        with suppress(Exception):  # it saves time, and that is all
            own_merge.inspect()


def _is_open(control: socket.socket) -> bool:
    try:
        return bool(control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True


def _take(control: socket.socket, taken: int) -> None:
    """Wait for a question, say that it is here, and answer it."""
    message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
    if message:
        os.write(taken, b"x")
        os.close(taken)
        control.close()
        connection, place = descriptors
        with socket.socket(fileno=connection) as answering:
            _answer(answering, place)


def _answer(connection: socket.socket, place: int) -> None:
    with suppress(OSError), connection.makefile("rb") as questions:
        told = _Told(connection, place)
        told.send(Began(pid=os.getpid()))
        outcome: BaseModel
        try:
            outcome = _outcome(QUESTION.validate_json(questions.readline()), told)
        except ProblemError as error:
            code, headers = error.problem.code, error.headers
            errors = [FieldError(field=_whole(one.field), message=_whole(one.message)) for one in error.errors]
            outcome = Refused(code=code, detail=_whole(error.detail), errors=errors, headers=headers)
        except MemoryError:
            outcome = Exhausted(problem="inspecting it takes more memory than there is for one request")
        except RecursionError:
            outcome = Exhausted(problem="what it holds is nested too deeply")
        except Exception as error:
            logger.exception("an inspection failed")
            outcome = Broken(error=type(error).__name__)
        told.send(outcome)


def _whole(text: str) -> str:
    """Replace each half of a character by a mark; a quoted body may have halves, but UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit memory and processor time; if the machine itself runs out of memory, the kernel ends this process first."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_CORE: 0}
    for limit, most in limits.items():
        _, allowed = resource.getrlimit(limit)
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(limit, (most, most))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # every weight file of every model is open at once
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with suppress(OSError):  # not every container lets it
        Path("/proc/self/oom_score_adj").write_text("1000")


def _outcome(question: Question, told: "_Told") -> Allowed | Read | Seen | Sound:
    _limit(question.memory_bytes, question.cpu_seconds)
    if isinstance(question, Inspection):
        return _inspected(question, told)
    if isinstance(question, Previews):
        tempfile.tempdir = str(question.scratch)
        with observed(told.reads):
            return Seen(previews=previewed(question.asked, Sources(_context(question, told)), told.at))
    if isinstance(question, Weights):
        return _checked(question, told)
    body = read_body(question.body, is_yaml=question.is_yaml)
    return Read(text=json.dumps([body.content, body.fields_there]))


def _inspected(inspection: Inspection, told: "_Told") -> Allowed:
    tempfile.tempdir = str(inspection.scratch)
    kind: type[MergeRequest | ScoreRequest] = MergeRequest if inspection.kind is JobKind.MERGE else ScoreRequest
    checker = Checker(Sources(_context(inspection, told)), told.at, inspection.scratch)
    with observed(told.reads):
        return Allowed(accepted=checker.check(kind.model_validate(inspection.request)))


def _context(question: Inspection | Previews, told: "_Told") -> SourceContext:
    return SourceContext(
        question.local_roots,
        question.data_dir,
        open_artifacts(question.artifact_store, question.data_dir, question.objects, told.waiting),
        question.jobs.get,
        told.waiting,
        question.tenant,
        question.objects,
    )


def _checked(weights: Weights, told: "_Told") -> Sound:
    told.at("upload")
    try:
        with observed(told.reads):
            read_header(weights.path, weights.source)
    except InvalidCheckpoint as error:
        raise ProblemError(Problem.INVALID_CHECKPOINT, error.message) from error
    return Sound()


class _Told:
    """Tells the API of each step before it is done."""

    def __init__(self, connection: socket.socket, place: int) -> None:
        self._connection = connection
        self._place = place
        self._field = ""

    def send(self, event: BaseModel) -> None:
        self._connection.sendall(event.model_dump_json().encode() + b"\n")

    def at(self, field: str) -> None:
        self._field = field

    def reads(self, source: str, file: str) -> None:
        ReadingInput(field=self._field, source=source[:LONGEST_QUOTE], file=file[:LONGEST_QUOTE]).write(self._place)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.send(AskedHub(is_waited_for=True))
        try:
            yield
        finally:
            self.send(AskedHub(is_waited_for=False))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    configured = Settings()
    configure(configured.log_level, configured.log_format, "inspector")
    with socket.socket(fileno=int(sys.argv[2])) as control:
        serve(control, Path(sys.argv[3]))
