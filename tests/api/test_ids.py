"""A request's name is its own, in every process."""

from __future__ import annotations

import re
import subprocess
import sys

from gateway.api.ids import BLOCK_BYTES, RANDOM_BYTES, RequestIds
from gateway.clock import SystemClock
from tests.clock import StillClock


def test_ids_are_random_over_the_ends_of_blocks() -> None:
    ids, other = RequestIds(SystemClock()), RequestIds(SystemClock())
    many = [ids.new() for _ in range(3 * BLOCK_BYTES // RANDOM_BYTES + 1)]
    assert all(re.fullmatch("req_[0-9a-f]{24}", one) for one in many)
    assert len({*many, *(other.new() for _ in many)}) == 2 * len(many)


def test_ids_of_one_time_are_neighbours_in_an_index() -> None:
    clock = StillClock()
    ids = RequestIds(clock)
    first = ids.new()
    clock.advance(1)
    assert first[:12] == f"req_{int(clock.now().timestamp()) - 1:08x}"
    assert first < ids.new()


FORKED = """
import os
from gateway.api.ids import RequestIds
from gateway.clock import SystemClock

ids = RequestIds(SystemClock())
ids.new()
child = os.fork()
os.write(1, "".join(f"{ids.new()} " for _ in range(10)).encode())
if child:
    os.waitpid(child, 0)
"""


def test_a_forked_process_gives_names_of_its_own() -> None:
    """In a process of its own: one with threads should not fork."""
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, check=True)
    found = ended.stdout.decode().split()
    assert len(found) == len(set(found)) == 20
