"""Settlements on disk: kept whole, taken over once, and gone only when the ledger has them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from gateway.domain.call import SvgUsage, Usage
from gateway.domain.ledger import Basis, Event, Outcome, Part, Settlement
from gateway.ports import StoreError
from gateway.stores import safe as module
from gateway.stores.safe import SettlementSafe, decode, encode

AT = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
ONE = Settlement(
    "req_1", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 5_895_000, Usage(7, text_out=3), 1,
    ("soft",), AT,
)  # fmt: skip
TWO = replace(ONE, rid="req_2", cost=2)


@asynccontextmanager
async def opened(folder: Path, worker: str = "host/1/abcd") -> AsyncIterator[SettlementSafe]:
    safe = SettlementSafe.open(folder, worker)
    try:
        yield safe
    finally:
        await safe.aclose()


async def found(folder: Path) -> list[Settlement]:
    """What a new process would take over; it is left where it was."""
    async with opened(folder, "host/2/looks") as safe:
        return await safe.left_behind()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def leave(folder: Path, *settlements: Settlement) -> Path:
    """A file that nobody holds any more."""
    async with opened(folder) as safe:
        for settlement in settlements:
            await safe.keep(settlement)
    [path] = files(folder)
    return path


# What is kept


numbers = st.integers(0, 2**70)
usages = st.builds(
    Usage,
    *[numbers] * 6,
    svg=st.none() | st.builds(SvgUsage, st.text(), numbers, numbers),
)
settlements = st.builds(
    Settlement,
    rid=st.text(),
    event=st.sampled_from(Event),
    outcome=st.sampled_from(Outcome),
    basis=st.sampled_from(Basis),
    cost=numbers.map(lambda cost: cost + 2**70),
    usage=usages,
    images=st.integers(0, 10),
    flags=st.lists(st.sampled_from(["soft", "no_usage", "over_bound"])).map(tuple),
    at=st.none() | st.datetimes(timezones=st.just(UTC)),
    drawn=st.none() | st.builds(Part, st.text(min_size=1), numbers, numbers, usages),
)


@bounded(max_examples=200)
@given(settlements)
def test_a_settlement_comes_back_as_it_went(settlement: Settlement) -> None:
    line = encode(settlement)
    assert line.index(b"\n") == len(line) - 1
    assert decode(json.loads(line)) == settlement


def test_no_member_of_the_nouns_is_left_out() -> None:
    value = json.loads(encode(replace(ONE, drawn=Part("flare"))))
    assert value.keys() == {one.name for one in fields(Settlement)}
    assert value["usage"].keys() == {one.name for one in fields(Usage)}
    assert value["drawn"].keys() == {one.name for one in fields(Part)}
    # What an earlier release left behind knows of no part.
    before = json.loads(encode(ONE))
    assert before.pop("drawn") is None
    assert decode(before) == ONE


@pytest.mark.parametrize(
    "wrong",
    [
        {"cost": ONE.cost + 1},
        {"cost": -1},
        {"cost": "1"},
        {"cost": True},
        {"images": 1.5},
        {"model": 1},
        {"usage": None},
    ],
)
def test_a_part_that_cannot_be_is_no_settlement(wrong: dict[str, object]) -> None:
    value = json.loads(encode(replace(ONE, drawn=Part("flare", 1, 1))))
    value["drawn"] |= wrong
    with pytest.raises(ValueError, match=r"part of the cost|no settlement"):
        decode(value)


async def test_a_process_that_is_gone_leaves_what_it_kept(tmp_path: Path) -> None:
    folder = tmp_path / "settlements"
    path = await leave(folder, ONE, TWO)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert path.name == "host%2F1%2Fabcd.jsonl"
    assert await found(folder) == [ONE, TWO]
    assert await found(folder) == [ONE, TWO], "looking takes nothing away"


async def test_what_is_settled_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as safe:
        assert files(tmp_path) == []
        await safe.keep(ONE)
        await safe.keep(TWO)
        await safe.settled("req_1")
        await safe.settled("req_unheard_of")
        [path] = files(tmp_path)
        assert path.read_bytes().endswith(b'{"settled":"req_1"}\n')
        await safe.settled("req_2")
        assert files(tmp_path) == []
        await safe.keep(ONE)
        assert len(files(tmp_path)) == 1
    assert await found(tmp_path) == [ONE]


async def test_a_mark_counts_after_a_death_too(tmp_path: Path) -> None:
    async with opened(tmp_path) as safe:
        await safe.keep(ONE)
        await safe.keep(TWO)
        await safe.settled("req_1")
    assert await found(tmp_path) == [TWO]


async def test_what_is_taken_over_is_marked_in_its_own_file(tmp_path: Path) -> None:
    await leave(tmp_path, ONE, TWO)
    async with opened(tmp_path, "second") as second:
        assert await second.left_behind() == [ONE, TWO]
        assert await second.left_behind() == [], "once"
        await second.keep(replace(ONE, rid="req_3"))
        assert len(files(tmp_path)) == 2
        await second.settled("req_1")
        assert len(files(tmp_path)) == 2
        await second.settled("req_2")
        assert [path.name for path in files(tmp_path)] == ["second.jsonl"]
    assert [one.rid for one in await found(tmp_path)] == ["req_3"]


async def test_who_takes_over_may_die_too(tmp_path: Path) -> None:
    await leave(tmp_path, ONE, TWO)
    async with opened(tmp_path, "second") as second:
        await second.left_behind()
        await second.settled("req_1")
    assert await found(tmp_path) == [TWO]


async def test_the_file_of_a_living_process_is_its_own(tmp_path: Path) -> None:
    async with opened(tmp_path, "first") as first, opened(tmp_path, "second") as second:
        await first.keep(ONE)
        assert await first.left_behind() == await second.left_behind() == []


async def test_of_many_that_start_at_once_one_takes_a_file(tmp_path: Path) -> None:
    for number in range(20):
        async with opened(tmp_path, f"dead-{number}") as dead:
            await dead.keep(replace(ONE, rid=f"req_{number}"))
    everyone = [SettlementSafe.open(tmp_path, f"heir-{number}") for number in range(8)]
    taken = await asyncio.gather(*(safe.left_behind() for safe in everyone))
    assert sorted(one.rid for some in taken for one in some) == sorted(
        f"req_{number}" for number in range(20)
    )
    for safe, some in zip(everyone, taken, strict=True):
        await asyncio.gather(*(safe.settled(one.rid) for one in some))
        await safe.aclose()
    assert files(tmp_path) == []


def test_making_and_taking_over_do_not_meet(tmp_path: Path) -> None:
    """A file that is just being made looks like an empty one of the dead."""
    made = []

    def make(number: int) -> None:
        for turn in range(200):
            file = module._make(tmp_path, f"maker-{number}-{turn}")
            file.append(encode(replace(ONE, rid=f"req_{number}_{turn}")))
            assert file.path.read_bytes(), "what is written is written into a file with a name"
            file.waiting.add("x")
            made.append(file)

    def take() -> None:
        while not done:
            for path in tmp_path.glob("*.jsonl"):
                if (taken := module._take(path)) is not None:
                    file, settlements = taken
                    assert settlements == []
                    assert file.remove_if_done()

    done: list[bool] = []
    with ThreadPoolExecutor(4) as at_once:
        takers = [at_once.submit(take) for _ in range(2)]
        makers = [at_once.submit(make, number) for number in range(2)]
        try:
            for one in makers:
                one.result(60)
        finally:
            done.append(True)
        for one in takers:
            one.result(60)
    assert len(files(tmp_path)) == len(made) == 400
    for file in made:
        file.close()


async def test_many_at_once_share_their_fdatasync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fdatasync

    def count(descriptor: int) -> None:
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    async with opened(tmp_path) as safe:
        await asyncio.gather(*(safe.keep(replace(ONE, rid=f"req_{n}")) for n in range(200)))
        assert 1 <= len(synced) <= 3
    assert len(await found(tmp_path)) == 200


# Deaths and damage


@pytest.mark.parametrize("whole", [1, 2])
async def test_a_death_at_any_byte(tmp_path: Path, whole: int) -> None:
    """Every length that a file can have been cut to: what was whole is there, and more can be
    written behind what was not."""
    path = await leave(tmp_path, *(ONE, TWO)[:whole])
    text = path.read_bytes()
    begins = len(encode(ONE)) * (whole - 1)
    for length in range(begins, len(text) + 1):
        path.write_bytes(text[:length])
        async with opened(tmp_path, "heir") as heir:
            there = await heir.left_behind()
            # The last line without its end is whole too.
            count = whole if length >= len(text) - 1 else whole - 1
            assert there == [ONE, TWO][:count]
            assert path.exists() == bool(there)
            if len(there) == 2:
                await heir.settled("req_1")
        if path.exists():
            assert await found(tmp_path) == ([TWO] if len(there) == 2 else there)


async def test_members_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    path = await leave(tmp_path, ONE)
    value = json.loads(path.read_bytes())
    value |= {"news": {"a": 1}, "usage": {**value["usage"], "audio_out": 3}}
    path.write_text(json.dumps(value) + "\n")
    assert await found(tmp_path) == [ONE]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\x00\x00\x00",
        b"\xff",
        b"{}",
        b'{"settled":[]}',
        b"[" * 100_000,
        encode(ONE).strip().replace(b'"settle"', b'"teleport"'),
        encode(ONE).strip().replace(b"5895000", b"0.5"),
        encode(ONE).strip().replace(b'"req_1"', b"1"),
        encode(ONE).strip().replace(b"2026-11-22", b"yesterday"),
    ],
)
async def test_a_file_that_cannot_be_read_is_kept(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dead.jsonl"
    path.write_bytes(encode(ONE) + line + b"\n" + encode(TWO))
    async with opened(tmp_path, "heir") as heir:
        assert await heir.left_behind() == [ONE, TWO]
        assert "cannot be read; its file is kept" in caplog.text
        await heir.settled("req_1")
        await heir.settled("req_2")
        assert line in path.read_bytes()
    caplog.clear()
    assert await found(tmp_path) == []
    assert line in path.read_bytes()
    assert "cannot be read; its file is kept" in caplog.text


async def test_what_was_found_waits_for_somebody_who_waits(tmp_path: Path) -> None:
    await leave(tmp_path, ONE)
    async with opened(tmp_path, "heir") as heir:
        impatient = asyncio.create_task(heir.left_behind())
        await asyncio.sleep(0)
        impatient.cancel()
        assert await heir.left_behind() == [ONE]
        assert await heir.left_behind() == []


async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is written, then nothing more: the half is taken back."""
    real, budget = os.write, [len(encode(ONE)) + 40]

    def write(descriptor: int, data: bytes) -> int:
        if not budget[0]:
            raise OSError(28, "No space left on device")
        part = bytes(data[: budget[0]])
        budget[0] -= len(part)
        return real(descriptor, part)

    async with opened(tmp_path) as safe:
        monkeypatch.setattr(os, "write", write)
        await safe.keep(ONE)
        with pytest.raises(OSError, match="No space"):
            await safe.keep(TWO)
        [path] = files(tmp_path)
        assert path.read_bytes() == encode(ONE)
        budget[0] = 10_000
        await safe.keep(TWO)
    assert await found(tmp_path) == [ONE, TWO]


