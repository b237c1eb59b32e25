"""Chat templates run in a process that the kernel stops at its limits, and that another one follows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from worker.engine.runtime import rendering
from worker.engine.runtime.rendering import NotRendered, render

MESSAGES = [{"role": "user", "content": "one"}]
GROWING = "{% set n = namespace(x='xx') %}{% for a in range(40) %}{% set n.x = GROWN %}{% endfor %}{{ n.x|length }}"


def rendered(template: str) -> str:
    text, _ = render(template, MESSAGES, {}, marks=False, begins=False)
    return text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ('x' * 9999999999)|length }}",
        "{{ ''.ljust(9999999999)|length }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ ([0] * 9999999999)|length }}",
        GROWING.replace("GROWN", "n.x ~ n.x"),
        "{% for a in range(999) %}{{ 'x' * 9999999 }}{% endfor %}",
    ],
)
def test_memory_is_limited_in_every_operation(template: str) -> None:
    with pytest.raises(NotRendered, match="takes more than 1024 MiB of memory"):
        rendered(template)
    assert rendered("{{ messages[0].content }}") == "one"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 9 ** 99999999 ** messages|length }}",
    ],
)
def test_time_is_limited_within_one_operation_too(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(rendering, "LONGEST_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(NotRendered, match=r"takes more than 0\.3 s for it"):
        rendered(template)
    assert time.monotonic() - begun < 10
    assert rendered("{{ messages[0].content }}") == "one"


def test_a_process_that_was_killed_or_ended_has_a_successor() -> None:
    rendered("x")
    process = rendering._renderer.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rendered("y") == "y"
    successor = rendering._renderer.process
    assert successor is not None
    rendering.end()
    assert successor.returncode == 0
    assert rendered("z") == "z"


ASKING = """
from worker.engine.runtime import rendering
rendering.render("x", [], {}, marks=False, begins=False)
print(rendering._renderer.process.pid, flush=True)
rendering.render("{{ 9 ** (9 ** 9) }}", [], {}, marks=False, begins=False)
"""


def test_a_process_whose_template_holds_up_all_threads_ends_with_the_one_that_asked() -> None:
    """The kernel ends it at once, and not when its own time is up, after 10 s."""
    with subprocess.Popen([sys.executable, "-c", ASKING], stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None
        renderer = psutil.Process(int(asking.stdout.readline()))
        began = renderer.cpu_times().user
        while renderer.cpu_times().user < began + 0.2:  # it computes
            assert asking.poll() is None
            time.sleep(0.01)
        asking.kill()
    begun = time.monotonic()
    while renderer.is_running() and renderer.status() != psutil.STATUS_ZOMBIE:  # nobody may collect it
        assert time.monotonic() - begun < 3
        time.sleep(0.01)


def test_the_process_has_nothing_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    rendering.end()
    monkeypatch.setenv("HF_TOKEN", "secret")
    rendered("x")
    process = rendering._renderer.process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment
