"""Samples of a profile by room: arithmetic on stacks that were made up."""

from __future__ import annotations

from tests.bench.where import LOOP, rooms, table

RAW = """\
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5);answer (gateway/relay/pipeline.py:7) 3
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5);handle (gateway/api/relayed.py:1);dumps (json/__init__.py:2) 5
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5) 1
thread (12): "ledger-writer";work (gateway/stores/sqlite_file.py:9);answer (gateway/relay/pipeline.py:9) 1
take (gateway/protocol.py:1) 2
"""  # noqa: E501


def test_a_sample_is_of_the_room_of_the_innermost_line_of_ours() -> None:
    assert rooms(RAW) == {"relay/pipeline": 4, "api/relayed": 5, LOOP: 1, "protocol": 2}


def test_small_rooms_are_told_together() -> None:
    found = rooms("a (gateway/relay/plan.py:1) 995\nb (gateway/relay/read.py:1) 5")
    assert table(found).splitlines()[2:] == ["| `relay/plan` | 99.5 % |", "| all others | 0.5 % |"]
