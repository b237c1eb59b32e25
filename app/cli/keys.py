"""`maskmerge keys create | list | revoke | secret`: keys are made where the data is, before anybody can ask for one.

With `--url`, a running service is asked instead, by somebody who has a key with the scope `admin`.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.exits import Exit, Stop
from app.cli.options import DataDir, Json, connected
from app.cli.printing import minute, print_json, print_table

if TYPE_CHECKING:
    from app.client import Client, CreatedKey, Key, NewKey
    from app.contracts.webhooks import CreatedSecret
    from app.storage.api_keys import ApiKeys
    from app.storage.signing_secrets import SigningSecrets

COLUMNS = ("id", "tenant", "scopes", "created", "last used", "state", "name")

app = typer.Typer(
    help="Make, list and revoke API keys, and make the secrets of their webhooks.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
KeysUrl = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Service to ask, with an admin's key in MASKMERGE_API_KEY.")
]


@app.command()
def create(
    name: Annotated[
        str, typer.Option("--name", metavar="TEXT", help="Name for people, such as that of a pipeline.")
    ] = "",
    tenant: Annotated[
        str, typer.Option("--tenant", metavar="NAME", help="Tenant whose jobs it makes and sees.")
    ] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help="What it allows: read, write (and read), metrics, or admin (and all); repeatable. Default: write.",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="Time that it lasts, as 90d, 12h or 30m.")
    ] = None,
    data_dir: DataDir = None,
    url: KeysUrl = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print it: it is shown this once."""
    asked = _asked(name, tenant, list(scope or ()), expires)
    with _keys(data_dir, url) as keys:
        made = keys.create_key(asked)
    if as_json:
        print_json(made)
        return
    print(f"key {made.id} of tenant {made.tenant}: {', '.join(made.scopes)}", file=sys.stderr)
    print(made.key)


@app.command("list")
def list_keys(data_dir: DataDir = None, url: KeysUrl = None, as_json: Json = False) -> None:
    """List all keys, with those that were revoked."""
    with _keys(data_dir, url) as keys:
        found = keys.keys()
    if as_json:
        for key in found:
            print_json(key)
    else:
        print_table(COLUMNS, map(_row, found))


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, or the key up to its second _.")],
    data_dir: DataDir = None,
    url: KeysUrl = None,
    as_json: Json = False,
) -> None:
    """Refuse a key from now on."""
    known = key_id.removeprefix("mm_")
    with _keys(data_dir, url) as keys:
        keys.revoke_key(known)
    if as_json:
        print_json({"id": known, "revoked": True})


@app.command()
def secret(
    key_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of the key; default: callers without a key.")
    ] = None,
    overlap: Annotated[
        str, typer.Option("--overlap", metavar="TIME", help="Time for which former secrets sign too, as 24h or 0s.")
    ] = "24h",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make or rotate the secret that signs a key's webhooks, and print it: it is shown this once."""
    from app.contracts.webhooks import LONGEST_OVERLAP_S

    seconds = _seconds(overlap, "--overlap")
    if seconds > LONGEST_OVERLAP_S:
        raise typer.BadParameter(f"'{overlap}' is longer than {LONGEST_OVERLAP_S // 86_400}d", param_hint="--overlap")
    with _stored(data_dir) as keys:
        made = keys.rotate_secret(None if key_id is None else key_id.removeprefix("mm_"), seconds)
    if as_json:
        print_json(made)
        return
    former = "" if made.former_until is None else f"; the former one signs too until {minute(made.former_until)} UTC"
    print(f"secret of {'callers without a key' if key_id is None else f'key {made.signer}'}{former}", file=sys.stderr)
    print(made.secret)


