"""One attempt at a real receiver: what counts as a success, what is refused, and where the connection goes."""

import asyncio
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import trustme

from app.services.webhook_sender import MOST_BODY_BYTES, Answer, Resolver, Sender
from tests.conftest import free_port
from tests.receivers import answering, closing, dripping, endless, nonsense, receiving, stalling, stalling_in_its_body

TIMEOUT_S = 0.5
PUBLIC, LOOPBACK = "93.184.215.14", "127.0.0.1"


class Names:
    """Resolves every name to the next of the answers, and the last one from then on."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def send(url: str, *, allow_private: bool = True, timeout_s: float = TIMEOUT_S, **options: object) -> Answer:
    async def attempt() -> Answer:
        sender = Sender(allow_private=allow_private, timeout_s=timeout_s, **options)  # type: ignore[arg-type]
        return await sender.send(url, {"webhook-id": "msg_1"}, b'{"type":"webhook.test"}')

    return asyncio.run(attempt())


def test_a_message_arrives_as_it_is() -> None:
    with receiving(answering(200, b"thank you")) as receiver:
        answer = send(receiver.url)
    assert (answer.status, answer.error) == (200, None)
    [received] = receiver.received
    assert received.path == "/hook?token=hidden-word"
    assert received.body == b'{"type":"webhook.test"}'
    assert received.headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert received.headers["Content-Type"] == "application/json"
    assert received.headers["User-Agent"].startswith("maskmerge/")
    assert received.headers["webhook-id"] == "msg_1"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_a_success(status: int) -> None:
    with receiving(answering(status)) as receiver:
        assert send(receiver.url).error is None


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 429, 500, 503])
def test_other_answers_are_failures_that_name_the_status(status: int) -> None:
    with receiving(answering(status)) as receiver:
        answer = send(receiver.url)
    assert answer.status == status
    assert str(status) in (answer.error or "")
    assert answer.is_gone == (status == 410)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with receiving() as other, receiving(answering(status, Location=other.url)) as receiver:
        answer = send(receiver.url)
        assert answer.status == status
        assert "redirects are not followed" in (answer.error or "")
        assert len(receiver.received) == 1
        assert other.received == []


@pytest.mark.parametrize("behaviour", [stalling, dripping])
def test_a_receiver_that_stalls_is_left_when_its_time_is_over(behaviour: object) -> None:
    with receiving(behaviour) as receiver:  # type: ignore[arg-type]
        began = time.monotonic()
        answer = send(receiver.url)
        assert time.monotonic() - began < 10 * TIMEOUT_S
    assert answer == Answer(answer.seconds, None, f"no answer came within {TIMEOUT_S:g} s")


def test_an_endless_body_is_read_to_a_limit_and_its_status_counts() -> None:
    with receiving(endless) as receiver:
        began = time.monotonic()
        assert send(receiver.url, timeout_s=30).error is None
        assert time.monotonic() - began < 10
    with receiving(answering(500, b"a" * (MOST_BODY_BYTES * 2))) as receiver:
        assert send(receiver.url).status == 500


def test_a_status_counts_when_the_body_stalls() -> None:
    for behaviour in (stalling_in_its_body, answering(200, Content_Length="10")):
        with receiving(behaviour) as receiver:
            assert send(receiver.url, timeout_s=30).error is None


@pytest.mark.parametrize(("behaviour", "problem"), [(closing, "HTTP/1.1"), (nonsense, "HTTP/1.1")])
def test_what_is_no_answer_is_a_failure(behaviour: object, problem: str) -> None:
    with receiving(behaviour) as receiver:  # type: ignore[arg-type]
        answer = send(receiver.url)
    assert answer.status is None
    assert problem in (answer.error or "")


def test_a_closed_port_and_an_unknown_name_are_failures_that_hide_path_and_query() -> None:
    for url, problem in (
        (f"http://127.0.0.1:{free_port()}/hidden?token=word", "cannot be reached"),
        ("http://no-such-name.invalid/hidden?token=word", "cannot be resolved"),
    ):
        answer = send(url, timeout_s=30)
        assert problem in (answer.error or "")
        assert "hidden" not in (answer.error or "")
        assert "word" not in (answer.error or "")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver, receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert send(receiver.url).error is None
        assert len(receiver.received) == 1
        assert proxy.received == []


@pytest.mark.parametrize(
    ("header", "seconds"), [("120", 120), ("0", 0), ("-5", None), ("soon", None), ("1e3", None), ("", None)]
)
def test_retry_after_is_read_from_429_and_503(header: str, seconds: float | None) -> None:
    for status in (429, 503):
        with receiving(answering(status, Retry_After=header)) as receiver:
            assert send(receiver.url).retry_after_s == seconds
    with receiving(answering(500, Retry_After=header)) as receiver:
        assert send(receiver.url).retry_after_s is None


def test_retry_after_may_be_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    with receiving(answering(503, Retry_After=later)) as receiver:
        assert send(receiver.url).retry_after_s == pytest.approx(300, abs=30)
    past = format_datetime(datetime.now(UTC) - timedelta(minutes=5), usegmt=True)
    with receiving(answering(503, Retry_After=past)) as receiver:
        assert send(receiver.url).retry_after_s == 0


def test_a_name_without_a_public_address_is_refused_and_it_is_not_told_whether_it_has_another() -> None:
    with receiving() as receiver:
        for addresses in ([LOOPBACK], [PUBLIC, LOOPBACK], ["::ffff:127.0.0.1"], ["10.1.2.3"], []):
            url = f"http://inner.example.org:{receiver.port}/"
            answer = send(url, allow_private=False, resolve=Names(addresses))
            assert answer.status is None
            assert (answer.error or "").startswith("inner.example.org has no public address: it cannot be resolved, or")
            assert all(address not in (answer.error or "") for address in addresses)
        answer = send(receiver.url, allow_private=False)
        assert "loopback" in (answer.error or "")
        assert receiver.received == []


def test_localhost_is_refused_when_it_is_resolved() -> None:
    with receiving() as receiver:
        answer = send(f"http://localhost:{receiver.port}/", allow_private=False, resolve=Resolver())
        assert "localhost is loopback, and webhooks are sent to public addresses alone" in (answer.error or "")
        assert receiver.received == []


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and loopback a moment later: it is resolved once, and not again."""
    connected: list[str] = []

    async def connect(remote_host: str, remote_port: int, **_: object) -> None:
        connected.append(remote_host)
        raise ConnectionRefusedError("no route in a test")

    monkeypatch.setattr("anyio.connect_tcp", connect)
    names = Names([PUBLIC], [LOOPBACK])
    with receiving() as receiver:
        answer = send(f"http://rebinding.example.org:{receiver.port}/", allow_private=False, resolve=names)
        assert answer.error is not None
        assert names.asked == ["rebinding.example.org"]
        assert connected == [PUBLIC]
        # The next attempt asks again, and finds what the name has become.
        answer = send(f"http://rebinding.example.org:{receiver.port}/", allow_private=False, resolve=names)
        assert "has no public address" in (answer.error or "")
        assert connected == [PUBLIC]
        assert receiver.received == []


