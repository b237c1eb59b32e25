"""Who sends a request that comes through a proxy: what trusted proxies say, and nothing that a client makes up."""

import asyncio
import time
from ipaddress import ip_network
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from app.api.proxies import UNKNOWN, Proxies
from app.contracts.settings import Settings

PROXY, OUTER, CLIENT, LOOPBACK = "10.0.0.7", "192.0.2.9", "203.0.113.5", "127.0.0.1"
TRUSTED = ("10.0.0.0/24", "192.0.2.9", "2001:db8:1::/48")
Header = tuple[str, str]


def seen(peer: str, *headers: Header, trusted: tuple[str, ...] = TRUSTED) -> tuple[int, dict[str, Any]]:
    """Status, and what the app behind is told: client, scheme, host, names of headers."""
    told: dict[str, Any] = {}
    sent: list[Message] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        found = Headers(scope=scope)
        told.update(client=scope["client"][0], scheme=scope["scheme"], host=found.get("host"), names=set(found.keys()))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        raise AssertionError("nothing of the body is read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "scheme": "http", "path": "/jobs", "query_string": b"", "client": (peer, 1),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in (("host", "localhost"), *headers)],
    }  # fmt: skip
    asyncio.run(Proxies(behind, [ip_network(text) for text in trusted])(scope, receive, send))
    return sent[0]["status"], told


def client(peer: str, *headers: Header, trusted: tuple[str, ...] = TRUSTED) -> str:
    status, told = seen(peer, *headers, trusted=trusted)
    assert status == 200
    return str(told["client"])


SPOOFS = [
    ("forwarded", f"for={LOOPBACK}"), ("forwarded", f"for={CLIENT};proto=https;host=evil.example"),
    ("x-forwarded-for", LOOPBACK), ("x-forwarded-for", CLIENT), ("x-forwarded-host", "evil.example"),
    ("x-forwarded-proto", "https"), ("x-real-ip", LOOPBACK), ("via", "1.1 localhost"),
]  # fmt: skip


@pytest.mark.parametrize("header", SPOOFS)
def test_nobody_but_a_trusted_proxy_is_believed(header: Header) -> None:
    status, told = seen(CLIENT, header)
    assert (status, told["client"], told["scheme"], told["host"]) == (200, CLIENT, "http", "localhost")
    assert seen(CLIENT, header, trusted=())[1]["client"] == CLIENT


@pytest.mark.parametrize("header", SPOOFS)
@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_what_a_proxy_on_loopback_forwards_is_not_of_this_machine(peer: str, header: Header) -> None:
    assert client(peer, header, trusted=()) == UNKNOWN
    assert client(peer, trusted=()) == peer, "without a proxy it is"