class _Stored:
    """The keys of a data folder or a Redis, by the methods that the client has for those of a service."""

    def __init__(self, keys: "ApiKeys", secrets: "SigningSecrets") -> None:
        self._keys = keys
        self._secrets = secrets

    def create_key(self, new: "NewKey") -> "CreatedKey":
        return self._keys.create(new)

    def keys(self) -> "list[Key]":
        return list(self._keys.all())

    def revoke_key(self, key_id: str) -> None:
        if not self._keys.revoke(key_id):
            raise Stop(f"there is no key {key_id}")

    def rotate_secret(self, key_id: str | None, overlap_seconds: int) -> "CreatedSecret":
        from app.contracts.api_keys import Caller
        from app.contracts.webhooks import signer_of

        if key_id is not None and all(key.id != key_id for key in self._keys.all()):
            raise Stop(f"there is no key {key_id}")
        return self._secrets.rotate(signer_of(Caller(key_id=key_id)), overlap_seconds)


@contextmanager
def _keys(data_dir: Path | None, url: str | None) -> Iterator["Client | _Stored"]:
    """Yield the keys of a service, or those of a data folder. Raises Stop."""
    if url is not None:
        with connected(url) as client:
            yield client
    else:
        with _stored(data_dir) as keys:
            yield keys


@contextmanager
def _stored(data_dir: Path | None) -> Iterator[_Stored]:
    """Yield the keys of a data folder. Raises Stop."""
    from redis import Redis
    from redis.exceptions import RedisError

    from app.cli.service import configured
    from app.embedded_redis import NoRedisServer, opened
    from app.storage.api_keys import ApiKeys
    from app.storage.connection import connect_for_answers
    from app.storage.data_folder import DataDirInUse
    from app.storage.keys import Keys
    from app.storage.signing_secrets import SigningSecrets, TooManySecrets
    from app.storage.versions import NewerData, check_folder, check_redis

    settings = configured(data_dir=data_dir)
    try:
        with ExitStack() as held:
            if settings.redis_url is not None:
                redis = held.enter_context(connect_for_answers(settings.redis_url.get_secret_value()))
            else:
                check_folder(settings.data_dir)
                address = held.enter_context(opened(settings.data_dir))
                redis = held.enter_context(Redis.from_url(address, decode_responses=True))
            check_redis(redis, Keys(settings.prefix))  # what is older is upgraded by the service, not beside it
            yield _Stored(ApiKeys(redis, settings.prefix), SigningSecrets(redis, settings.prefix))
    except NewerData as error:
        raise Stop(str(error), Exit.NEWER_DATA) from error
    except (DataDirInUse, NoRedisServer, TooManySecrets, ValueError, OSError, RedisError) as error:
        raise Stop(str(error)) from error


def _asked(name: str, tenant: str, scopes: list[str] | None, expires: str | None) -> "NewKey":
    """Return what is asked for. Raises BadParameter."""
    from pydantic import ValidationError

    from app.contracts.api_keys import NewKey
    from worker.engine.catalog.primitives.words import message_of

    expires_at = None
    if expires is not None:
        expires_at = datetime.now(UTC) + timedelta(seconds=_seconds(expires, "--expires"))
    given = {"name": name, "tenant": tenant, "expires_at": expires_at}
    try:
        return NewKey.model_validate({**given, **({"scopes": scopes} if scopes else {})})
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{first['loc'][0]}".replace("scopes", "scope")
        raise typer.BadParameter(message_of(first), param_hint=option) from error


def _seconds(text: str, option: str) -> int:
    """Return the seconds of a time such as 90d. Raises BadParameter."""
    from app.contracts.settings import UNITS

    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"'{text}' is no time; write it as 90d, 12h or 30m", param_hint=option)
    return int(found[1]) * UNITS[found[2]]


def _row(key: "Key") -> tuple[str, ...]:
    state = "valid"
    if key.revoked_at is not None:
        state = f"revoked {minute(key.revoked_at)}"
    elif key.expires_at is not None:
        state = f"{'expired' if key.expires_at <= datetime.now(UTC) else 'until'} {minute(key.expires_at)}"
    used = "never" if key.last_used_at is None else minute(key.last_used_at)
    return key.id, key.tenant, ",".join(key.scopes), minute(key.created_at), used, state, key.name
