"""Which addresses and URLs webhooks may name."""

import pytest
from pydantic import ValidationError

from app.contracts.addresses import literal_refusal, refusal
from app.contracts.webhooks import Webhook

PUBLIC = ["1.1.1.1", "8.8.8.8", "172.15.255.255", "172.32.0.1", "100.63.255.255", "100.128.0.0", "2606:4700::1111"]
REFUSED = {
    "private": ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"],
    "shared by a carrier": ["100.64.0.1", "100.127.255.255"],
    "loopback": ["127.0.0.1", "127.255.255.255"],
    "link-local": ["169.254.169.254", "169.254.0.1"],
    "of this network": ["0.0.0.0", "0.255.255.255"],  # noqa: S104 - nothing listens on it
    "multicast": ["224.0.0.1", "239.255.255.255"],
    "reserved": ["192.0.0.1", "240.0.0.1", "255.255.255.255", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "for documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.9", "2001:db8::1", "3fff::1"],
    "for benchmarks": ["198.18.0.1", "198.19.255.255"],
    "of a 6to4 relay": ["192.88.99.1"],
    "6to4": ["2002:7f00:1::", "2002:c0a8:1::1"],
    "not public": [
        "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456:789a::1", "fec0::1", "ff02::1", "100::1",
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "5f00::1",
        "4000::1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_taken(address: str) -> None:
    assert refusal(address) is None
    assert literal_refusal(f"[{address}]" if ":" in address else address) is None


@pytest.mark.parametrize(("kind", "address"), [(kind, one) for kind, some in REFUSED.items() for one in some])
def test_all_others_are_refused_by_their_kind(kind: str, address: str) -> None:
    assert refusal(address) == kind
    assert literal_refusal(f"[{address}]" if ":" in address else address) == kind


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost.", "api.localhost"])
def test_names_of_this_machine_are_refused_before_they_are_resolved(name: str) -> None:
    assert literal_refusal(name) == "loopback"


def test_other_names_are_left_to_their_resolution() -> None:
    assert literal_refusal("internal.example.org") is None
    assert literal_refusal("notlocalhost") is None


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("http://2130706433/", "loopback"),
        ("http://0x7f.1/", "loopback"),
        ("http://0177.0.0.1/", "loopback"),
        ("http://127.1/", "loopback"),
        ("http://[::ffff:7f00:1]/", "not public"),
        ("http://①②⑦.0.0.1/", "loopback"),
    ],
)
def test_an_address_in_disguise_is_known(written: str, kind: str) -> None:
    url = Webhook.model_validate({"url": written}).url
    assert literal_refusal(url.host or "") == kind


@pytest.mark.parametrize(
    ("webhook", "problem"),
    [
        ({"url": "ftp://example.org/"}, "scheme"),
        ({"url": "file:///etc/passwd"}, "scheme"),
        ({"url": "https://user:secret@example.org/"}, "user or a password"),
        ({"url": "https://user@example.org/"}, "user or a password"),
        ({"url": "https://example.org/#part"}, "fragment"),
        ({"url": "https://"}, "host"),
        ({"url": "https://example.org:70000/"}, "port"),
        ({"url": f"https://example.org/{'a' * 2083}"}, "2083"),
        ({"url": "https://example.org/", "events": []}, "events"),
        ({"url": "https://example.org/", "events": ["job.ended"]}, "job.succeeded"),
        ({"url": "https://example.org/", "event": ["job.failed"]}, "did you mean 'events'"),
        ({}, "url"),
    ],
)
def test_what_is_no_webhook_is_refused(webhook: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Webhook.model_validate(webhook)
