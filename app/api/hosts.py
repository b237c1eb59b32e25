"""Requests that name another host, and changes that another site's page asks for, are refused before anything else.

Without keys the service asks nobody who they are, and it listens where browsers of its users reach it. A page from
anywhere can send it requests, and can have its own name point to this address, after which the browser takes the
answers for the page's own. What pages cannot change is what browsers say of a request: the name that it goes to, and
the page that it comes from.
"""

import re
from collections.abc import Collection, Iterable
from ipaddress import ip_address
from urllib.parse import unquote

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import answer
from app.contracts.addresses import is_loopback
from app.contracts.errors import Problem, ProblemError
from app.contracts.settings import DEFAULT_PORTS

READS = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?")
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


class OwnHosts:
    """Middleware. It serves loopback's names, the address that the service listens on, and names that are allowed.

    A name that a proxy forwards is in `Host` already where the proxy is trusted; see `app.api.proxies`.

    Args:
        names: other names of the service.
        origins: origins whose pages may change things too; see `app.api.cors`.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], origins: Collection[str] = ()) -> None:
        self._app = app
        self._names = {_without_brackets(name) for name in names} - set(ANY_ADDRESS)
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope = self._admitted(scope)
        except ProblemError as error:
            await answer(Request(scope), error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admitted(self, scope: Scope) -> Scope:
        """Return the request with its target in the usual form. Raises ProblemError."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            detail = "the request names no host" if not hosts else "the request names more than one host"
            raise ProblemError(Problem.MALFORMED, f"{detail}; send one Host header")
        authority = hosts[0]
        self._check(authority)
        # A target may be a whole URL, as proxies get it. Its host then counts, not the header (RFC 9112, 3.2.2).
        target = scope.get("raw_path", b"").decode("latin-1")
        whole = re.fullmatch(r"https?://([^/]*)(/.*)?", target, re.IGNORECASE | re.DOTALL)
        if whole:
            authority = whole[1]
            self._check(authority)
            path = whole[2] or "/"
            scope = {**scope, "path": unquote(path), "raw_path": path.encode("latin-1")}
        is_named = len(origins := headers.getlist("origin")) == 1 and origins[0] in self._origins
        if scope["method"] not in READS and not is_named:
            check_origin(headers, authority, scope["scheme"])
        return scope

    def _check(self, authority: str) -> None:
        found = AUTHORITY.fullmatch(authority)
        if found is None:
            raise ProblemError(Problem.MALFORMED, f"'{authority[:100]}' is no host; write NAME or NAME:PORT")
        name = _without_brackets(found[1])
        if name != "localhost" and not is_loopback(name) and name not in self._names:
            detail = f"the service does not go by the name '{name[:100]}'; where it should, set MASKMERGE_ALLOWED_HOSTS"
            raise ProblemError(Problem.UNKNOWN_HOST, detail)


def check_origin(headers: Headers, authority: str, scheme: str) -> None:
    """Raises ProblemError unless the page that the request comes from, if any, is of the host that it goes to.

    A page on another port of the same machine is foreign too, and so is one that hides where it comes from (`null`). A
    request over plain HTTP may have come to a proxy by TLS, so its page may be of either scheme.
    """
    sites, origins = headers.getlist("sec-fetch-site"), headers.getlist("origin")
    is_own = all(site in ("same-origin", "none") for site in sites)
    if not is_own or not all(_is_origin_of(origin, authority, scheme) for origin in origins):
        source = f"the page at '{origins[0][:100]}'" if origins else f"a page of another site ({sites[-1][:100]})"
        detail = (
            f"{source} is not this service's own, and may change nothing here unless MASKMERGE_CORS_ORIGINS names its "
            "origin"
        )
        raise ProblemError(Problem.FOREIGN_ORIGIN, detail)


def _is_origin_of(origin: str, authority: str, asked_by: str) -> bool:
    scheme, _, source = origin.lower().partition("://")
    if scheme not in DEFAULT_PORTS or (asked_by == "https" and scheme != "https"):
        return False
    return _place(source, scheme) == _place(authority, scheme) is not None


def _place(authority: str, scheme: str) -> tuple[str, str] | None:
    """Splits a host into name and port; None when it is malformed."""
    found = AUTHORITY.fullmatch(authority)
    return (_without_brackets(found[1]), found[2] or str(DEFAULT_PORTS[scheme])) if found else None


def _without_brackets(name: str) -> str:
    """Return a host as it is compared: in small letters, without the root's dot and an address's brackets."""
    plain = name.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    try:
        return str(ip_address(plain))
    except ValueError:
        return plain
