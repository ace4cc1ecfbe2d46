"""What a process uses of its machine, and what is free where it writes."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from gateway import machine
from gateway.machine import Disks, cpu_seconds, memory_bytes


def test_memory_and_processor_time_grow_with_what_is_done() -> None:
    before, spent = memory_bytes(), cpu_seconds()
    held = bytearray(b"x" * 50_000_000)
    assert memory_bytes() - before > 40_000_000
    assert len(held) == 50_000_000
    while cpu_seconds() - spent < 0.05:
        sum(range(10_000))


def test_memory_where_the_system_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = memory_bytes()
    for text in (None, "", "x y"):
        monkeypatch.setattr(machine, "STATM", tmp_path / "statm")
        if text is not None:
            (tmp_path / "statm").write_text(text)
        assert memory_bytes() > said / 2


async def test_a_folder_that_is_gone_keeps_no_other_from_being_told(tmp_path: Path) -> None:
    free = await Disks({"blobs": tmp_path / "gone", "database": tmp_path}).free()
    assert free.keys() == {"database"}
    assert abs(free["database"] - shutil.disk_usage(tmp_path).free) < 10**9


async def test_a_disk_that_hangs_holds_up_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, asked = threading.Event(), list[Path]()
    real = shutil.disk_usage

    def hangs(folder: Path) -> object:
        asked.append(folder)
        hanging.wait(30)
        return real(folder)

    monkeypatch.setattr(machine, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(shutil, "disk_usage", hangs)
    disks = Disks({"blobs": tmp_path})
    try:
        assert [await disks.free() for _ in range(3)] == [{}, {}, {}]
        assert asked == [tmp_path]
    finally:
        hanging.set()
    monkeypatch.setattr(machine, "LOOK_SECONDS", 10)
    async with asyncio.timeout(10):
        assert (await disks.free()).keys() == {"blobs"}
