"""Settlements that the ledger could not take, on disk until it does (money.md 6a).

One append-only file a process, made when it is first needed and removed when nothing waits in it::

    data/settlements/<worker>.jsonl
      {"rid": "req_1", "event": "settle", "cost": 5895000, ...}    kept, durable
      {"settled": "req_1"}                                         the ledger has it

Its owner holds it by ``flock``, so a file that can be locked was left by a process that is gone,
and whoever locks it first takes it over. Settling is idempotent by rid: a line that is posted
again, because the mark behind it was lost, changes nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gateway.domain.call import SvgUsage, Usage
from gateway.domain.ledger import Basis, Event, Outcome, Part, Settlement
from gateway.ports import StoreError
from gateway.stores.rows import part_row

SUFFIX = ".jsonl"
CLOSE_SECONDS = 5.0
log = logging.getLogger(__name__)


class SettlementSafe:
    """``Safe`` in a folder. All of its file work is done by one thread, in the order it came."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, "settlements")
        self._own: _File | None = None
        self._inherited: list[_File] = []
        self._queue: list[_Note] = []
        self._writing: asyncio.Task[None] | None = None
        self._taking: asyncio.Future[list[Settlement]] | None = None

    @classmethod
    def open(cls, folder: Path, worker: str) -> SettlementSafe:
        """Raises ``StoreError`` where the folder cannot be made or written."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if os.access(folder, os.W_OK | os.X_OK):
                return cls(folder, worker)
            reason = "no permission"
        raise StoreError(
            f"ledger.spool {folder} cannot be written ({reason}): make it writable for this user, "
            "or name another folder"
        )

    async def keep(self, settlement: Settlement) -> None:
        await self._note(_Note(settlement.rid, encode(settlement)))

    async def settled(self, rid: str) -> None:
        busy = self._writing is not None and not self._writing.done()
        if busy or self._own is not None or self._inherited:
            await self._note(_Note(rid))

    async def left_behind(self) -> list[Settlement]:
        """A caller that is cancelled meanwhile leaves what was found to the next one."""
        if self._taking is None:
            loop = asyncio.get_running_loop()
            self._taking = loop.run_in_executor(self._thread, self._take_over)
        found = await asyncio.shield(self._taking)
        self._taking = None
        return found

    async def aclose(self) -> None:
        """What still waits stays on disk, for whoever starts next. A disk that hangs is waited for
        with an end."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._writing is not None:
                    await asyncio.shield(self._writing)
                await asyncio.get_running_loop().run_in_executor(self._thread, self._let_go)
        except TimeoutError:
            log.error(
                "the disk of ledger.spool does not answer", extra={"folder": str(self._folder)}
            )
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _note(self, note: _Note) -> None:
        """Waits for a note to be written. One whose caller is cancelled is written all the same."""
        self._queue.append(note)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_all())
        await asyncio.shield(note.written)

    async def _write_all(self) -> None:
        """Whatever has come while the disk was busy goes there together, with one fdatasync."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            error = await loop.run_in_executor(self._thread, self._write, batch)
            for note in batch:
                if error is not None and note.line:
                    note.written.set_exception(error)
                    note.written.exception()  # A caller that was cancelled never asks.
                else:
                    note.written.set_result(None)

    def _write(self, batch: list[_Note]) -> OSError | None:
        """The error that none of the batch's settlements is kept for. A mark has none: where it
        cannot be written, the settlement is only posted again."""
        failed = None
        if kept := [note for note in batch if note.line]:
            try:
                if self._own is None:
                    self._own = _make(self._folder, self._worker)
                self._own.append(b"".join(note.line for note in kept))
                self._own.waiting.update(note.rid for note in kept)
            except OSError as error:
                failed = error
        for note in batch:
            if not note.line:
                for file in self._files():
                    file.mark(note.rid)
        self._remove_what_is_done()
        return failed

    def _files(self) -> list[_File]:
        return [*self._inherited, *([self._own] if self._own is not None else [])]

    def _remove_what_is_done(self) -> None:
        self._inherited = [file for file in self._inherited if not file.remove_if_done()]
        if self._own is not None and self._own.remove_if_done():
            self._own = None

    def _take_over(self) -> list[Settlement]:
        found: list[Settlement] = []
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                taken = _take(path)
            except OSError as error:
                log.error(
                    "settlements that were left behind cannot be read",
                    extra={"file": str(path), "error": str(error)},
                )
                continue
            if taken is not None:
                file, settlements = taken
                self._inherited.append(file)
                found += settlements
        self._remove_what_is_done()
        return found

    def _let_go(self) -> None:
        self._remove_what_is_done()
        for file in self._files():
            file.close()


@dataclass(slots=True)
class _Note:
    """One line to be written; without ``line`` a mark that ``rid`` is settled."""

    rid: str
    line: bytes = b""
    written: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class _File:
    """A file that this process holds. ``waiting`` are the rids whose settlement is in it.

    ``damaged``: it has lines that cannot be read, so it is never removed: a person has to look.
    ``torn``: its last line has no end.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.waiting: set[str] = set()
        self.damaged = False
        self.torn = False
        self._descriptor = descriptor

    def read(self) -> bytes:
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def append(self, lines: bytes) -> None:
        """Durable when it returns. Raises ``OSError``, and then nothing of it is left."""
        length, torn = os.fstat(self._descriptor).st_size, self.torn
        try:
            self._write(lines)
            os.fdatasync(self._descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, length)
                self.torn = torn
            raise

    def mark(self, rid: str) -> None:
        """Says that a settlement is in the ledger; harmless where it is not in this file."""
        if rid not in self.waiting:
            return
        self.waiting.remove(rid)
        if self.waiting or self.damaged:
            with suppress(OSError):
                self._write(_line({"settled": rid}))

    def remove_if_done(self) -> bool:
        """Removes and closes a file with nothing left in it."""
        if self.waiting or self.damaged:
            return False
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.error(
                "a file whose settlements are all posted cannot be removed",
                extra={"file": str(self.path), "error": str(error)},
            )
        self.close()
        return True

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, lines: bytes) -> None:
        rest = memoryview(b"\n" + lines if self.torn else lines)
        self.torn = True
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self.torn = False


