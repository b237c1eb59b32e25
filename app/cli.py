"""The command line: `maskmerge serve | api | worker | merge | settings`."""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from app.contracts.settings import Settings

if TYPE_CHECKING:
    from app.client import Event


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "merge":
        return _merge(options.recipe, options.url, options.wait or options.output is not None, options.output)
    given = {name: value for name, value in vars(options).items() if name != "command" and value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            print(f"maskmerge: MASKMERGE_{name.upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    command = {"serve": _serve, "api": _api, "worker": _worker, "settings": _settings}[options.command]
    return command(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskmerge", description="Merge fine-tuned language models by the Fisher information of their mask nodes."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="everything on one machine: Redis, API and workers")
    _add(serve, "--data-dir", type=Path, metavar="DIR", help="folder of everything that must survive")
    _add(serve, "--local-root", action="append", dest="local_roots", type=Path, metavar="DIR",
         help="folder that local: references may name; repeatable")  # fmt: skip
    _add(serve, "--workers", type=int, metavar="N", help="workers to start")
    api = commands.add_parser("api", help="the API alone, against MASKMERGE_REDIS_URL")
    for with_address in (serve, api):
        _add(with_address, "--host", help="address to listen on")
        _add(with_address, "--port", type=int, help="port to listen on")
    commands.add_parser("worker", help="one worker, against MASKMERGE_REDIS_URL")
    merge = commands.add_parser("merge", help="queue a merge on a running service")
    merge.add_argument("recipe", type=Path, metavar="RECIPE", help="what to post: JSON, YAML, or a recipe of mergekit")
    merge.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is; default: %(default)s")
    merge.add_argument("--wait", action="store_true", help="wait for the end, showing progress")
    merge.add_argument("--output", type=Path, metavar="DIR", help="wait, and download the artifact to this folder")
    commands.add_parser("settings", help="every setting with its value and meaning")
    return parser


def _add(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """An option that, when it is not given, leaves the setting to its variable."""
    parser.add_argument(*names, default=None, **options)


def _serve(settings: Settings) -> int:
    from app.embedded_redis import NoRedisServer
    from app.supervisor import DataDirInUse, Supervisor

    try:
        return Supervisor(settings).run()
    except (DataDirInUse, NoRedisServer, OSError) as error:
        print(f"maskmerge: {error}", file=sys.stderr)
        return 1


def _api(settings: Settings) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported

    from app.server import Server

    try:
        server = Server(settings)
    except (ValueError, OSError) as error:
        print(f"maskmerge: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has stopped
        server.run()
    return 0 if server.started else 3


def _worker(settings: Settings) -> int:
    # Replaced rather than imported: nothing of the worker is part of the app.
    os.execv(sys.executable, [sys.executable, "-m", "worker"])  # noqa: S606


def _merge(recipe: Path, url: str, waits: bool, output: Path | None) -> int:
    """0: accepted or succeeded; 1: the job failed; 2: it was refused, or a file or the service is not there."""
    import httpx

    from app.client import Client, RequestRefused

    try:
        with Client(url) as client:
            is_json = recipe.suffix == ".json"
            job = client.merge_recipe(recipe.read_bytes(), "application/json" if is_json else "application/yaml")
            print(f"job {job['id']}", flush=True)
            if not waits:
                return 0
            for line in _news(client.events(job["id"])):
                print(line, flush=True)
            job = client.job(job["id"])
            if job["error"] is not None:
                print(f"maskmerge: {job['error']['code']}: {job['error']['message']}", file=sys.stderr)
            if job["status"] != "succeeded":
                return 1
            if output is not None:
                client.download(job["id"], output)
                print(f"downloaded to {output}")
    except RequestRefused as error:
        print(f"maskmerge: {error.problem.get('detail')}", file=sys.stderr)
        return 2
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"maskmerge: {url}: {error}; `maskmerge serve` starts a service", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maskmerge: not waiting any longer; the job goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # of the recipe's file or the output's; an answer that is no JSON
        print(f"maskmerge: {error}", file=sys.stderr)
        return 2
    return 0


def _news(events: Iterable["Event"]) -> Iterator[str]:
    """A line for every status, note and phase, and for every tenth of a phase that is done."""
    shown = None
    for event in events:
        data = event.data
        if event.kind == "status":
            yield f"{data['status']}"
        elif event.kind == "log":
            yield f"{data['message']}"
        elif event.kind == "progress" and data["total"]:
            tenth = (data["phase"], 10 * data["done"] // data["total"])
            if tenth != shown:
                shown = tenth
                yield f"{data['phase']} {data['done']}/{data['total']} {data['unit']}, {100 * data['fraction']:.0f} %"


def _settings(settings: Settings) -> int:
    for name, value, meaning in settings.describe():
        print(f"{name}={value}\n    {meaning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
