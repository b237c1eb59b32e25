"""Commands about jobs of a service, from `submit` to `download`."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.exits import Exit, Stop, interruptible, outcome
from app.cli.options import URL, JobId, Json, LocalRoots, Output, Recipe, Url, connected
from app.cli.printing import minute, print_json, print_table
from app.contracts.printable import printable

if TYPE_CHECKING:
    from app.client import Client, Job, JobSummary

LABEL = "KEY=VALUE"
UNKNOWN = "if the job was queued all the same, `maskmerge list` shows it"


def submit(
    recipe: Recipe,
    url: Url = URL,
    local_root: LocalRoots = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, showing progress.")] = False,
    output: Output = None,
    put: Annotated[
        str | None,
        typer.Option(
            "--put", metavar="NAME", help="Name of your own for the job: repeated, the command makes no other."
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Compute statistics, without merging.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, and print the plan as JSON.")] = False,
    upload: Annotated[
        bool, typer.Option("--upload", help="Upload the files and folders that lie under no local root.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Queue a merge on a running service. With --wait or --output, end as the job does."""
    from app.cli import recipes
    from app.client import Refused, Unreachable

    if scores and (put is not None or dry_run):
        raise typer.BadParameter("a job of statistics has no name of its own and no plan", param_hint="--scores")
    check_new(output)
    with connected(url) as client:
        content = recipes.related(recipes.read(recipe), local_root, upload=partial(_upload, client) if upload else None)
        try:
            if dry_run:
                print_json(client.validate(content))
                return
            with interruptible(f"no answer came; {UNKNOWN}"):
                if put is not None:
                    job = client.put(put, content)
                else:
                    job = client.submit_scores(content) if scores else client.submit(content)
        except Refused as error:
            raise recipes.refused(error.detail, {found.field for found in error.errors}, content) from error
        except Unreachable as error:
            raise Stop(f"{error}; {UNKNOWN}; `maskmerge serve` starts a service", Exit.UNREACHABLE) from error
        if not wait and output is None:
            if as_json:
                print_json(job)
            else:
                print(f"job {job.id}")
            return
        print(f"job {job.id}", file=sys.stderr if as_json else sys.stdout, flush=True)
        raise typer.Exit(_waited(client, job.id, url, output, as_json))


def wait(job: JobId, url: Url = URL, output: Output = None, as_json: Json = False) -> None:
    """Wait for a job's end, showing progress, and end as the job does."""
    check_new(output)
    with connected(url) as client:
        raise typer.Exit(_waited(client, job, url, output, as_json))


def status(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Print a job's state. The exit status is 0 in any state; `wait` tells by it how a job ended."""
    with connected(url) as client:
        _print_job(client.job(job), as_json)


def list_jobs(
    url: Url = URL,
    in_state: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="STATE",
            help="Only jobs in this state.",
            autocompletion=lambda: _states(),
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar=LABEL, help="Only jobs with this label; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most jobs to list.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from itertools import islice

    if in_state is not None and in_state not in _states():
        raise typer.BadParameter(f"there is no state '{in_state}'; write {', '.join(_states())}", param_hint="--status")
    labels = {}
    for text in label or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"'{text}' is no label; write {LABEL}", param_hint="--label")
        labels[key] = value
    with connected(url) as client:
        found = list(islice(client.jobs(status=in_state, labels=labels, page_size=min(limit, 100)), limit))
    if as_json:
        for job in found:
            print_json(job)
        return
    rows = [(job.id, minute(job.created_at), job.kind, job.status, _progress(job), job.name) for job in found]
    print_table(("id", "created", "kind", "status", "progress", "name"), rows)


def logs(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Print a job's log, to the job's end: attempts, and notes about the work."""

    with connected(url) as client, interruptible("the job goes on"):
        for entry in client.log(job):
            if as_json:
                print_json(entry)
            else:
                print(
                    f"{entry.at:%Y-%m-%d %H:%M:%S} attempt {entry.attempt} {entry.code}: {printable(entry.message)}",
                    flush=True,
                )


def cancel(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Ask for a job's end. A job that runs ends within five seconds."""
    with connected(url) as client:
        _print_job(client.cancel(job), as_json)


def retry(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Queue a failed or cancelled job again."""
    with connected(url) as client:
        _print_job(client.retry(job), as_json)


def delete(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Remove a job that has ended, with its artifact."""

    with connected(url) as client:
        client.delete(job)
    if as_json:
        print_json({"id": job, "deleted": True})
    else:
        print(f"deleted {job}")


def download(
    job: JobId,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder of the artifact.", show_default=False)
    ],
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """Fetch what a job made, or what is missing of it. A file that was cut is gone on with."""
    with connected(url) as client:
        _download(client, job, output, "not all is there; the same command fetches what is missing", as_json)


def check_new(output: Path | None) -> None:
    """Raise BadParameter unless a folder of this name can be made, or is there and empty."""
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(
            f"{output} is there already; --output takes a new folder, or an empty one", param_hint="--output"
        )


def _waited(client: "Client", job_id: str, url: str, output: Path | None, as_json: bool) -> Exit:
    """Show a job to its end, fetch its artifact if there is one and it is wanted, and return how it ended."""
    from app.cli.following import follow, tell

    out = sys.stderr if as_json else sys.stdout
    fetching = f"`maskmerge download {job_id} --output {output or 'DIR'} --url {url}` fetches"
    with interruptible(f"not waiting any longer; the job goes on, and {fetching} what it has made then"):
        follow(client.events(job_id), out)
        job = client.job(job_id)
    tell(job, out)
    if output is not None and job.result is not None:
        _download(client, job_id, output, f"the job succeeded; {fetching} what is missing", as_json)
    if as_json:
        print_json(job)
    return outcome(job)


def _upload(client: "Client", path: Path) -> str:
    from app.cli.following import Transfer

    with (
        interruptible("not all is there; the same command sends what is missing"),
        Transfer(sys.stderr, "uploading") as shown,
    ):
        reference = client.upload(path, on_bytes=shown.update)
    print(f"uploaded {path} as {reference}", file=sys.stderr)
    return reference


def _download(client: "Client", job_id: str, output: Path, if_interrupted: str, as_json: bool) -> None:
    from app.cli.following import Transfer

    with interruptible(if_interrupted), Transfer(sys.stderr) as shown:
        client.download(job_id, output, on_bytes=shown.update)
    if as_json:
        print(f"downloaded to {output}", file=sys.stderr)
    else:
        print(f"downloaded to {output}")


def _print_job(job: "Job", as_json: bool) -> None:

    if as_json:
        print_json(job)
        return
    print(f"job {job.id}")
    name = f" ({printable(job.name)})" if job.name else ""
    print(f"{job.kind}{name}, made {minute(job.created_at)}: {job.status}, attempt {job.attempt}")
    if not job.status.is_final and job.progress.total:
        print(_progress(job))
    if job.error is not None:
        print(f"{job.error.code}: {printable(job.error.message)}")


def _progress(job: "Job | JobSummary") -> str:
    """Return how far a job is, as `scoring 512/4096 examples, 21 %`."""
    progress = job.progress
    if not progress.total or job.status.is_final:
        return ""
    return f"{progress.phase} {progress.done}/{progress.total} {progress.unit}, {100 * progress.fraction:.0f} %"


def _states() -> list[str]:
    from app.client import Status

    return [str(status) for status in Status]
