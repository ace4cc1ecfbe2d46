"""What a `Range` asks for of 100 bytes, as a table, and which condition holds."""

from __future__ import annotations

import pytest

from gateway.api.ranges import Unsatisfiable, names, part_of, still
from gateway.domain.call import Span

TAG = '"5f.png"'


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=0-100", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=99-", (99, 100)),
        ("bytes=0-", (0, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-100", (0, 100)),
        ("bytes=-1000", (0, 100)),
        ("  Bytes = 5-6 ", (5, 7)),
    ],
)
def test_a_part(header: str, part: tuple[int, int]) -> None:
    assert part_of(header, 100) == Span(*part)


@pytest.mark.parametrize(
    "header",
    [
        "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5", "bytes=9-5", "bytes=--5",
        "bytes=0-1,5-6", "items=0-5", "bytes=1.5-3", "bytes=\u0661-\u0662", "bytes=+1-3",
        "bytes=" + 19 * "9" + "-",
    ],
)  # fmt: skip
def test_all_of_it_where_the_range_is_not_understood(header: str) -> None:
    assert part_of(header, 100) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=5000-5001"])
def test_nothing_behind_the_end(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        part_of(header, 100)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (TAG, True),
        (f"W/{TAG}", True),
        (f'"a", W/"b",{TAG}', True),
        ("*", True),
        (" * ", True),
        ("", False),
        ('"5f"', False),
        ("5f.png", False),
        ('"a", "b"', False),
    ],
)
def test_a_tag_that_the_client_has(header: str, named: bool) -> None:
    assert names(header, TAG) is named


@pytest.mark.parametrize(
    ("header", "holds"),
    [
        (None, True),
        (TAG, True),
        (f" {TAG} ", True),
        (f"W/{TAG}", False),
        ('"other"', False),
        ("Sun, 22 Nov 2026 12:00:00 GMT", False),
        ("", False),
    ],
)
def test_a_part_of_what_it_was(header: str | None, holds: bool) -> None:
    assert still(header, TAG) is holds
