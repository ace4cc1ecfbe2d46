"""The C library's search finds what Python's finds."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.relay.search import Search, system_search

NEEDLE = b"\r\n--ab"
CROWDED = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"a", b"b", b"\r\n--", b"\r\n--a", NEEDLE]), max_size=40
).map(b"".join)


@pytest.fixture(scope="module")
def search() -> Search:
    found = system_search()
    if found is None:
        pytest.skip("this system has no memmem")
    return found


@given(content=CROWDED, behind=CROWDED, cut=st.integers(0, 60))
def test_what_is_found_is_what_python_finds(
    search: Search, content: bytes, behind: bytes, cut: int
) -> None:
    """Nor is anything found in what is behind the end."""
    buffer, size = bytearray(content + behind), max(0, len(content) - cut)
    assert search(buffer, NEEDLE, 0, size) == bytes(buffer[:size]).find(NEEDLE)


def test_no_byte_behind_the_buffer_is_looked_at(search: Search) -> None:
    buffer = bytearray(NEEDLE[:-1])
    assert search(buffer, NEEDLE, 0, len(buffer) + 1) == -1
    assert search(bytearray(), NEEDLE, 0, 0) == -1


def test_a_buffer_can_be_used_again_behind_a_search(search: Search) -> None:
    buffer = bytearray(NEEDLE)
    assert search(buffer, NEEDLE, 0, len(buffer)) == 0
    buffer.clear()  # refused while somebody holds its address


@pytest.mark.parametrize("dashes", [4, 40, 196])
def test_no_content_makes_it_slow(search: Search, dashes: int) -> None:
    """A client says both the delimiter and what is searched: no step of it may be long."""
    needle = b"\r\n--" + b"-" * dashes
    for line in (b"-", b"\r", needle[:-1], needle[:4] + b"x" + needle[4:]):
        buffer = bytearray(line * (1_000_000 // len(line)))
        began = time.process_time()
        assert search(buffer, needle, 0, len(buffer)) == -1
        assert time.process_time() - began < 0.2
