"""Tells who sends a request that comes through a proxy, and under which name the client asked for the service.

Proxies say so in `Forwarded` (RFC 7239) or in `X-Forwarded-For`, `-Host` and `-Proto`. Any client can write these too,
so they count only from proxies that the settings name, and of a chain only what trusted proxies added: it is read from
its end to the first address that is no trusted proxy's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import cast

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import answer
from app.contracts.addresses import is_loopback, plain_address
from app.contracts.errors import Problem, ProblemError

FORWARDED = "forwarded"
X_FORWARDED = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto")
SIGNS = (FORWARDED, *X_FORWARDED, "x-real-ip", "via")
"""Headers by which it shows that a request came through a proxy, whoever that is."""
UNKNOWN = "unknown"
"""Address of a client that nobody vouches for, as RFC 7239 writes it. It is not of this machine."""
PAIR = re.compile(r"""[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=([^\s;,"]+|"(?:[^"\\]|\\.)*")[ \t]*""")
BLANK = re.compile(r"[ \t]*")


@dataclass(frozen=True)
class Hop:
    """What a proxy says of the request that it took."""

    client: str
    host: str | None = None
    scheme: str | None = None


class Proxies:
    """Middleware. It puts the client's address, the scheme and the host where the rest of the app looks for them.

    A request from loopback that came through a proxy, or may have come through one, is not of this machine: its
    address is `unknown` unless a trusted proxy says another.

    Args:
        trusted: addresses of the proxies that are believed.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[IPv4Network | IPv6Network]) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope = self._told(scope)
        except ProblemError as error:
            await answer(Request(scope), error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _told(self, scope: Scope) -> Scope:
        """Return the request as its client sent it, without what proxies say. Raises ProblemError."""
        headers = Headers(scope=scope)
        is_forwarded = any(name in headers for name in SIGNS)
        peer = scope["client"][0] if scope["client"] else UNKNOWN
        is_trusted = self._trusts(peer)
        if not is_forwarded and not is_trusted:
            return scope
        kept = [pair for pair in scope["headers"] if pair[0].decode("latin-1") not in SIGNS]
        told = {**scope, "headers": kept}
        hop = self._hop(headers) if is_trusted else None
        client = hop.client if hop else peer
        if is_loopback(client):
            client = UNKNOWN
        if client != peer:
            told["client"] = (client, 0)
        if hop is not None and hop.host is not None:
            others = [pair for pair in kept if pair[0] != b"host"]
            told["headers"] = [(b"host", hop.host.encode("latin-1")), *others]
        if hop is not None and hop.scheme in ("http", "https"):
            told["scheme"] = hop.scheme
        return told

    def _hop(self, headers: Headers) -> Hop | None:
        """Return what the outermost trusted proxy says; None when none says who the client is. Raises ProblemError."""
        forwarded = headers.getlist(FORWARDED)
        if forwarded and any(name in headers for name in X_FORWARDED):
            detail = "it has Forwarded and X-Forwarded-… too; the proxy must remove those that it does not write itself"
            raise ProblemError(Problem.MALFORMED, detail)
        hops = list(_forwarded(", ".join(forwarded)) if forwarded else _x_forwarded(headers))
        found = None
        for hop in reversed(hops):
            found = hop
            if not self._trusts(hop.client):
                break
        return found

    def _trusts(self, text: str) -> bool:
        address = plain_address(text)
        return address is not None and any(address in network for network in self._trusted)


def _forwarded(text: str) -> Iterator[Hop]:
    """Yield the elements of `Forwarded`. Raises ProblemError: a quote that is left open would hide those after it."""
    position, pairs = 0, dict[str, str]()
    while position < len(text):
        found = PAIR.match(text, position)
        if found is not None:
            name, value = found[1].lower(), found[2]
            if name in pairs:
                raise ProblemError(Problem.MALFORMED, f"the header Forwarded says {name[:20]} twice of one proxy")
            pairs[name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            position = found.end()
        else:
            position = cast(re.Match[str], BLANK.match(text, position)).end()
        if position < len(text) and text[position] not in ",;":
            raise ProblemError(Problem.MALFORMED, "the header Forwarded is not as RFC 7239 has it")
        if pairs and (position == len(text) or text[position] == ","):
            yield _hop(pairs)
            pairs = {}
        position += 1


def _hop(pairs: Mapping[str, str]) -> Hop:
    return Hop(_node(pairs.get("for", UNKNOWN)), pairs.get("host"), pairs.get("proto", "").lower())


def _x_forwarded(headers: Headers) -> Iterator[Hop]:
    """Yield the proxies of `X-Forwarded-For`. Host and scheme are the last that were added, which need not be lists."""
    nodes, hosts, schemes = (
        [part.strip() for part in ",".join(headers.getlist(name)).split(",") if part.strip()] for name in X_FORWARDED
    )
    for node in nodes or [UNKNOWN]:
        yield Hop(_node(node), hosts[-1] if hosts else None, schemes[-1].lower() if schemes else None)


def _node(text: str) -> str:
    """Return a node's address without its port; `unknown` for what is no address, such as a name that hides one."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    address = plain_address(text)
    return UNKNOWN if address is None else str(address)
