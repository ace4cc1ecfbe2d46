"""Which way a kept answer gets into a socket: the one that costs this machine less."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from gateway.ports import OpenFile
from gateway.sending import ASKED_AGAIN, LEARNS_FROM_BYTES, REMEMBERED, Sender
from tests.processes import wait_until

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
CONTENT = os.urandom(100_000)


@dataclass
class Machine:
    """Says what each way costs, and which one was gone."""

    pages_ns: int = 1
    bytes_ns: int = 1
    spent_ns: int = 0
    ways: list[str] = field(default_factory=list)

    def cpu_ns(self) -> int:
        return self.spent_ns


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    seen, sendfile, writev, write = Machine(), os.sendfile, os.writev, os.write

    def pages(out: int, source: int, offset: int, count: int) -> int:
        seen.ways.append("pages")
        seen.spent_ns += seen.pages_ns
        return sendfile(out, source, offset, count)

    def copied(out: int, parts: tuple[bytes, memoryview]) -> int:
        seen.ways.append("bytes")
        seen.spent_ns += seen.bytes_ns
        return writev(out, parts)

    def written(out: int, part: bytes | memoryview) -> int:
        if isinstance(part, memoryview):
            seen.ways.append("bytes")
            seen.spent_ns += seen.bytes_ns
        return write(out, part)

    monkeypatch.setattr(os, "sendfile", pages)
    monkeypatch.setattr(os, "writev", copied)
    monkeypatch.setattr(os, "write", written)
    return seen


@dataclass
class Wire:
    """A socket that takes what fits, and who reads it."""

    out: socket.socket
    reader: socket.socket

    @property
    def held(self) -> int:
        """Bytes that the system has yet to let go of."""
        return int(struct.unpack("i", fcntl.ioctl(self.out, termios.TIOCOUTQ, b"\0" * 4))[0])

    def read(self, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            got += self.reader.recv(size - len(got))
        return bytes(got)


@pytest.fixture
def wire() -> Iterator[Wire]:
    out, reader = socket.socketpair()
    with closing(out), closing(reader):
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        out.setblocking(False)
        reader.settimeout(10)
        yield Wire(out, reader)


def in_memory(content: bytes = CONTENT) -> OpenFile:
    file = OpenFile(os.memfd_create("kept", os.MFD_CLOEXEC))
    assert os.pwrite(file.fd, content, 0) == len(content)
    file.content = mmap.mmap(file.fd, 0, prot=mmap.PROT_READ)
    return file


def send(sender: Sender, wire: Wire, file: OpenFile, times: int = 1) -> None:
    """All of it, as it stands, whatever way it goes."""
    for _ in range(times):
        wait_until(lambda: wire.held == 0, "the system has let go of what was read")
        sent = sender.send(wire.out.fileno(), HEAD, file, 0, len(CONTENT))
        assert wire.read(sent) == (HEAD + CONTENT)[:sent]
        assert sent == len(HEAD) + len(CONTENT)


@pytest.mark.parametrize(
    ("pages_ns", "bytes_ns", "cheaper", "dearer"),
    [(900, 500, "bytes", "pages"), (500, 900, "pages", "bytes")],
)
def test_the_cheaper_way_is_gone_once_both_are_known(
    machine: Machine, wire: Wire, pages_ns: int, bytes_ns: int, cheaper: str, dearer: str
) -> None:
    machine.pages_ns, machine.bytes_ns = pages_ns, bytes_ns
    sender, file = Sender(machine.cpu_ns), in_memory()
    send(sender, wire, file, 2 * REMEMBERED)
    assert sorted(machine.ways) == ["bytes"] * REMEMBERED + ["pages"] * REMEMBERED
    machine.ways.clear()
    send(sender, wire, file, 4 * ASKED_AGAIN)
    assert machine.ways.count(dearer) == 4
    assert machine.ways.count(cheaper) == 4 * ASKED_AGAIN - 4


def test_a_machine_that_changes_is_noticed(machine: Machine, wire: Wire) -> None:
    machine.pages_ns, machine.bytes_ns = 900, 500
    sender, file = Sender(machine.cpu_ns), in_memory()
    send(sender, wire, file, 2 * REMEMBERED + 5)
    assert machine.ways[-1] == "bytes"
    machine.bytes_ns = 2_000
    send(sender, wire, file, REMEMBERED)
    machine.ways.clear()
    send(sender, wire, file, ASKED_AGAIN)
    assert machine.ways.count("pages") >= ASKED_AGAIN - 2


def test_one_that_was_put_off_once_decides_nothing(machine: Machine, wire: Wire) -> None:
    machine.pages_ns, machine.bytes_ns = 900, 500
    sender, file = Sender(machine.cpu_ns), in_memory()
    send(sender, wire, file, 2 * REMEMBERED)
    machine.bytes_ns = 1_000_000
    send(sender, wire, file)
    machine.bytes_ns = 500
    machine.ways.clear()
    send(sender, wire, file, 20)
    assert machine.ways == ["bytes"] * 20


def test_small_sends_teach_nothing(machine: Machine, wire: Wire) -> None:
    sender, file = Sender(machine.cpu_ns), in_memory()
    for _ in range(4 * REMEMBERED):
        sent = sender.send(wire.out.fileno(), HEAD, file, 5, LEARNS_FROM_BYTES - 100)
        assert wire.read(sent) == HEAD + CONTENT[5 : 5 + LEARNS_FROM_BYTES - 100]
    assert machine.ways.count("bytes") == machine.ways.count("pages")


def test_a_file_that_nothing_maps_goes_by_its_pages(machine: Machine, wire: Wire) -> None:
    file = in_memory()
    file.content = None
    send(Sender(machine.cpu_ns), wire, file, 30)
    assert machine.ways == ["pages"] * 30


@pytest.mark.parametrize("mapped", [True, False])
def test_a_socket_that_is_full_says_so(wire: Wire, *, mapped: bool) -> None:
    sender, file = Sender(), in_memory(os.urandom(4_000_000))
    if not mapped:
        file.content = None
    sent = sender.send(wire.out.fileno(), HEAD, file, 0, 4_000_000)
    assert len(HEAD) < sent < 4_000_000
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sender.send(wire.out.fileno(), b"", file, sent - len(HEAD), 4_000_000)
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            sender.send(wire.out.fileno(), b"", file, sent - len(HEAD), 4_000_000)
    got = wire.read(sent)
    assert got[: len(HEAD)] == HEAD
    assert got[len(HEAD) :] == os.pread(file.fd, sent - len(HEAD), 0)


def test_where_pages_cannot_be_sent_the_head_is_not_sent_twice(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "not of this file system")

    monkeypatch.setattr(os, "sendfile", refuse)
    file = in_memory()
    file.content = None
    sender = Sender()
    assert sender.send(wire.out.fileno(), HEAD, file, 0, len(CONTENT)) == len(HEAD)
    assert wire.read(len(HEAD)) == HEAD
    with pytest.raises(OSError, match="not of this file system"):
        sender.send(wire.out.fileno(), b"", file, 0, len(CONTENT))
