"""Addresses of machines, and which of them a webhook may be sent to: those of public machines alone."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address
PUBLIC_IPV6 = ip_network("2000::/3")
"""All that is routed over the internet. Outside it are loopback, private and link-local addresses, multicast, and those
that hold an IPv4 address: mapped (`::ffff:0:0/96`) and translated ones (NAT64, `64:ff9b::/96` and `64:ff9b:1::/48`)."""

# The registries of special-purpose addresses (RFC 6890 and later). Python's own `is_global` differs between releases.
SPECIAL = {
    ip_network(network): kind
    for network, kind in {
        "0.0.0.0/8": "of this network",
        "10.0.0.0/8": "private",
        "100.64.0.0/10": "shared by a carrier",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "172.16.0.0/12": "private",
        "192.0.0.0/24": "reserved",
        "192.0.2.0/24": "for documentation",
        "192.88.99.0/24": "of a 6to4 relay",
        "192.168.0.0/16": "private",
        "198.18.0.0/15": "for benchmarks",
        "198.51.100.0/24": "for documentation",
        "203.0.113.0/24": "for documentation",
        "224.0.0.0/4": "multicast",
        "240.0.0.0/4": "reserved",
        "2001::/23": "reserved",  # Teredo among them, which holds an IPv4 address
        "2001:db8::/32": "for documentation",
        "2002::/16": "6to4",
        "3fff::/20": "for documentation",
    }.items()
}


def refusal(address: str) -> str | None:
    """Return the kind of an address that is not public, such as `private`; None for a public one.

    Raises ValueError for what is no address.
    """
    found = ip_address(address)
    if isinstance(found, IPv6Address) and found not in PUBLIC_IPV6:
        return "not public"
    return next((kind for network, kind in SPECIAL.items() if found in network), None)


def literal_refusal(host: str) -> str | None:
    """Return why a URL's host is refused before any name is resolved; None for names, and for public addresses."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return "loopback"
    found = as_address(host)
    return None if found is None else refusal(str(found))


def plain_address(text: str) -> Address | None:
    """Return the address that a text is, an IPv4 one also where it is written as IPv6; None for what is none."""
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return (found.ipv4_mapped if isinstance(found, IPv6Address) else None) or found


def is_loopback(text: str) -> bool:
    """Return whether an address is one of this machine alone; False for names, and for what is no address."""
    found = plain_address(text)
    return found is not None and found.is_loopback


def as_address(host: str) -> Address | None:
    """Return the address that a URL's host is; None for a name."""
    try:
        return ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