@pytest.mark.parametrize(
    "header",
    [
        ("x-forwarded-for", "127.0.0.1"), ("forwarded", 'for="[::1]:80"'), ("x-forwarded-for", "::ffff:127.0.0.1"),
        ("x-real-ip", "127.0.0.1"), ("x-forwarded-proto", "https"), ("forwarded", "for=127.0.0.1, for=127.0.0.1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("trusted", [("127.0.0.0/8", "::1"), ("0.0.0.0/0", "::/0")])
def test_no_proxy_makes_a_client_one_of_this_machine(header: Header, trusted: tuple[str, ...]) -> None:
    assert client(LOOPBACK, header, trusted=trusted) == UNKNOWN
    assert client(LOOPBACK, trusted=trusted) == UNKNOWN, "a proxy that adds no header is a proxy still"
    assert client("10.0.0.7", header, trusted=("10.0.0.7",)) == UNKNOWN


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (("x-forwarded-for", CLIENT), CLIENT),
        (("x-forwarded-for", f" {CLIENT}:4711 "), CLIENT),
        (("x-forwarded-for", "2001:db8::5"), "2001:db8::5"),
        (("x-forwarded-for", "[2001:DB8:0::5]:80"), "2001:db8::5"),
        (("x-forwarded-for", f"::ffff:{CLIENT}"), CLIENT),
        (("forwarded", f"for={CLIENT}"), CLIENT),
        (("forwarded", f'For="{CLIENT}:80";Proto=http;by=_x'), CLIENT),
        (("forwarded", 'for="[2001:db8::5]:4711"'), "2001:db8::5"),
        (("forwarded", 'by=10.0.0.7 ; for="[2001:db8::5]"'), "2001:db8::5"),
        (("forwarded", "for=unknown"), UNKNOWN),
        (("forwarded", "for=_hidden"), UNKNOWN),
        (("forwarded", "proto=https"), UNKNOWN),
        (("x-forwarded-for", "localhost"), UNKNOWN),
        (("x-forwarded-for", "0x7f.1"), UNKNOWN),
        # What stands before the address that the proxy saw is the client's own invention.
        (("x-forwarded-for", f"127.0.0.1, 8.8.8.8, {CLIENT}"), CLIENT),
        (("forwarded", f"for=127.0.0.1, for=8.8.8.8, for={CLIENT}"), CLIENT),
        (("x-forwarded-for", f"{PROXY}, {CLIENT}"), CLIENT),
        (("x-forwarded-for", f"8.8.8.8, garbage, {CLIENT}, {OUTER}, 2001:db8:1::1"), CLIENT),
        (("forwarded", f'for="\\", for=8.8.8.8", for={CLIENT}'), CLIENT),
        (("x-forwarded-for", f"8.8.8.8, unknown, {OUTER}"), UNKNOWN),
        (("x-forwarded-for", f"{OUTER}"), OUTER),  # nobody but proxies: the first of them asks
    ],
)
def test_of_a_chain_counts_what_trusted_proxies_added(header: Header, expected: str) -> None:
    assert client(PROXY, header) == expected
    assert client(f"::ffff:{PROXY}", header) == expected


def test_a_header_that_is_repeated_is_one_list() -> None:
    assert client(PROXY, ("x-forwarded-for", "8.8.8.8"), ("x-forwarded-for", CLIENT)) == CLIENT
    assert client(PROXY, ("forwarded", "for=8.8.8.8"), ("forwarded", f"for={CLIENT}")) == CLIENT


def test_scheme_and_host_are_those_that_the_outermost_trusted_proxy_was_asked_for() -> None:
    chain = f"for=8.8.8.8;host=evil.example;proto=http, for={CLIENT};host=merge.example.org;proto=https, for={OUTER}"
    _, told = seen(PROXY, ("forwarded", chain))
    assert (told["client"], told["scheme"], told["host"]) == (CLIENT, "https", "merge.example.org")
    x_headers = (("x-forwarded-for", CLIENT), ("x-forwarded-host", "evil.example, merge.example.org"))
    _, told = seen(PROXY, *x_headers, ("x-forwarded-proto", "https"))
    assert (told["client"], told["scheme"], told["host"]) == (CLIENT, "https", "merge.example.org")
    _, told = seen(PROXY, ("x-forwarded-for", CLIENT), ("x-forwarded-proto", "file"))
    assert (told["scheme"], told["host"]) == ("http", "localhost")


def test_nothing_behind_sees_what_proxies_say() -> None:
    for peer in (PROXY, LOOPBACK):
        _, told = seen(peer, ("x-forwarded-for", CLIENT), ("x-real-ip", CLIENT), ("via", "1.1 x"), ("prefer", "wait=1"))
        assert told["names"] == {"host", "prefer"}


@pytest.mark.parametrize(
    "headers",
    [
        # A client's own header passes a proxy that writes the other kind.
        (("forwarded", "for=127.0.0.1"), ("x-forwarded-for", CLIENT)),
        (("forwarded", f"for={CLIENT}"), ("x-forwarded-host", "evil.example")),
        (("forwarded", 'for="'), ("forwarded", f"for={CLIENT}")),  # a quote that would hide what the proxy added
        (("forwarded", f'for="8.8.8.8, for={CLIENT}'),),
        (("forwarded", f"for=8.8.8.8;for=127.0.0.1, for={CLIENT}"),),
        (("forwarded", f"for {CLIENT}"),),
        (("forwarded", "=x"),),
        (("forwarded", f"for={CLIENT} x"),),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(headers: tuple[Header, ...]) -> None:
    assert seen(PROXY, *headers) == (400, {})
    assert client(CLIENT, *headers) == CLIENT, "from others it does not count"


def test_headers_as_long_as_they_may_be_are_read_in_no_time() -> None:
    start = time.process_time()
    for text in (
        "," * 16_000,
        " " * 16_000,
        "a" * 16_000,
        ":" * 16_000,
        'a="' + "\\" * 16_000,
        "a=b;" * 1 + " ," * 8000,
    ):
        seen(PROXY, ("forwarded", text))
        seen(PROXY, ("x-forwarded-for", text))
    assert time.process_time() - start < 2


def test_proxies_are_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMERGE_TRUSTED_PROXIES", " 10.0.0.7, 192.0.2.0/24,::1 ")
    settings = Settings()
    assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.7/32", "192.0.2.0/24", "::1/128"]
    monkeypatch.setenv("MASKMERGE_TRUSTED_PROXIES", settings.text("trusted_proxies"))  # as the supervisor does
    assert Settings() == settings
    for text in ("nginx", "10.0.0.7/24", "10.0.0", "*"):
        with pytest.raises(ValidationError, match=r"as 10\.0\.0\.7 or 10\.0\.0\.0/24"):
            Settings(trusted_proxies=text)
