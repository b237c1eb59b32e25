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
from threading import Event
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
    from app.services.bodies import Body
    from app.services.composition import Services
    from app.supervisor import Supervisor

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    with _interruptible() as interrupted, _beside(output) as data_dir:
        settings = _settings(data_dir, roots, content.get("device"))
        content = recipes.related(content, list(settings.local_roots), follows_links=True)
        job, folder = _done(settings, content, sys.stderr if as_json else sys.stdout, interrupted)
        tell(job, sys.stderr if as_json else sys.stdout)
        if folder is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)
            print(f"the result is in {output}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(job)
    raise typer.Exit(outcome(job))


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Yield an event that is set by Ctrl-C, SIGTERM or the terminal's end, however often, so that all is tidied up.

    An exception in a signal's handler may be raised anywhere, also where a library passes over it.
    """
    interrupted = Event()
    before = {number: signal.signal(number, lambda *_: interrupted.set()) for number in ENDING}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # as `nohup` wants it
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        shutil.rmtree(folder, ignore_errors=True)


def _settings(data_dir: Path, roots: list[Path], device: Any) -> "Settings":
    """Return the settings of a service for one job, whose worker has the device that the job asks for."""
    from app.cli.service import configured
    from app.contracts.devices import DEVICES

    os.environ.setdefault("MASKMERGE_LOG_LEVEL", "WARNING")  # progress is shown, and what goes wrong
    separable = tuple(root.absolute() for root in roots if ":" not in str(root.absolute()))
    os.environ.pop("MASKMERGE_REDIS_URL", None)
    asked = {"device": device} if device in DEVICES else {}
    return configured(data_dir=data_dir, local_roots=separable, artifact_store="folder", workers=1, **asked)


def _done(settings: "Settings", content: dict[str, Any], out: Any, interrupted: Event) -> "tuple[Job, Path | None]":
    """Do a job with processes of its own, showing its progress, and return it with the folder of its artifact."""
    from app.embedded_redis import NoRedisServer
    from app.supervisor import Supervisor

    supervisor = Supervisor(settings, is_quiet=True)
    try:
        with supervisor.started() as url:
            supervisor.keep_running()  # the worker loads while the request is checked
            return asyncio.run(_submitted(settings, url, supervisor, content, out, interrupted))
    except (NoRedisServer, OSError) as error:
        raise Stop(str(error)) from error


async def _submitted(
    settings: "Settings", url: str, supervisor: "Supervisor", content: dict[str, Any], out: Any, interrupted: Event
) -> "tuple[Job, Path | None]":
    from pydantic import SecretStr

    from app.services.composition import compose

    services = compose(settings.model_copy(update={"redis_url": SecretStr(url)}))
    services.inspectors.start()
    try:
        following = asyncio.create_task(_followed(services, content, out))
        while not following.done():
            supervisor.keep_running()
            if interrupted.is_set():
                following.cancel()
                raise Stop("interrupted; nothing is left of the job", Exit.INTERRUPTED)
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
    from app.cli import recipes
    from app.cli.following import news
    from app.contracts.api_keys import Caller
    from app.contracts.errors import ProblemError
    from app.services.bodies import Body, field_there, read_body
    from app.storage.files import LocalFile
    from worker.engine.catalog.contracts.report import MANIFEST

    body = Body(None, {})
    try:
        body = read_body(json.dumps(content).encode(), is_yaml=True)
        record = await services.jobs.submit(_request(body), Caller())
    except ProblemError as error:
        detail, fields = error.detail, []
        for found in error.errors:
            fields.append(field_there(found.field, body.fields_there))
            detail = detail.replace(f"{found.field}: ", f"{fields[-1]}: ", 1)
        raise recipes.refused(detail, fields, content) from error
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


def _request(body: "Body") -> "MergeRequest":
    """Return the request that a recipe holds. Raises Stop."""
    from pydantic import ValidationError

    from app.contracts.requests import MergeRequest
    from app.contracts.suitability import MOST_ERRORS
    from app.services.bodies import field_of, field_there
    from worker.engine.catalog.primitives.words import message_of

    try:
        request = MergeRequest.model_validate(body.content)
    except ValidationError as error:
        found = [
            (field_there(field_of(("", *one["loc"])), body.fields_there), message_of(one)) for one in error.errors()
        ]
        messages = [f"{field}: {message}" if field else message for field, message in found[:MOST_ERRORS]]
        raise Stop("; ".join(messages)) from error
    if request.webhook is not None:
        raise Stop("webhook: nothing is left that could tell anybody once this job has ended; leave it out")
    return request
