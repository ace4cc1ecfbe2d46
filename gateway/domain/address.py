"""Where keys and pictures are never sent: addresses of this machine's own surroundings."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

METADATA: Final = frozenset(
    {ip_address("169.254.169.254"), ip_address("fd00:ec2::254"), ip_address("100.100.100.200")}
)
"""The metadata services of clouds: whoever asks there may be given the machine's credentials."""
_NAT64: Final = IPv6Network("64:ff9b::/96")


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """A host's address, an IPv4 one taken out of its wrappings; None where it is a name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_never_an_upstream(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is link-local, multicast, empty, or a cloud's metadata service."""
    return (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address in METADATA
    )