async def test_a_full_disk_that_cannot_even_take_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def refuse(*_: int) -> None:
        raise OSError(5, "Input/output error")

    def write_a_little(descriptor: int, data: bytes) -> int:
        if len(data) < len(encode(TWO)):
            refuse()
        return real(descriptor, data[:9])

    async with opened(tmp_path) as safe:
        await safe.keep(ONE)
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", refuse)
            patch.setattr(os, "write", write_a_little)
            with pytest.raises(OSError, match="Input/output"):
                await safe.keep(TWO)
        await safe.keep(replace(TWO, rid="req_3"))
    assert [one.rid for one in await found(tmp_path)] == ["req_1", "req_3"]


async def test_a_folder_that_went_away_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "settlements"
    async with opened(folder) as safe:
        folder.rmdir()
        await safe.keep(ONE)
    assert await found(folder) == [ONE]


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"^ledger\.spool .*/file/settlements cannot be written"):
        SettlementSafe.open(tmp_path / "file" / "settlements", "w")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        async with opened(folder) as safe:
            kept = 0
            with suppress(OSError):
                while True:
                    await safe.keep(replace(ONE, rid=f"req_{kept}"))
                    kept += 1
            with pytest.raises(OSError, match="No space"):
                await safe.keep(TWO)
            assert kept > 100
            await safe.settled("req_0")
        assert len(await found(folder)) in (kept - 1, kept), "a mark may have had no room"
        async with opened(folder, "heir") as heir:
            for one in await heir.left_behind():
                await heir.settled(one.rid)
        assert files(folder) == []


