"""The command line: `maskmerge serve | api | worker | merge | download | keys | settings`."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from app import cli_keys
from app.contracts.settings import Settings

if TYPE_CHECKING:
    from app.client import Client, Event


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "merge":
            waits = options.wait or options.output is not None
            return _merge(options.recipe, options.url, waits, options.output, options.local_roots)
        if options.command == "download":
            return _download(options.job, options.url, options.output)
    except _Stop as stop:
        print(f"maskmerge: {stop}", file=sys.stderr)
        return stop.status
    known = Settings.model_fields.keys()
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            print(f"maskmerge: MASKMERGE_{name.upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.command == "keys":
        return cli_keys.run(options, settings)
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
    merge.add_argument("--local-root", action="append", dest="local_roots", type=Path, metavar="DIR",
                       help="local root of the service, to which paths in the recipe are related; repeatable; default: "
                       "those of MASKMERGE_LOCAL_ROOTS")  # fmt: skip
    merge.add_argument("--wait", action="store_true", help="wait for the end, showing progress")
    merge.add_argument("--output", type=Path, metavar="DIR", help="wait, and download the artifact to this new folder")
    download = commands.add_parser("download", help="fetch what a job made, or what is missing of it")
    download.add_argument("job", metavar="JOB", help="the job's id")
    download.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the artifact")
    for client in (merge, download):
        client.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is; default: %(default)s")
    for keys in cli_keys.add_parser(commands):
        _add(keys, "--data-dir", type=Path, metavar="DIR", help="folder of everything that must survive")
    commands.add_parser("settings", help="every setting with its value and meaning")
    return parser


def _add(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an option that leaves the setting to its environment variable when it is not given."""
    parser.add_argument(*names, default=None, **options)


def _serve(settings: Settings) -> int:
    from app.embedded_redis import NoRedisServer
    from app.storage.data_folder import DataDirInUse
    from app.supervisor import Supervisor

    try:
        return Supervisor(settings).run()
    except (DataDirInUse, NoRedisServer, ValueError, OSError) as error:
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


class _Stop(Exception):
    """Ends the command with a message and an exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def _service(url: str) -> Iterator["Client"]:
    """Yield a client whose errors all end the command."""
    import httpx

    from app.client import Client, NoService, RequestRefused

    try:
        with Client(url) as client:
            yield client
    except RequestRefused as error:
        raise _Stop(str(error.problem.get("detail"))) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Stop(f"{url}: {error}; `maskmerge serve` starts a service") from error
    except (NoService, OSError, ValueError) as error:  # reading the recipe or writing the output failed
        raise _Stop(str(error)) from error


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise _Stop(message, 130) from error


def _content(recipe: Path, roots: Sequence[Path] | None) -> tuple[bytes, str, Any]:
    """Return the request's body, its media type, and its parsed content. References replace this machine's paths.

    The content is None where the file is not the JSON or YAML that it should be; the service then says what is wrong.
    """
    from app.recipe_paths import PathError, with_references
    from app.services.yaml_text import NotYaml, parse_yaml

    content, is_json = recipe.read_bytes(), recipe.suffix == ".json"
    media_type = "application/json" if is_json else "application/yaml"
    if roots is None:
        roots = [Path(root) for root in os.environ.get("MASKMERGE_LOCAL_ROOTS", "").split(":") if root]
    try:
        said = json.loads(content) if is_json else parse_yaml(content)
        known = with_references(said, roots)
    except PathError as error:
        raise _Stop(str(error)) from error
    except (NotYaml, ValueError, RecursionError):
        return content, media_type, None
    return content if known == said else json.dumps(known).encode(), media_type, known


def _merge(recipe: Path, url: str, waits: bool, output: Path | None, roots: Sequence[Path] | None) -> int:
    """Return 0: accepted or succeeded; 1: the job failed, or its merge does not beat what it must; 2: it was refused,
    or a file or the service is not there."""
    import httpx

    from app.client import RequestRefused
    from app.recipe_paths import taken_for_the_hubs

    with _service(url) as client:
        if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise _Stop(f"{output} is there already; --output takes a new folder, or an empty one")
        content, media_type, said = _content(recipe, roots)
        unknown = "no answer came; the job may be queued all the same, see GET /jobs before posting it again"
        try:
            with _interruptible(unknown):
                job = client.merge_recipe(content, media_type)
        except RequestRefused as error:
            fields = {str(found.get("field")) for found in error.problem.get("errors") or []}
            names = " or ".join(f"'{name}'" for name in taken_for_the_hubs(said, fields))
            advice = f"; there is no folder {names} here, so it was taken for a name on the hub" if names else ""
            raise _Stop(f"{error.problem.get('detail')}{advice}") from error
        except (httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise _Stop(f"{url}: {unknown}") from error
        print(f"job {job['id']}", flush=True)
        if not waits:
            return 0
        fetching = f"`maskmerge download {job['id']} --output {output or 'DIR'} --url {url}` fetches"
        with _interruptible(f"not waiting any longer; the job goes on, and {fetching} what it has made then"):
            for line in _news(client.events(job["id"])):
                print(line, flush=True)
            job = client.job(job["id"])
        if job["error"] is not None:
            print(f"maskmerge: {job['error']['code']}: {job['error']['message']}", file=sys.stderr)
        if job["status"] != "succeeded":
            return 1
        for note in job["result"]["notes"]:
            print(f"note: {note}")
        for line in _found(job["result"]):
            print(line)
        if output is not None:
            with _interruptible(f"the job succeeded; {fetching} what is missing"):
                client.download(job["id"], output)
            print(f"downloaded to {output}")
    return 1 if job["result"]["accepted"] is False else 0


def _download(job: str, url: str, output: Path) -> int:
    """Return 0: everything is there; 2: the job has made nothing, or a file or the service is not there."""
    with _service(url) as client, _interruptible("not all is there; the same command fetches what is missing"):
        client.download(job, output)
    print(f"downloaded to {output}")
    return 0


def _news(events: Iterable["Event"]) -> Iterator[str]:
    """Yield a line for every status, note and phase, and for every tenth of a phase that is done."""
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


def _found(result: dict[str, Any]) -> Iterator[str]:
    """Yield lines about what `auto` chose, and from which table; other methods have none."""
    search, candidates = result["search"], result["candidates"]
    if search is None or candidates is None:
        return
    chosen = next(candidate for candidate in candidates if candidate["chosen"])
    trials = len(search["trials"]) + len(search["failed"])
    yield f"chosen: {chosen['name']}, trial {chosen['trial']} of {trials}"
    if not search["feasible"]:
        yield "no trial keeps what min_retention asks for; this one lacks least"
    rows = [["retention on held-out rows", "mean", "least", "behind the chosen"]]
    for candidate in candidates:
        name = f"{'*' if candidate['chosen'] else ' '} {candidate['name']}"
        retentions = [candidate["mean_retention"], candidate["min_retention"]]
        behind = candidate["behind"]
        difference = "{:.4f} [{:.4f}, {:.4f}]".format(behind["value"], *behind["interval"]) if behind else ""
        shown = ["" if value is None else f"{value:.4f}" for value in retentions]
        rows.append([name, *shown, "" if candidate["chosen"] else difference])
    width = max(len(name) for name, *_ in rows)
    for name, mean, least, difference in rows:
        yield f"{name:<{width}}  {mean:>6}  {least:>6}  {difference}".rstrip()


def _settings(settings: Settings) -> int:
    try:
        for name, value, meaning in settings.describe():
            print(f"{name}={value}\n{indent(meaning, '    ')}")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as `head`, has enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
