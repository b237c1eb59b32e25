"""`maskmerge run`: the whole service for one job. It leaves nothing but the result."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.exits import Exit, Stop, outcome
from app.cli.jobs import check_new
from app.cli.options import Json, Recipe
from app.cli.printing import print_json

if TYPE_CHECKING:
    from app.client import Job
    from app.contracts.requests import MergeRequest
    from app.contracts.settings import Settings
    from app.services.composition import Services
    from app.supervisor import Supervisor

TICK_S = 0.1
MOST_FAILURES = 3  # a worker that ends so often as it starts lacks something


def run(
    recipe: Recipe,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="New folder of the result.", show_default=False)
    ],
    local_root: Annotated[
        list[Path] | None,
        typer.Option("--local-root", metavar="DIR", help="Folder that local: references name; repeatable. Default: ."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge on this machine, without a service: one is started for this job, and is gone when it ends.

    Paths in the recipe are this machine's. The exit status says how the job ended.
    """
    from app.cli import recipes
    from app.cli.following import tell

    check_new(output)
    content = recipes.read(recipe)
    if not isinstance(content, dict):
        raise Stop(f"{recipe} holds no recipe, which is a mapping")
    roots = [*(local_root or [Path.cwd()]), Path("/")]
    with _interruptible(), _beside(output) as data_dir:
        settings = _settings(data_dir, roots)
        content = recipes.related(content, list(settings.local_roots), follows_links=True)
        job, folder = _done(settings, content, sys.stderr if as_json else sys.stdout)
        tell(job, sys.stderr if as_json else sys.stdout)
        if folder is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)
            print(f"the result is in {output}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(job)
    raise typer.Exit(outcome(job))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stop("interrupted; nothing is left of the job", Exit.INTERRUPTED) from error


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Yield a temporary folder in the output's file system, so that the result is moved by one rename."""
    place = output.absolute()
    while not place.is_dir() or place == output.absolute():
        place = place.parent
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=place))
    try:
        yield folder
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C does not keep the folder from being removed
            signal.signal(number, signal.SIG_IGN)
        shutil.rmtree(folder, ignore_errors=True)


def _settings(data_dir: Path, roots: list[Path]) -> "Settings":
    from app.cli.service import configured

    os.environ.setdefault("MASKMERGE_LOG_LEVEL", "WARNING")  # progress is shown, and what goes wrong
    separable = tuple(root.absolute() for root in roots if ":" not in str(root.absolute()))
    os.environ.pop("MASKMERGE_REDIS_URL", None)
    return configured(data_dir=data_dir, local_roots=separable, artifact_store="folder", workers=1)


def _done(settings: "Settings", content: dict[str, Any], out: Any) -> "tuple[Job, Path | None]":
    """Do a job with processes of its own, showing its progress, and return it with the folder of its artifact."""
    from app.embedded_redis import NoRedisServer
    from app.supervisor import Supervisor

    supervisor = Supervisor(settings, is_quiet=True)
    try:
        with supervisor.started() as url:
            supervisor.keep_running()  # the worker loads while the request is checked
            return asyncio.run(_submitted(settings, url, supervisor, content, out))
    except (NoRedisServer, OSError) as error:
        raise Stop(str(error)) from error


async def _submitted(
    settings: "Settings", url: str, supervisor: "Supervisor", content: dict[str, Any], out: Any
) -> "tuple[Job, Path | None]":
    from pydantic import SecretStr

    from app.services.composition import compose

    services = compose(settings.model_copy(update={"redis_url": SecretStr(url)}))
    services.inspectors.start()
    try:
        following = asyncio.create_task(_followed(services, content, out))
        while not following.done():
            supervisor.keep_running()
            if supervisor.failures >= MOST_FAILURES:
                following.cancel()
                raise Stop("the worker does not start; its messages are above")
            await asyncio.wait({following}, timeout=TICK_S)
        return following.result()
    finally:
        services.inspectors.close()
        await services.watcher.close()


async def _followed(services: "Services", content: dict[str, Any], out: Any) -> "tuple[Job, Path | None]":
    """Submit a recipe and show its progress. Raises Stop where it is refused."""
    from app.cli.following import news
    from app.contracts.api_keys import Caller
    from app.contracts.errors import ProblemError
    from app.storage.files import LocalFile
    from worker.engine.catalog.contracts.report import MANIFEST

    request = _request(content)
    if request.webhook is not None:
        raise Stop("webhook: nothing is left that could tell anybody once this job has ended; leave it out")
    try:
        record = await services.jobs.submit(request, Caller())
    except ProblemError as error:
        raise Stop(error.detail) from error
    with news(out) as shown:
        async for event in services.watcher.follow(record.id):
            shown.show(event)
    ended = services.store.records.get(record.id)
    if ended is None:
        raise Stop(f"job {record.id} is gone")
    if ended.artifact is None:
        return ended.public(), None
    paths = [file.path for file in services.artifacts.open(ended.artifact).files if isinstance(file, LocalFile)]
    return ended.public(), next(path.parent for path in paths if path.name == MANIFEST)


def _request(content: dict[str, Any]) -> "MergeRequest":
    """Return the request that a recipe, ours or mergekit's, stands for. Raises ProblemError, Stop."""
    from pydantic import ValidationError

    from app.contracts.requests import MergeRequest
    from app.contracts.suitability import MOST_ERRORS
    from app.services.bodies import field_of, field_there, message_of, read_body

    body = read_body(json.dumps(content).encode(), is_yaml=True)
    try:
        return MergeRequest.model_validate(body.content)
    except ValidationError as error:
        found = [
            (field_there(field_of(("", *one["loc"])), body.fields_there), message_of(one)) for one in error.errors()
        ]
        messages = [f"{field}: {message}" if field else message for field, message in found[:MOST_ERRORS]]
        raise Stop("; ".join(messages)) from error
