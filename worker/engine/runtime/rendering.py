"""Runs chat templates in a process of its own, whose time and memory are limited.

A template can ask for any time and any memory in one operation, such as `9 ** 9 ** 9` or `"x" * 9 ** 9`, and no other
thread of its process runs meanwhile. So only the kernel can stop it, also when the process that asked has ended.
"""

import atexit
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

LONGEST_S = 10.0  # seconds that a template may take for a row; those in use take a thousandth
LONGEST_TEXT = 10_000_000  # characters that it may write of a row
MOST_BYTES = 1 << 30  # address space of the process, of which Python and its libraries take a fifth
PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ")
"""Variables that the process gets of the environment, which may hold secrets."""


class NotRendered(Exception):
    """A template failed, or was stopped; the message follows on "the chat template"."""


@dataclass
class _Renderer:
    """This process's end of the other one."""

    process: subprocess.Popen[bytes] | None = None
    lock: Lock = field(default_factory=Lock)

    def ask(self, question: bytes) -> bytes:
        """Return the answer, or nothing if the process ended meanwhile."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
            )
        assert self.process.stdin is not None  # noqa: S101 - both are pipes
        assert self.process.stdout is not None  # noqa: S101
        with suppress(BrokenPipeError):
            self.process.stdin.write(question)
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return answer if answer.endswith(b"\n") else b""

    def end(self) -> int | None:
        """End the process, and return its exit status; None if there is none."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        with suppress(BrokenPipeError), process:  # leaving sends what was not sent yet, and waits
            pass
        return process.returncode


_renderer = _Renderer()


@atexit.register
def end() -> None:
    """End the process, if there is one; another is started when it is needed."""
    with _renderer.lock:
        _renderer.end()


def render(
    template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, Any], *, marks: bool, begins: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as transformers' sandbox writes it by a template, and beginnings and ends of what it marks.

    Args:
        tokens: the tokenizer's special tokens, by the names that templates have for them.
        marks: whether what the template marks as the assistant's is wanted.
        begins: whether the template's own beginning of an answer comes last.

    Raises:
        NotRendered: the template fails; or it needs more time or memory, or writes more, than it may.
    """
    asked = {
        "template": template,
        "messages": messages,
        "tokens": tokens,
        "marks": marks,
        "begins": begins,
        "seconds": LONGEST_S,
    }
    question = json.dumps(asked, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
    with _renderer.lock:
        answer = _renderer.ask(question)
        code = None if answer else _renderer.end()
    if code == -signal.SIGALRM:
        raise NotRendered(f"takes more than {LONGEST_S:g} s for it; use that of the original model")
    if not answer:
        raise NotRendered(f"ended the process that ran it (exit status {code}); use that of the original model")
    found = json.loads(answer)
    if "problem" in found:
        raise NotRendered(found["problem"])
    return found["text"], [(start, end) for start, end in found["marked"]]


def _serve() -> None:
    """Answer questions, a line each, until there are no more."""
    from transformers.utils import chat_template_utils  # torch is not imported with it

    for one in (signal.SIGINT, signal.SIGTERM):  # it ends with the process that asks
        signal.signal(one, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with suppress(OSError):  # if the machine runs out of memory, this process goes first; not every container lets it
        Path("/proc/self/oom_score_adj").write_text("1000")
    for question in sys.stdin.buffer:
        _end_with_asker(True)
        answer = json.dumps(_answer(chat_template_utils, question)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        _end_with_asker(False)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _end_with_asker(does: bool) -> None:
    """Let the kernel end this process by SIGIO as soon as the pipe of questions is closed, or no longer.

    It does so as well when there is something to read, but nobody asks before the answer. With `die_with_parent` the
    kernel would watch the thread that started this process, which may be one of many short ones.
    """
    pipe = sys.stdin.fileno()
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC if does else flags & ~os.O_ASYNC)
    if does:
        poll = select.poll()
        poll.register(pipe, 0)
        if poll.poll(0):  # it was closed before
            sys.exit(1)


def _answer(chat_template_utils: Any, question: bytes) -> dict[str, Any]:
    """Render; the kernel ends the process by SIGALRM if that takes too long, whatever it does."""
    try:
        asked = json.loads(question)
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        [text], marked = chat_template_utils.render_jinja_template(
            [asked["messages"]],
            chat_template=asked["template"],
            return_assistant_tokens_mask=asked["marks"],
            add_generation_prompt=asked["begins"],
            **asked["tokens"],
        )
    except MemoryError:
        return {"problem": f"takes more than {MOST_BYTES >> 20} MiB of memory for it; use that of the original model"}
    except Exception as error:  # templates raise anything, and their messages may quote the row
        return {"problem": f"fails on it ({type(error).__name__}); does it take these roles in this order?"}
    if len(text) > LONGEST_TEXT:
        return {"problem": f"writes {len(text)} characters of it; {LONGEST_TEXT} are allowed"}
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a character (a lone surrogate, {text[error.start]!a})"
        return {"problem": f"writes {half} as character {error.start + 1} of it; use that of the original model"}
    return {"text": text, "marked": marked[0] if asked["marks"] else []}


if __name__ == "__main__":
    _serve()
