"""`maskmerge keys create | list | revoke`: API keys are made where the data is, before anybody can ask for one."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError
from redis import Redis
from redis.exceptions import RedisError

from app.contracts.api_keys import Key, NewKey, Scope
from app.contracts.settings import UNITS, Settings
from app.embedded_redis import NoRedisServer, opened
from app.storage.api_keys import ApiKeys
from app.storage.connection import connect_for_answers
from app.storage.data_folder import DataDirInUse

COLUMNS = ("id", "tenant", "scopes", "created", "last used", "state", "name")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[argparse.ArgumentParser]:
    """Add the command to those of `maskmerge`, and return the parsers of its own commands."""
    keys = commands.add_parser("keys", help="API keys: make, list and revoke them").add_subparsers(
        dest="keys", required=True
    )
    create = keys.add_parser("create", help="make a key, and print it: it is shown this once")
    create.add_argument("--name", default="", help="name for people, such as that of a pipeline")
    create.add_argument("--tenant", default="default", help="whose jobs it makes and sees; default: %(default)s")
    create.add_argument("--scope", choices=list(Scope), action="append", dest="scopes",
                        help="what it allows; write includes read, admin both; default: write")  # fmt: skip
    create.add_argument("--expires", metavar="TIME", help="time that it lasts, as 90d, 12h or 30m; default: for ever")
    revoke = keys.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("id", help="the key's id, or the key up to its second _")
    return [create, keys.add_parser("list", help="list all keys"), revoke]


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run the command. Returns the exit status: 0 done; 1 there is no such key; 2 Redis cannot be reached, or a value
    is wrong."""
    try:
        with _keys(settings) as keys:
            if options.keys == "create":
                made = keys.create(_asked(options))
                print(f"key {made.id} of tenant {made.tenant}: {', '.join(made.scopes)}", file=sys.stderr)
                print(made.key)
            elif options.keys == "list":
                _print(list(keys.all()))
            elif not keys.revoke(options.id.removeprefix("mm_")):
                print(f"maskmerge: there is no key {options.id}", file=sys.stderr)
                return 1
    except ValidationError as error:
        for problem in error.errors():
            print(f"maskmerge: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr)
        return 2
    except (DataDirInUse, NoRedisServer, ValueError, OSError, RedisError) as error:
        print(f"maskmerge: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _keys(settings: Settings) -> Iterator[ApiKeys]:
    if settings.redis_url is not None:
        with connect_for_answers(settings.redis_url.get_secret_value()) as redis:
            yield ApiKeys(redis, settings.prefix)
        return
    with opened(settings.data_dir) as url, Redis.from_url(url, decode_responses=True) as redis:
        yield ApiKeys(redis, settings.prefix)


def _asked(options: argparse.Namespace) -> NewKey:
    expires_at = None
    if options.expires is not None:
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", options.expires)
        if found is None:
            raise ValueError(f"--expires is '{options.expires}'; write it as 90d, 12h or 30m")
        expires_at = datetime.now(UTC) + timedelta(seconds=int(found[1]) * UNITS[found[2]])
    asked = {"name": options.name, "tenant": options.tenant, "expires_at": expires_at}
    return NewKey.model_validate({**asked, **({"scopes": options.scopes} if options.scopes else {})})


def _print(keys: list[Key]) -> None:
    rows = [COLUMNS, *map(_row, keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def _row(key: Key) -> tuple[str, ...]:
    state = "valid"
    if key.revoked_at is not None:
        state = f"revoked {_day(key.revoked_at)}"
    elif key.expires_at is not None:
        state = f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {_day(key.expires_at)}"
    used = "never" if key.last_used_at is None else _day(key.last_used_at)
    return key.id, key.tenant, ",".join(key.scopes), _day(key.created_at), used, state, key.name


def _day(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"
