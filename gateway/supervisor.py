"""Several worker processes on one listening socket: started, replaced, and told to end together.

Each worker inherits the sockets and one end of a *lifeline*: it says there that it serves, and
learns there, by its end, that the supervisor is gone (`kill -9` too), upon which it drains and
ends. It also says there when it is full, and hears whether another one has room: then it leaves
who comes to that one. A worker is in a process group of its own, so that Ctrl-C reaches it once,
through here.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import multiprocess

from gateway.ports import Clock

log = logging.getLogger(__name__)

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
METRICS_PREFIX = "gateway-workers-"
SERVING = b"serving\n"
FULL, ROOM = b"+", b"-"
"""Of a worker: that it can take no more connections, and that it can again."""
REST, WAKE = b"0", b"1"
"""To one that is full: that another one has room, and that none has."""
QUICK_SECONDS = 5.0
"""A worker that ends before it has served for so long has died at once."""
MAX_QUICK_DEATHS = 3
"""So many of them, one after the other, end the gateway, unless another worker serves."""
BACK_OFF_SECONDS = 0.5
MAX_BACK_OFF_SECONDS = 30.0
RETRY_SECONDS = 5.0
KILL_SECONDS = 5.0
"""How long a worker may take to obey the second signal."""
REFUSED = 2
"""The exit code of a start that the configuration has to mend: another try cannot help."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker is given: its number, its lifeline, and the sockets to listen on."""

    number: int
    lifeline: socket.socket
    sockets: tuple[socket.socket, ...]

    @classmethod
    def parse(cls, text: str) -> Inheritance:
        """From the worker's command line: ``number,lifeline,socket...``, as descriptors."""
        number, lifeline, *rest = (int(part) for part in text.split(","))
        sockets = tuple(socket.socket(fileno=descriptor) for descriptor in rest)
        for one in sockets:
            one.setblocking(False)
        return cls(number, socket.socket(fileno=lifeline), sockets)

    def serve(
        self, end: Callable[[], None], *, rest: Callable[[], None], wake: Callable[[], None]
    ) -> None:
        """Says that this worker serves. ``end`` is called when the supervisor is gone, ``rest`` and
        ``wake`` where this worker is full: while another one has room, and when none has."""
        loop = asyncio.get_running_loop()

        def heard() -> None:
            try:
                said = self.lifeline.recv(64)
            except BlockingIOError:
                return
            except OSError:
                said = b""
            if not said:
                loop.remove_reader(self.lifeline)
                log.error("the supervisor is gone: this worker ends")
                end()
            else:
                (wake if said.endswith(WAKE) else rest)()

        self.lifeline.setblocking(False)
        with suppress(OSError):
            self.lifeline.send(SERVING)
        loop.add_reader(self.lifeline, heard)

    def say_full(self, is_full: bool) -> None:
        with suppress(OSError):
            self.lifeline.send(FULL if is_full else ROOM)


@dataclass(slots=True)
class _Worker:
    """``deaths`` are those of its predecessors, one after the other, that died at once."""

    number: int
    pid: int
    lifeline: socket.socket
    deaths: int
    serves_since: float | None = None
    reads_again: bool = False
    is_full: bool = False