def test_further_addresses_of_a_name_are_tried() -> None:
    with receiving() as receiver:
        names = Names(["127.0.0.2", LOOPBACK])  # the receiver listens on one of them
        answer = send(f"http://receiver.example.org:{receiver.port}/", resolve=names)
    assert answer.error is None
    assert receiver.received[0].headers["Host"] == f"receiver.example.org:{receiver.port}"


def tls_of(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_tls_asks_for_the_name_and_checks_the_certificate_against_it() -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    asked: list[str | None] = []
    server = tls_of(authority, "hooks.example.org")
    server.sni_callback = lambda _, name, __: asked.append(name)
    names = Names([LOOPBACK])
    with receiving(tls=server) as receiver:
        url = f"https://hooks.example.org:{receiver.port}/"
        assert send(url, resolve=names, tls=trusting, timeout_s=30).error is None
        assert asked == ["hooks.example.org"]
        assert receiver.received[0].headers["Host"] == f"hooks.example.org:{receiver.port}"
        other = send(f"https://other.example.org:{receiver.port}/", resolve=names, tls=trusting, timeout_s=30)
        assert "certificate" in (other.error or "")
        unknown = send(url, resolve=names, timeout_s=30)
        assert "certificate" in (unknown.error or "")
        assert len(receiver.received) == 1


def test_a_name_that_does_not_resolve_in_time_is_a_failure() -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.sleep(3600)
        return []

    assert "no answer came" in (send("http://slow.example.org/", resolve=hang).error or "")
