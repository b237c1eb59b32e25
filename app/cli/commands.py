"""All commands, and how the program ends."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from app.cli import catalog, jobs, keys, provenance, run, service
from app.cli.exits import Exit, explained
from app.contracts.printable import printable

app = typer.Typer(
    help="Merge fine-tuned models: run the service, use one that runs, or merge on this machine without one.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to load than all else that --help needs
    pretty_exceptions_enable=False,  # they show variables, and with them keys
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"maskmerge {version('maskmerge')}")
        raise typer.Exit


@app.callback()
def options(
    is_asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release, and end.")
    ] = False,
) -> None:
    pass


app.command()(run.run)
app.command()(service.serve)
app.command()(service.api)
app.command()(service.worker)
app.command()(service.settings)
app.command()(jobs.submit)
app.command()(jobs.wait)
app.command()(jobs.status)
app.command("list")(jobs.list_jobs)
app.command()(jobs.logs)
app.command()(jobs.cancel)
app.command()(jobs.retry)
app.command()(jobs.delete)
app.command()(jobs.download)
app.command()(catalog.methods)
app.command()(catalog.scores)
app.command()(provenance.verify)
app.add_typer(keys.app, name="keys")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status; see `Exit`."""
    try:
        app(arguments, prog_name="maskmerge")
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:
        stop = explained(error)
        if stop is None:
            raise
        print(f"maskmerge: {printable(str(stop))}", file=sys.stderr)
        return stop.status
    return Exit.OK
