"""Where the tests' own PostgreSQL keeps its files."""

from __future__ import annotations

from pathlib import Path

from tests.postgres import place


def test_it_is_in_memory_only_where_there_is_enough(tmp_path: Path) -> None:
    assert place(tmp_path, 1) == tmp_path
    assert place(tmp_path, 1 << 60) is None
    assert place(tmp_path / "nowhere", 1) is None