class Supervisor:
    """Runs ``command`` as ``count`` workers, each with its inheritance as the last argument.

    ``on_serving`` is called when the first worker serves; the others start behind it, so that one
    alone brings the database up to date and makes what is made once.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        sockets: Sequence[socket.socket],
        clock: Clock,
        on_serving: Callable[[], None],
    ) -> None:
        self._command = tuple(command)
        self._count = count
        self._sockets = tuple(sockets)
        self._clock = clock
        self._on_serving = on_serving
        self._workers: dict[int, _Worker] = {}
        self._served = False
        self._stopping = False
        self._told_twice = False
        self._exit_code = 0
        self._metrics = Path()
        self._over = asyncio.Event()

    async def run(self) -> int:
        """Until all workers have ended; the exit code: 0 after a drain, that of a worker that
        cannot be started, 128 and the signal's number for a second signal."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on)
        with _metrics_folder() as folder:
            self._metrics = folder
            self._start(0)
            await self._over.wait()
        return self._exit_code

    def _start(self, number: int, deaths: int = 0) -> None:
        if self._stopping:
            return
        try:
            self._spawn(number, deaths)
        except OSError as error:
            # Processes or descriptors have run out, of the whole machine perhaps: that passes.
            log.error("a worker cannot be started yet", extra={"error": str(error)})
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._start, number, deaths)

    def _spawn(self, number: int, deaths: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            inherited = (theirs, *self._sockets)
            for one in inherited:
                one.set_inheritable(True)
            said = ",".join(str(part) for part in (number, *(one.fileno() for one in inherited)))
            command = [*self._command, said]
            environment = {**os.environ, METRICS_FOLDER: str(self._metrics)}
            try:
                pid = os.posix_spawn(command[0], command, environment, setpgroup=0)
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        worker = self._workers[pid] = _Worker(number, pid, ours, deaths)
        asyncio.get_running_loop().add_reader(ours, self._heard, worker)

    def _heard(self, worker: _Worker) -> None:
        """A worker serves, or its end of the lifeline is closed: it ends, and will be reaped."""
        try:
            said = worker.lifeline.recv(64)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            asyncio.get_running_loop().remove_reader(worker.lifeline)
            return
        if said.endswith((FULL, ROOM)):
            worker.is_full = said.endswith(FULL)
        if worker.serves_since is None:
            worker.serves_since = self._clock.monotonic()
            if worker.reads_again:
                self._hang_up(worker)
            if not self._served:
                self._served = True
                self._on_serving()
                for number in range(1, self._count):
                    self._start(number)
        self._tell_the_full()

    def _tell_the_full(self) -> None:
        """Whether to leave who comes to another worker, or to say that there is no room."""
        serving = [one for one in self._workers.values() if one.serves_since is not None]
        full = [one for one in serving if one.is_full]
        for one in full:
            # One that does not read it has been told before, and looks for itself (``Server``).
            with suppress(OSError):
                one.lifeline.send(WAKE if len(full) == len(serving) else REST)

    def _reap(self) -> None:
        """Takes the exit code of every process that has ended, adopted ones of PID 1 too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if (worker := self._workers.pop(pid, None)) is not None:
                self._ended(worker, os.waitstatus_to_exitcode(status))
        if self._stopping and not self._workers:
            self._over.set()

    def _ended(self, worker: _Worker, code: int) -> None:
        asyncio.get_running_loop().remove_reader(worker.lifeline)
        worker.lifeline.close()
        multiprocess.mark_process_dead(worker.pid, str(self._metrics))  # type: ignore[no-untyped-call]
        if self._stopping:
            # One that was told to end before it served has nothing to drain.
            if worker.serves_since is not None and not self._exit_code:
                self._exit_code = _shell_code(code)
            return
        self._tell_the_full()
        since = worker.serves_since
        quick = since is None or self._clock.monotonic() - since < QUICK_SECONDS
        deaths = worker.deaths + 1 if quick else 0
        said: dict[str, float] = {"worker": worker.number, "pid": worker.pid, "code": code}
        hopeless = deaths >= MAX_QUICK_DEATHS
        others = any(one.serves_since is not None for one in self._workers.values())
        if (hopeless and not others) or (code == REFUSED and not self._served):
            log.error("a worker cannot be started: the gateway ends", extra=said)
            self._exit_code = _shell_code(code) or 1
            self._stop(signal.SIGTERM)
            return
        pause = _pause(deaths)
        said["pause_seconds"] = pause
        if hopeless:
            log.error("a worker cannot be started: it is tried again, others serve", extra=said)
        else:
            log.error("a worker has ended and is replaced", extra=said)
        asyncio.get_running_loop().call_later(pause, self._start, worker.number, deaths)

    def _pass_on(self) -> None:
        """Lets the workers read the configuration again. One that has not said that it serves may
        have read the old one: it hears of it then."""
        for worker in self._workers.values():
            if worker.serves_since is None:
                worker.reads_again = True
            else:
                self._hang_up(worker)

    def _hang_up(self, worker: _Worker) -> None:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGHUP)

    def _told(self, number: signal.Signals) -> None:
        if not self._stopping:
            self._stop(number)
        elif not self._told_twice:
            self._told_twice = True
            self._exit_code = 128 + number
            self._signal(number)
            asyncio.get_running_loop().call_later(KILL_SECONDS, self._signal, signal.SIGKILL)

    def _stop(self, number: signal.Signals) -> None:
        """Takes nothing new, and tells the workers to finish what they have."""
        self._stopping = True
        for one in self._sockets:
            one.close()
        self._signal(number)
        if not self._workers:
            self._over.set()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._workers:
            # Until it is reaped here its number is nobody else's.
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def _metrics_folder() -> Iterator[Path]:
    """A new folder, held by ``flock`` while this process lives. Those that a supervisor left behind
    when it was killed can be locked, and are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{METRICS_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # An empty one may be that of a neighbour who starts just now.
                if os.fstat(descriptor).st_uid == os.geteuid() and any(left.iterdir()):
                    shutil.rmtree(left)
            finally:
                os.close(descriptor)
    with tempfile.TemporaryDirectory(prefix=METRICS_PREFIX, ignore_cleanup_errors=True) as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(descriptor)


def _pause(deaths: int) -> float:
    """Seconds before another one is started in the place of those that died at once."""
    if not deaths:
        return 0.0
    return min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2.0 ** min(deaths - 1, 10))


def _shell_code(code: int) -> int:
    """An exit code as a shell says it: 128 and its number for a signal."""
    return code if code >= 0 else 128 - code
