"""The whole service on this machine, on two real experts: train them, merge them over HTTP, show what came out.

    python examples/demo.py [--dir .demo] [--port 8123]

Nothing keeps running afterwards; what was made stays under --dir and is used again by the next run.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experts import prepare
from maskmerge import Client, Job, MergeResult, MetricResult, Status
from maskmerge import Progress as JobProgress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much

TASKS = ("topics", "sentiment")
POLL_S = 0.25
START_TIMEOUT_S = 300  # torch from a cold disk, on a busy machine
READY = "ready on http"  # what the service logs when it is
MAX_TOKENS = 128  # what the experts were trained on
EXAMPLES = 256  # rows that each expert is measured on: more tell little more

console = Console()


def recipe() -> dict[str, Any]:
    """What is POSTed: two checkpoints, rows to score them on, rows to compare them on."""
    return {
        "name": "demo",
        "method": {"name": "mask_regmean", "examples": EXAMPLES},
        "models": [
            {
                "name": task,
                "checkpoint": f"local:experts/{task}",
                "dataset": {"source": f"local:tasks/{task}/train.jsonl", "max_length": MAX_TOKENS},
                "evaluation": {"source": f"local:tasks/{task}/validation.jsonl", "max_length": MAX_TOKENS},
            }
            for task in TASKS
        ],
    }


@contextmanager
def service(folder: Path, port: int) -> Iterator[Client]:
    """`maskmerge serve` until the block is left; everything it started is gone then."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "app.cli", "serve", "--data-dir", str(folder / "data"), "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--local-root", str(folder / "inputs")],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MASKMERGE_LOG_LEVEL": "INFO"},  # at which it says that it is ready
        )
    try:
        with Client(f"http://127.0.0.1:{port}") as client, console.status("starting the service"):
            deadline = time.monotonic() + START_TIMEOUT_S
            while READY not in log.read_text():  # another service may have taken the port, and would answer too
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{log.read_text()}the service did not start; what was trained is kept for the next run")
                time.sleep(POLL_S)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def progress() -> Iterator[Tell]:
    """Shows how far the work is: by bars on a terminal, elsewhere by a line at each quarter."""
    if console.is_terminal:
        columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bars:
            shown: dict[str, Any] = {}

            def move(what: str, done: int, total: int) -> None:
                if what not in shown:
                    shown[what] = bars.add_task(what, total=None)
                bars.update(shown[what], completed=done, total=total or None)

            yield move
    else:
        quarters: dict[str, int] = {}

        def write(what: str, done: int, total: int) -> None:
            quarter = 4 * done // max(1, total)
            if quarters.get(what) != quarter:
                quarters[what] = quarter
                print(f"{what}: {done} of {total}" if total else what, flush=True)

        yield write


def watch(client: Client, job_id: str) -> Job:
    """The job when it has ended, its progress shown meanwhile."""
    with progress() as tell:
        told: JobProgress | None = None
        for event in client.events(job_id):
            if isinstance(event.data, JobProgress) and event.data.phase not in ("queued", "done"):
                if told is not None and told.phase != event.data.phase:
                    finish(tell, told)
                told = event.data
                tell(told.phase, told.done, told.total)
        job = client.job(job_id)
        if told is not None and job.status is Status.SUCCEEDED:
            finish(tell, told)
        return job


def merged(client: Client, recipe: dict[str, Any]) -> tuple[str, MergeResult]:
    """The id of the job that merges by the recipe, and what came out, its progress shown. A failure ends it all."""
    job = watch(client, client.submit(recipe).id)
    if not isinstance(job.result, MergeResult):
        sys.exit(f"{job.error.code}: {job.error.message}" if job.error else f"the job is {job.status}")
    return job.id, job.result


def compare(title: str, columns: Iterable[str], found: Mapping[str, Sequence[float | None]], digits: int) -> None:
    """Print a table of numbers, with a line for each name."""
    table = Table("", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for name, numbers in found.items():
        table.add_row(name, *("" if number is None else f"{number:.{digits}f}" for number in numbers))
    console.print(table)


def finish(tell: Tell, told: JobProgress) -> None:
    """A phase that another one followed is complete, whether or not its end was seen."""
    tell(told.phase, told.total or 1, told.total or 1)


def show(metrics: dict[str, MetricResult]) -> None:
    """The numbers as they are, also where the plain average wins."""
    table = Table(title="On rows that none of the models has seen in training", title_justify="left")
    for column in ("task", "metric", "expert", "plain average", "merged, head kept", "merged", "retention"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    better, worse = [], []
    for task, metric in metrics.items():
        numbers = (metric.expert, metric.average, metric.merged_kept_head, metric.merged, metric.retention)
        table.add_row(task, metric.metric, *(f"{number:.4f}" for number in numbers))
        if metric.merged > metric.average:
            better.append(task)
        elif metric.merged < metric.average:
            worse.append(task)
    console.print(table)
    for tasks, verb in ((better, "beats"), (worse, "loses to")):
        if tasks:
            console.print(f"The merge {verb} the plain average on {' and '.join(tasks)}.")


def show_where(folder: Path, job_id: str, port: int, request: Path) -> None:
    artifact = next((folder / "data" / "artifacts").glob(f"{job_id}.*"))
    base, command = f"http://127.0.0.1:{port}", Path(sys.executable).with_name("maskmerge")
    console.print(f"\nThe artifact is in [bold]{artifact}[/bold], the report is {artifact / 'report.html'}")
    console.print("\nThe same by hand, while the service runs (make serve listens on port 8000):\n")
    for line in (
        f"{command} serve --data-dir {folder / 'data'} --local-root {folder / 'inputs'} --port {port}",
        f"curl -H 'Content-Type: application/json' -d @{request} {base}/merge",
        f"curl {base}/jobs/{job_id}",
        f"curl {base}/jobs/{job_id}/artifacts",
        f"mkdir -p {folder / 'merged'} && curl {base}/jobs/{job_id}/archive | tar -x -C {folder / 'merged'}",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="where everything is kept (default: .demo)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            sys.exit(f"port {options.port} is in use by another program; name another with --port")
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave through the block that stops the service
    inputs = options.dir / "inputs"
    with progress() as tell:
        prepare(inputs, on_progress=lambda task, done, total: tell(f"training {task}", done, total))
    request = inputs / "recipe.json"
    request.write_text(json.dumps(recipe(), indent=1))
    with service(options.dir, options.port) as client:
        job_id, result = merged(client, recipe())
    show(result.metrics or {})
    show_where(options.dir, job_id, options.port, request)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what was trained is kept for the next run")
