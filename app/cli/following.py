"""Shows how a job goes on, and what came of it: bars on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

from app.contracts.printable import printable

if TYPE_CHECKING:
    from app.client import Event, Job, MergeResult


class News(Protocol):
    """Shows events as they come; it is used as a context, so that bars end with what they show."""

    def __enter__(self) -> "News": ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, event: "Event") -> None: ...


def news(out: TextIO) -> News:
    """Return what shows events on this stream."""
    return _Bars(out) if out.isatty() else _Lines(out)


def follow(events: Iterable["Event"], out: TextIO) -> None:
    """Show a job's events until its end."""
    with news(out) as shown:
        for event in events:
            shown.show(event)


def tell(job: "Job", out: TextIO) -> None:
    """Print what came of a job that has ended: notes and choices, and an error to stderr."""
    from app.client import MergeResult

    if job.error is not None:
        print(f"maskmerge: {job.error.code}: {printable(job.error.message)}", file=sys.stderr)
    if job.result is not None:
        for note in job.result.notes:
            print(f"note: {printable(note)}", file=out)
        if isinstance(job.result, MergeResult):
            for line in _choice(job.result):
                print(printable(line), file=out)


class _Lines:
    """Prints a line for every status, note and phase, and for every tenth of a phase that is done."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: tuple[str, int] | None = None

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def show(self, event: "Event") -> None:
        from app.client import LogEntry, StatusChange

        told = event.data
        if isinstance(told, StatusChange):
            self._print(told.status)
        elif isinstance(told, LogEntry):
            self._print(printable(told.message))
        elif told.total:
            tenth = (told.phase, 10 * told.done // told.total)
            if tenth != self._shown:
                self._shown = tenth
                self._print(f"{told.phase} {told.done}/{told.total} {told.unit}, {100 * told.fraction:.0f} %")

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class _Bars:
    """Shows a bar for each phase, and what is logged above them."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=out))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: "Event") -> None:
        from app.client import LogEntry, Status, StatusChange

        told = event.data
        if isinstance(told, StatusChange):
            if told.status is Status.SUCCEEDED:
                self._finish()
            self._progress.console.print(told.status, markup=False, highlight=False)
        elif isinstance(told, LogEntry):
            self._progress.console.print(printable(told.message), markup=False, highlight=False, soft_wrap=True)
        elif told.phase not in ("queued", "done"):
            if told.phase not in self._tasks:
                self._finish()
                self._tasks[told.phase] = self._progress.add_task(told.phase, total=None)
            self._progress.update(self._tasks[told.phase], completed=told.done, total=told.total or None)

    def _finish(self) -> None:
        """Complete the bars: a phase that another one followed is over, whether or not its end was seen."""
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=task.total or 1, total=task.total or 1)


class Transfer:
    """Shows a bar for the bytes that are sent or fetched on a terminal, and nothing elsewhere."""

    def __init__(self, out: TextIO, doing: str = "downloading") -> None:
        self._out = out
        self._doing = doing
        self._shows = out.isatty()

    def __enter__(self) -> "Transfer":
        if self._shows:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description:12}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(file=self._out))
            self._task = self._progress.add_task(self._doing, total=None)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shows:
            self._progress.stop()

    def update(self, there: int, total: int) -> None:
        if self._shows:
            self._progress.update(self._task, completed=there, total=total)


def _choice(result: "MergeResult") -> Iterator[str]:
    """Yield lines about what `auto` chose, and from which table; other methods have none."""
    search, candidates = result.search, result.candidates
    if search is None or candidates is None:
        return
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    trials = len(search.trials) + len(search.failed)
    yield f"chosen: {chosen.name}, trial {chosen.trial} of {trials}"
    if not search.feasible:
        yield "no trial keeps what min_retention asks for; this one lacks least"
    rows = [("retention on held-out rows", "mean", "least", "behind the chosen")]
    for candidate in candidates:
        name = f"{'*' if candidate.chosen else ' '} {candidate.name}"
        mean, least = (
            "" if value is None else f"{value:.4f}" for value in (candidate.mean_retention, candidate.min_retention)
        )
        behind = candidate.behind
        difference = "{:.4f} [{:.4f}, {:.4f}]".format(behind.value, *behind.interval) if behind else ""
        rows.append((name, mean, least, "" if candidate.chosen else difference))
    width = max(len(name) for name, *_ in rows)
    for name, mean, least, difference in rows:
        yield f"{name:<{width}}  {mean:>6}  {least:>6}  {difference}".rstrip()
