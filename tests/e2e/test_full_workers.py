"""Workers that have as many connections as they take: who comes is another one's, while one has
room, and else is told that there is none."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from gateway.sandbox.server import SandboxServer
from tests.e2e.test_workers import beating, children, wait_for_all, with_workers
from tests.processes import GatewayProcess, wait_until
from tests.running import TestClock
from tests.valkey import Valkey, run_valkey

EACH = 12
"""Connections of a worker. Were it chance, both were full at once in one of six fillings."""

ESTABLISHED, CLOSE_WAIT = "01", "08"
"""Of Linux's /proc/net/tcp."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


@contextmanager
def two_workers(folder: Path, valkey: Valkey) -> Iterator[tuple[GatewayProcess, Path]]:
    with SandboxServer(TestClock()) as sandbox:
        config = with_workers(folder, sandbox, valkey, 2, server={"max_connections": EACH})
        with GatewayProcess(config) as process:
            wait_for_all(config, process, 2)
            yield process, config


class Crowd:
    """Clients that keep their connections."""

    def __init__(self, process: GatewayProcess) -> None:
        self._process = process
        self._port = process.port
        self.inside: list[HTTPConnection] = []

    def come(self) -> int:
        """One more: the status of its answer, and it stays if it was let in."""
        one = HTTPConnection("127.0.0.1", self._port, timeout=30)
        one.request("GET", "/healthz")
        answer = one.getresponse()
        answer.read()
        if answer.status == 200:
            self.inside.append(one)
        else:
            one.close()
        return answer.status

    def come_until(self, status: int) -> None:
        wait_until(lambda: self.come() == status, f"one is answered {status}")

    def forget_the_cut(self) -> None:
        """Those whose worker is gone."""
        for one in list(self.inside):
            if select.select([one.sock], [], [], 0)[0]:
                self.inside.remove(one)
                one.close()

    def leave(self) -> None:
        """Until no worker has any of them."""
        for one in self.inside:
            one.close()
        self.inside.clear()
        wait_until(lambda: not self._at_the_port(), "all have left")

    def _at_the_port(self) -> list[str]:
        rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
        return [
            state
            for _, here, _, state, *_ in rows
            if here.endswith(f":{self._port:04X}") and state in (ESTABLISHED, CLOSE_WAIT)
        ]


def test_nobody_is_refused_while_one_of_them_has_room(tmp_path: Path, valkey: Valkey) -> None:
    with two_workers(tmp_path, valkey) as (process, config):
        crowd = Crowd(process)
        for _ in range(3):
            assert [crowd.come() for _ in range(2 * EACH)] == [200] * 2 * EACH
            assert [crowd.come() for _ in range(3)] == [503] * 3, "both are full"
            crowd.inside.pop().close()
            crowd.come_until(200)
            assert crowd.come() == 503
            crowd.leave()
        # One of them is killed: those of the other stay, and the next one has room again.
        assert [crowd.come() for _ in range(2 * EACH)] == [200] * 2 * EACH
        known = len(beating(config))
        os.kill(children(process)[0], signal.SIGKILL)
        wait_until(lambda: len(beating(config)) > known, "another one serves", 60)
        crowd.forget_the_cut()
        assert len(crowd.inside) == EACH
        wait_until(lambda: crowd.come() == 200 and len(crowd.inside) == 2 * EACH, "room again")
        assert crowd.come() == 503
        crowd.leave()
        process.terminate()
        assert process.wait() == 0
        assert "Traceback" not in process.stderr


def test_one_that_is_full_does_not_wait_for_one_that_hangs(tmp_path: Path, valkey: Valkey) -> None:
    with two_workers(tmp_path, valkey) as (process, _):
        crowd = Crowd(process)
        hangs = children(process)[1]
        os.kill(hangs, signal.SIGSTOP)
        assert [crowd.come() for _ in range(EACH)] == [200] * EACH
        assert crowd.come() == 503, "after some seconds"
        os.kill(hangs, signal.SIGCONT)
        crowd.come_until(200)
        wait_until(lambda: crowd.come() == 200, "it is left to the other one")
        crowd.leave()
        process.terminate()
        assert process.wait() == 0
