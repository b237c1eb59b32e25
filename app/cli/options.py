"""Options that several commands have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.client import Client

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", show_default=False)]
Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        exists=True,
        dir_okay=False,
        help="File of the request: JSON, YAML, or a recipe of mergekit.",
        show_default=False,
    ),
]
Url = Annotated[str, typer.Option("--url", metavar="URL", envvar="MASKMERGE_URL", help="URL of the service.")]
URL = "http://127.0.0.1:8000"
Json = Annotated[bool, typer.Option("--json", help="Print JSON; of lists, an object a line.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder of everything that must survive.")
]
LocalRoots = Annotated[
    list[Path] | None,
    typer.Option(
        "--local-root",
        metavar="DIR",
        help="Local root of the service, to which paths in the recipe are related; repeatable. Default: those of "
        "MASKMERGE_LOCAL_ROOTS.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Wait, and download the artifact to this new folder.")
]


def connected(url: str) -> "Client":
    """Return a client of the service. Its key is that of MASKMERGE_API_KEY, and comes by no option."""
    from app.client import Client

    return Client(url)