def _make(folder: Path, worker: str) -> _File:
    """A new file, held, its name durable. Raises ``OSError``."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{quote(worker, safe='')}{SUFFIX}"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.fstat(descriptor).st_nlink:
                # Between the two calls it was taken for an empty one of the dead, and removed.
                os.close(descriptor)
                continue
            _sync_folder(folder)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return _File(path, descriptor)


def _take(path: Path) -> tuple[_File, list[Settlement]] | None:
    """A file of a process that is gone and what waits in it; None for one that somebody holds.
    Raises ``OSError``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not os.fstat(descriptor).st_nlink
        file = _File(path, descriptor)
        *lines, rest = file.read().split(b"\n")
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    if gone:
        os.close(descriptor)
        return None
    waiting: dict[str, Settlement] = {}
    for number, line in enumerate(lines, 1):
        try:
            _apply(line, waiting)
        except (ValueError, RecursionError) as error:
            file.damaged = True
            log.error(
                "a settlement that was left behind cannot be read; its file is kept",
                extra={"file": str(path), "line": number, "error": str(error)},
            )
    if rest:
        file.torn = True
        try:
            _apply(rest, waiting)
        except (ValueError, RecursionError):
            # Nobody was told that it is kept, so the hold is all that there is of it.
            log.warning(
                "a process died while it was keeping a settlement; its hold expires at the bound",
                extra={"file": str(path)},
            )
    file.waiting.update(waiting)
    return file, list(waiting.values())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply(line: bytes, waiting: dict[str, Settlement]) -> None:
    """Adds what a line says to what waits. Raises ``ValueError``."""
    if not line:
        return
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    if "settled" in value:
        if not isinstance(value["settled"], str):
            raise ValueError("it names no request")
        waiting.pop(value["settled"], None)
        return
    settlement = decode(value)
    waiting[settlement.rid] = settlement


def encode(settlement: Settlement) -> bytes:
    """A settlement as one line."""
    return _line(
        {
            "rid": settlement.rid,
            "event": settlement.event,
            "outcome": settlement.outcome,
            "basis": settlement.basis,
            "cost": settlement.cost,
            "usage": asdict(settlement.usage),
            "images": settlement.images,
            "flags": settlement.flags,
            "at": None if settlement.at is None else settlement.at.isoformat(),
            "drawn": None if settlement.drawn is None else asdict(settlement.drawn),
        }
    )


def decode(value: Mapping[str, Any]) -> Settlement:
    """A settlement from the object of its line; members of a newer version are passed over.

    Raises ``ValueError``.
    """
    try:
        at, drawn = value["at"], value.get("drawn")
        settlement = Settlement(
            rid=value["rid"],
            event=Event(value["event"]),
            outcome=Outcome(value["outcome"]),
            basis=Basis(value["basis"]),
            cost=value["cost"],
            usage=_usage(value["usage"]),
            images=value["images"],
            flags=tuple(value["flags"]),
            at=None if at is None else datetime.fromisoformat(at),
            drawn=None if drawn is None else _part(drawn),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no settlement of this version: {error!r}") from error
    numbers = (value["cost"], value["images"], *part_row(settlement.drawn)[1:])
    if not isinstance(value["rid"], str) or any(type(one) is not int for one in numbers):
        raise ValueError("it is no settlement of this version")
    return settlement


def _usage(value: Mapping[str, Any]) -> Usage:
    usage = _known(Usage, value)
    svg = usage.get("svg")
    return Usage(**{**usage, "svg": svg and SvgUsage(**_known(SvgUsage, svg))})


def _part(value: Mapping[str, Any]) -> Part:
    if not isinstance(value["model"], str):
        raise TypeError("the model of a part")
    return Part(value["model"], value["images"], value["cost"], _usage(value["usage"]))


def _known(noun: type[Usage | SvgUsage], value: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(noun)}
    return {name: member for name, member in value.items() if name in names}


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