KEEPER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from gateway.stores.safe import SettlementSafe
from tests.stores.test_safe import ONE

async def main():
    safe = SettlementSafe.open(Path(sys.argv[1]), sys.argv[2])
    number = 0
    while True:
        rid = f"{sys.argv[2]}_{number}"
        await safe.keep(replace(ONE, rid=rid))
        sys.stdout.write(rid + "\\n")
        sys.stdout.flush()
        if number % 3 == 2:
            await safe.settled(f"{sys.argv[2]}_{number - 1}")
        number += 1

asyncio.run(main())
"""


def test_kill_9_while_it_writes(tmp_path: Path) -> None:
    """What was said to be kept is there, or was settled; nothing is damaged."""
    folder = tmp_path / "settlements"
    acknowledged: list[str] = []
    for turn in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", KEEPER, str(folder), f"p{turn}"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(50 + turn)]
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.read().split()
    settled = set()
    for rid in acknowledged:
        name, _, number = rid.partition("_")
        if int(number) % 3 == 2:
            settled.add(f"{name}_{int(number) - 1}")
    there = {one.rid for one in asyncio.run(found(folder))}
    assert set(acknowledged) - there <= settled
    # One mark and one settlement may have been written that nobody could be told of.
    assert len(there - (set(acknowledged) - settled)) <= 2 * 4
