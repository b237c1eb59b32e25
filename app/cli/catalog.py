"""Commands about what a service has: `methods` and `scores`."""

from typing import Annotated

import typer

from app.cli.exits import Stop
from app.cli.options import URL, Json, Url, connected
from app.cli.printing import minute, print_json, print_table


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="The one method to describe.")] = None,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """List the service's merge methods, or describe one with its parameters."""

    with connected(url) as client:
        found = [method for method in client.methods() if name in (None, method.name)]
    if not found:
        raise Stop(f"there is no method {name}; `maskmerge methods` lists them")
    if as_json:
        for method in found:
            print_json(method)
        return
    if name is None:
        rows = [(method.name, ", ".join(method.needs) or "checkpoints alone", method.source) for method in found]
        print_table(("method", "needs", "source"), rows)
        return
    [method] = found
    print(f"{method.name}: {method.formula}")
    print(f"source: {method.source}")
    print(f"needs: {', '.join(method.needs) or 'checkpoints alone'}")
    for parameter, schema in method.parameters["properties"].items():
        if parameter != "name":
            print(f"{parameter} = {schema.get('default')}: {' '.join(str(schema.get('description', '')).split())}")


def scores(
    url: Url = URL,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="DIGEST", help="Only of the checkpoint with this digest.")
    ] = None,
    statistic: Annotated[
        str | None, typer.Option("--statistic", metavar="KIND", help="Only of this kind, such as mask_fisher.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Most statistics to list.")] = 20,
    as_json: Json = False,
) -> None:
    """List the statistics of models that the service keeps, newest first."""
    from itertools import islice

    with connected(url) as client:
        kept = client.scores(checkpoint=checkpoint, statistic=statistic, page_size=min(limit, 100))
        found = list(islice(kept, limit))
    if as_json:
        for entry in found:
            print_json(entry)
        return
    rows = [
        (entry.statistic, entry.source, entry.dataset, str(entry.examples), minute(entry.created_at), entry.digest)
        for entry in found
    ]
    print_table(("statistic", "checkpoint", "rows of", "number", "measured", "digest"), rows)
