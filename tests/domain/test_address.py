"""Where keys and pictures are never sent."""

from __future__ import annotations

import pytest

from gateway.domain.address import address_of, is_never_an_upstream


@pytest.mark.parametrize(
    ("host", "never"),
    [
        ("169.254.169.254", True),
        ("169.254.0.1", True),
        ("::ffff:169.254.169.254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("2002:a9fe:a9fe::1", True),
        ("fe80::1", True),
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("100.100.100.200", True),
        ("0.0.0.0", True),
        ("::", True),
        ("224.0.0.1", True),
        ("ff02::1", True),
        ("127.0.0.1", False),
        ("::1", False),
        ("10.1.2.3", False),
        ("100.100.100.201", False),
        ("192.168.0.1", False),
        ("fd00:ec2::253", False),
        ("104.18.7.192", False),
        ("2606:4700::6812:7c0", False),
    ],
)
def test_an_address(host: str, never: bool) -> None:
    address = address_of(host)
    assert address is not None
    assert is_never_an_upstream(address) is never


@pytest.mark.parametrize("host", ["api.openai.com", "localhost", "", "1.2.3", "metadata"])
def test_a_name(host: str) -> None:
    assert address_of(host) is None
