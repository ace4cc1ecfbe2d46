"""How file descriptors are shared out."""

from __future__ import annotations

import resource

import pytest

from gateway.descriptors import AT_THE_DOOR, LEDGER, kept_answers, limit, opened, shares


@pytest.mark.parametrize(
    ("of", "used", "connections", "in_flight", "expected"),
    [
        (1_048_576, 30, 10_000, 1000, (10_000, 1000)),
        (20_000, 30, 10_000, 1000, (8889, 1000)),
        (1024, 30, 10_000, 1000, (216, 217)),
        (1024, 30, 50, 1000, (50, 383)),
        (128, 30, 10_000, 1000, (6, 7)),
        (64, 60, 10_000, 1000, (1, 1)),
        (resource.RLIM_INFINITY, 30, 10_000, 1000, (10_000, 1000)),
    ],
)
def test_what_fits(
    of: int, used: int, connections: int, in_flight: int, expected: tuple[int, int]
) -> None:
    found = shares(of, used, connections, in_flight)
    assert (found.connections, found.in_flight) == expected
    if of > 100:
        most = 2 * found.connections + 2 * found.in_flight
        assert used + LEDGER + AT_THE_DOOR + kept_answers(of) + most <= of


def test_what_there_is() -> None:
    assert limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    before = opened()
    with open("/dev/null", "rb"):
        assert opened() == before + 1
