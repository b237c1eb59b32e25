"""The statistics that are kept, and heat maps of the scores of mask nodes among them."""

import math
import re
import shutil
import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Annotated, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from markupsafe import Markup

from app.api import scores
from app.api.conditional import PreconditionsOf
from app.api.dependencies import CallerOf, ServicesOf
from app.dashboard.pages import page
from app.dashboard.route import DashboardRoute
from app.storage.files import LocalFile, StoredFile
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.drawing.charts import cells, ramp
from worker.engine.catalog.drawing.colours import LEVELS
from worker.engine.catalog.drawing.html import element
from worker.engine.catalog.families import NODE_KINDS
from worker.engine.catalog.methods.parameters import NODE_FISHER

router = APIRouter(route_class=DashboardRoute, include_in_schema=False)

T = TypeVar("T")

PAGE = 50
COLUMNS = 96  # of a map, at most: neighbouring nodes are shown by their mean
ROWS = 96
SCORES = re.compile(r"(?:(?P<stack>encoder|decoder)\.)?layers\.(?P<layer>\d+)\.(?:experts\.\d+\.)?(?P<kind>\w+)")
"""Names of the tensors with scores, see `ScoreName`; a file also has their errors and the sums that they come from."""
OCTAVES = 3.0  # a map goes from 1/8 of the mean to 8 times, as those of the report do


@router.get("/dashboard/statistics")
def list_statistics(
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
    after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{14}-[0-9a-f]{64}$")] = None,
) -> Response:
    found = scores.list_scores(services, caller, limit=PAGE, after=after)
    return page(request, "statistics.html", entries=found.data, next=found.next)


@router.get("/dashboard/statistics/{digest}")
def show_statistic(
    digest: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")], request: Request, services: ServicesOf, caller: CallerOf
) -> Response:
    """Show what is known of a statistic; scores of mask nodes as maps, a row for each layer."""
    with scores.reading(digest):
        kept = services.statistics.of(caller.tenant).get(digest)
        maps = []
        if kept.about.facts.statistic == NODE_FISHER:
            files, held = kept.open()
            with held:
                maps = [found for file in files for found in _maps(_on_disk(file, held))]
    return page(
        request,
        "statistic.html",
        kept=kept,
        facts=kept.about.facts,
        origin=kept.about.origin,
        maps=maps,
        ramp=ramp("a", "1/8 of the mean", "8 times", "or further from it"),
    )


@router.get("/dashboard/statistics/{digest}/file")
def download(
    digest: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")],
    services: ServicesOf,
    caller: CallerOf,
    preconditions: PreconditionsOf,
    request: Request,
) -> Response:
    return scores.get_scores(digest, services, caller, preconditions, request)


def _on_disk(file: StoredFile, held: ExitStack) -> FilePath:
    """Return where a file is on this machine; one that lies elsewhere is copied, until the stack is closed."""
    if isinstance(file, LocalFile):
        return file.path
    copy = FilePath(held.enter_context(TemporaryDirectory(prefix="maskmerge-statistic-"))) / "statistic.safetensors"
    with file.open() as stream, copy.open("wb") as target:
        shutil.copyfileobj(stream, target)
    return copy


def _maps(file: FilePath) -> Iterator[tuple[str, str, Markup]]:
    """Yield for each kind of node its name, a sentence about its scores, and the map."""
    for (stack, kind), layers in sorted(_scores(file).items()):
        rows = [layers[layer] for layer in sorted(layers)]
        mean = statistics.fmean(value for row in rows for value in row)
        largest = max((value, layer) for layer, row in layers.items() for value in row)
        title = f"{NODE_KINDS[kind].title}{f' of the {stack}' if stack else ''}"
        said = f"{len(rows)} layers with {len(rows[0])} {title} each. Their mean score is {mean:.3g}; "
        said += f"the largest is {largest[0]:.3g}, in layer {largest[1]}."
        yield title, said, _map(f"{stack}{kind}", title, said, _pooled(rows), mean)


def _scores(file: FilePath) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Read the scores of a file by stack and kind of node, and then by layer, in which experts follow each other."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with file.open("rb") as stream:
        for tensor in read_header(file, "statistic"):
            name = SCORES.fullmatch(tensor.name)
            if name is None or name["kind"] not in NODE_KINDS or tensor.dtype != "F64":
                continue
            stream.seek(tensor.offset)
            found[name["stack"] or "", name["kind"]][int(name["layer"])].extend(array("d", stream.read(tensor.nbytes)))
    return found


def _pooled(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return means over neighbours, so that a map has no more cells than can be seen."""
    narrow = [[statistics.fmean(run) for run in _runs(row, COLUMNS)] for row in rows]
    return [[statistics.fmean(column) for column in zip(*run, strict=True)] for run in _runs(narrow, ROWS)]


def _runs(values: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Cut values into at most so many runs of nearly equal length."""
    count = min(most, len(values))
    bounds = [index * len(values) // count for index in range(count + 1)]
    return (values[first:last] for first, last in pairwise(bounds))


def _map(key: str, title: str, said: str, rows: Sequence[Sequence[float]], mean: float) -> Markup:
    levels = [[_level(value, mean) for value in row] for row in rows]
    drawn = element(
        "svg",
        cells(levels, "a"),
        viewBox=f"0 0 {max(map(len, levels))} {len(levels)}",
        preserveAspectRatio="none",
        width="100%",
        height=min(320, max(72, 16 * len(levels))),
        class_="cells",
        role="img",
        aria_labelledby=f"map-{key}",
    )
    return element("figure", drawn, element("figcaption", f"{title} by layer, the first on top", id=f"map-{key}"))


def _level(value: float, mean: float) -> int:
    if value <= 0 or mean <= 0:
        return 0
    share = (math.log2(value / mean) + OCTAVES) / (2 * OCTAVES)
    return min(LEVELS - 1, max(0, math.floor(share * LEVELS)))
