"""Requests that name another host, and changes that another site's page asks for, are refused before anything else.

Without keys the service asks nobody who they are, and it listens where browsers of its users reach it. A page from
anywhere can send it requests, and can have its own name point to this address, after which the browser takes the
answers for the page's own. What pages cannot change is what browsers say of a request: the name that it goes to, and
the page that it comes from.
"""

import re
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import unquote

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import answer
from app.contracts.errors import Problem, ProblemError
from app.contracts.settings import is_loopback

READS = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?")
DEFAULT_PORTS = {"http": "80", "https": "443"}
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


class OwnHosts:
    """Middleware. It serves loopback's names, the address that the service listens on, and names that are allowed.

    A forwarded name (`X-Forwarded-Host`) counts for nothing, because any client can send one.

    Args:
        names: other names of the service.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {_without_brackets(name) for name in names} - set(ANY_ADDRESS)

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
        if scope["method"] not in READS:
            _check_origin(headers, authority)
        return scope

    def _check(self, authority: str) -> None:
        found = AUTHORITY.fullmatch(authority)
        if found is None:
            raise ProblemError(Problem.MALFORMED, f"'{authority[:100]}' is no host; write NAME or NAME:PORT")
        name = _without_brackets(found[1])
        if name != "localhost" and not is_loopback(name) and name not in self._names:
            detail = f"the service does not go by the name '{name[:100]}'; where it should, set MASKMERGE_ALLOWED_HOSTS"
            raise ProblemError(Problem.UNKNOWN_HOST, detail)


def _check_origin(headers: Headers, authority: str) -> None:
    """Raises ProblemError unless the page that the request comes from, if any, is of the host that it goes to.

    A page on another port of the same machine is foreign too, and so is one that hides where it comes from (`null`).
    """
    sites, origins = headers.getlist("sec-fetch-site"), headers.getlist("origin")
    is_own = all(site in ("same-origin", "none") for site in sites)
    if not is_own or not all(_is_origin_of(origin, authority) for origin in origins):
        source = f"the page at '{origins[0][:100]}'" if origins else f"a page of another site ({sites[-1][:100]})"
        detail = f"{source} is not this service's own, and may not change anything here"
        raise ProblemError(Problem.FOREIGN_ORIGIN, detail)


def _is_origin_of(origin: str, authority: str) -> bool:
    scheme, _, source = origin.lower().partition("://")
    return scheme in DEFAULT_PORTS and _place(source, scheme) == _place(authority, scheme) is not None


def _place(authority: str, scheme: str) -> tuple[str, str] | None:
    """Splits a host into name and port; None when it is malformed."""
    found = AUTHORITY.fullmatch(authority)
    return (_without_brackets(found[1]), found[2] or DEFAULT_PORTS[scheme]) if found else None


def _without_brackets(name: str) -> str:
    """Return a host as it is compared: in small letters, without the root's dot and an address's brackets."""
    plain = name.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    try:
        return str(ip_address(plain))
    except ValueError:
        return plain
