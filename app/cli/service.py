"""Commands that run the service, or parts of it: `serve`, `api`, `worker`, `settings`."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.exits import Exit, Stop
from app.cli.options import DataDir, Json
from app.cli.printing import print_json

if TYPE_CHECKING:
    from app.contracts.settings import Settings

Host = Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")]
Port = Annotated[int | None, typer.Option("--port", metavar="N", help="Port to listen on.")]


def serve(
    data_dir: DataDir = None,
    local_root: Annotated[
        list[Path] | None,
        typer.Option("--local-root", metavar="DIR", help="Folder that local: references may name; repeatable."),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Workers to start.")] = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """Run everything on one machine: Redis, API and workers."""
    settings = configured(
        "supervisor", data_dir=data_dir, local_roots=local_root or None, workers=workers, host=host, port=port
    )
    from redis.exceptions import RedisError

    from app.embedded_redis import NoRedisServer
    from app.storage.data_folder import DataDirInUse
    from app.storage.versions import NewerData
    from app.supervisor import Supervisor

    try:
        if settings.signing_key is not None:
            from app.storage.signing_keys import SigningKey

            SigningKey(settings.signing_key)
        Supervisor(settings).run()
    except NewerData as error:
        raise Stop(str(error), Exit.NEWER_DATA) from error
    except (DataDirInUse, NoRedisServer, ValueError, OSError) as error:
        raise Stop(str(error)) from error
    except RedisError as error:
        raise Stop(f"Redis does not answer: {error}") from error


def api(host: Host = None, port: Port = None) -> None:
    """Run the API alone, against MASKMERGE_REDIS_URL."""
    settings = configured("api", host=host, port=port)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported

    from app.server import Server
    from app.storage.versions import NewerData

    try:
        server = Server(settings)
    except NewerData as error:
        raise Stop(str(error), Exit.NEWER_DATA) from error
    except (ValueError, OSError) as error:
        raise Stop(str(error), Exit.USAGE) from error
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has stopped
        server.run()
    if server.found_newer_data is not None:
        raise Stop(str(server.found_newer_data), Exit.NEWER_DATA)
    if not server.started:
        raise typer.Exit(3)


def worker() -> None:
    """Run one worker, against MASKMERGE_REDIS_URL."""
    configured()
    # Replaced rather than imported: nothing of the worker is part of the app.
    os.execv(sys.executable, [sys.executable, "-m", "worker"])  # noqa: S606


def settings(as_json: Json = False) -> None:
    """Print every setting with its value and meaning."""
    described = configured().describe()
    try:
        if as_json:
            print_json({name: value for name, value, _ in described})
        for name, value, meaning in () if as_json else described:
            print(f"{name}={value}\n{indent(meaning, '    ')}")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as `head`, has enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configured(process: str = "command", **given: Any) -> "Settings":
    """Return the settings, with those that are given in place of the environment's, and begin to log.

    Args:
        process: what the log calls this process.
        given: settings of the command line; None for one that is not given.

    Raises Stop where one of them is wrong.
    """
    from pydantic import ValidationError

    from app.contracts.settings import Settings
    from app.observability.logs import configure
    from worker.engine.catalog.primitives.words import message_of

    try:
        found = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problems = error.errors(include_input=False)  # which may be a secret
        names = [(str(one["loc"][0]) if one["loc"] else "", message_of(one)) for one in problems]
        text = "\nmaskmerge: ".join(f"MASKMERGE_{name.upper()}: {message}" for name, message in names)
        raise Stop(text, Exit.USAGE) from error
    configure(found.log_level, found.log_format, process)
    return found
