"""`gateway` commands forked from a process that has everything imported already: each saves a
second of computing, and is otherwise what `python -m gateway` would be.

::

    process = fork(["serve", "--config", "gateway.yaml"], ENVIRONMENT)
    process.send_signal(signal.SIGTERM)
    process.wait()
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from gateway.cli import main
from gateway.pricefile import load_prices
from gateway.settings import shipped

ROOT = Path(__file__).parents[1]
MAX_ORDER_BYTES = 1 << 20


class Fork:
    """As far as it is needed here, what ``subprocess.Popen`` is. ``stdout`` and ``stderr`` are one
    pipe, where stdout has no file of its own."""

    def __init__(self, pid: int, said: IO[str], end: int) -> None:
        self.pid = pid
        self.stdout = self.stderr = said
        self._end = end
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; negative for a signal. Raises ``subprocess.TimeoutExpired``."""
        if self._code is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("gateway", timeout or 0)
            said = os.read(self._end, 16)
            assert said, "the process that forks has died"
            self._code = int(said)
            os.close(self._end)
        return self._code

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """The process that forks, one for each that runs tests; it ends with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(its.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)},
            pass_fds=[its.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait(5)

    atexit.register(end)
    return ours


def fork(
    arguments: Sequence[str], environment: Mapping[str, str], stdout: IO[str] | None = None
) -> Fork:
    """Starts `gateway` with ``arguments``; nothing on its stdin. Without a file for it, stdout goes
    where stderr does."""
    hear, say = os.pipe()
    end, its_end = os.pipe()
    server = _server()
    order = {"arguments": list(arguments), "environment": dict(environment), "cwd": os.getcwd()}
    given = [say, its_end, *([stdout.fileno()] if stdout is not None else [])]
    socket.send_fds(server, [json.dumps(order).encode()], given)
    os.close(say)
    os.close(its_end)
    pid = int(server.recv(16))
    return Fork(pid, os.fdopen(hear, encoding="utf-8"), end)


class _Server:
    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._ends: dict[int, int] = {}
        self._woken, wake = socket.socketpair()
        wake.setblocking(False)
        self._woken.setblocking(False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self._orders, self._woken], [], [])
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()
            if self._orders in ready and not self._obey():
                return

    def _obey(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, 3)
        if not data:
            return False
        stderr, end, *stdout = descriptors
        pid = os.fork()
        if pid == 0:
            os.dup2(stderr, 2)
            os.dup2(stdout[0] if stdout else stderr, 1)
            self._become(json.loads(data))
        self._ends[pid] = end
        for descriptor in (stderr, *stdout):
            os.close(descriptor)
        self._orders.send(str(pid).encode())
        return True

    def _reap(self) -> None:
        while self._ends:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            end = self._ends.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(end)

    def _become(self, order: Mapping[str, object]) -> None:
        """The command, in a process that knows nothing of this one."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.closerange(3, 1024)
            environment, arguments = order["environment"], order["arguments"]
            assert isinstance(environment, dict)
            assert isinstance(arguments, list)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(str(order["cwd"]))
            sys.argv = ["gateway", *arguments]
            sys.orig_argv = [sys.executable, "-m", "gateway", *arguments]
            main(arguments, prog_name="gateway")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001 - it is said as Python itself would say it
            sys.excepthook(*sys.exc_info())
        finally:
            _end(code)


def _end(code: int) -> None:
    """As the interpreter ends: a thread that hangs hangs here too, and what is registered for the
    end is done. Only what was imported is left as it is: to take that apart costs the most."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:  # noqa: BLE001 - as above
        sys.excepthook(*sys.exc_info())
        code = code or 120
    finally:
        os._exit(code)


if __name__ == "__main__":
    load_prices(shipped("prices.yaml"))  # it is read once, for all that are forked
    gc.collect()
    gc.freeze()  # nor do they look through what they were forked with, and copy it by that
    _Server(socket.socket(fileno=int(sys.argv[1]))).run()
