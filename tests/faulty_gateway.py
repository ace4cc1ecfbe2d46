"""Gateways that die at the n-th call of a request: real processes, forked from one that has
everything imported, so that a hundred of them take seconds.

::

    with Nursery() as nursery:
        child = nursery.start(config, ("ledger.settle", 1), Way.KILL_AFTER)
        ...                              # one request to child.port
        assert child.wait() == KILLED
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gateway.app import open_gateway
from gateway.clock import SystemClock
from gateway.server import listen, server
from gateway.settings import load
from gateway.telemetry.log import configure
from tests.faults import Faults, Place, Way, install

ROOT = Path(__file__).parents[1]


class Child:
    """One gateway; the next one starts when this one has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        said = self._read()
        self.pid, self.port = int(said["pid"]), int(said["port"])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait(self) -> int:
        """The exit code, once it has ended; negative for a signal."""
        return int(self._read()["exit"])

    def end(self) -> int:
        """Tells it to end, as a person would, and waits."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery has died"
        said: dict[str, Any] = json.loads(line)
        return said


class Nursery:
    """The process that forks gateways. Children still there at the end of the block are killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty_gateway"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def start(
        self,
        config: Path,
        place: Place = ("", 0),
        way: Way = Way.KILL_BEFORE,
        away: Mapping[str, int] | None = None,
    ) -> Child:
        assert self._process.stdin is not None
        order = {
            "config": str(config), "place": place, "way": way.value, "away": dict(away or {}),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Child(self._process)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            end.close()


def _say(**said: object) -> None:
    os.write(1, json.dumps(said).encode() + b"\n")


async def _serve(config: Path, faults: Faults, order: Mapping[str, Any]) -> None:
    with listen("127.0.0.1", 0) as listening:
        async with open_gateway(load(config, {}), SystemClock()) as running:
            name, which = order["place"]
            faults.arm((name, which), Way(order["way"]), order["away"])
            main = server(running.app, drain_seconds=10, signals=True)
            _say(pid=os.getpid(), port=listening.getsockname()[1])
            await main.serve([listening])


def _child(order: Mapping[str, Any]) -> None:
    configure("error", "json")
    faults = Faults()
    install(faults, setattr, dying=True)
    asyncio.run(_serve(Path(order["config"]), faults, order))


def _main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        _say(exit=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    _main()
