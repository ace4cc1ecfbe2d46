"""Real `gateway serve` processes, to be ended in every way, and the books that they leave behind.

::

    with GatewayProcess(config) as first:
        first.wait_ready()
        first.kill()
    books = Books.read(config.parent / "data" / "gateway.db")
    books.check()
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.error import HTTPError, URLError

from gateway.sandbox.journal import Record
from tests.forks import Fork, fork
from tests.sizes import SOAK

START_SECONDS = 30.0
POLL_SECONDS = 0.02
ENVIRONMENT: Final = {
    name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ
} | {"PYTHONUNBUFFERED": "1"}


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A `gateway` command, from its start to its end; forked, except in a soak (see ``forks``)."""
    if not SOAK:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            process = fork(arguments, ENVIRONMENT, stdout)
            with process.stderr:
                complaints = process.stderr.read()
            code = process.wait(timeout)
            stdout.seek(0)
            return subprocess.CompletedProcess(arguments, code, stdout.read(), complaints)
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT,
        check=False,
    )


def wait_until(true: Callable[[], bool], what: str, timeout: float = 30) -> float:
    """Looks until ``true()``, and returns the seconds it took. Raises ``TimeoutError``."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > timeout:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started


class GatewayProcess:
    """One `gateway serve`. The port is the one it says it listens on. Left running when the block
    ends, it is killed. ``before`` is called in the child, ahead of the gateway: then, and in a
    soak, it is started as a person would, else forked (see ``forks``)."""

    def __init__(
        self, config: Path, *arguments: str, before: Callable[[], None] | None = None
    ) -> None:
        command = ["serve", "--config", str(config), *arguments]
        self._process: subprocess.Popen[bytes] | Fork
        if before is None and not SOAK:
            self._process = fork(command, ENVIRONMENT)
        else:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                preexec_fn=before,
            )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._said = bytearray()
        self._news = threading.Condition()
        self._ended = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        something = select.poll()
        something.register(self._pipe, select.POLLIN)
        while not self._ended:
            something.poll()
            self._hear()

    def _hear(self) -> str:
        """The lines that it has written so far: all of them, also where the listener had no turn
        since. So what it did after it had said something is not seen before that is."""
        with self._news:
            while not self._ended:
                try:
                    piece = os.read(self._pipe, 65536)
                except BlockingIOError:
                    break
                self._said += piece
                self._ended = not piece
                self._news.notify_all()
            whole = len(self._said) if self._ended else self._said.rfind(b"\n") + 1
            return self._said[:whole].decode()

    def __enter__(self) -> GatewayProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self.kill()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it said so far, on either output."""
        return self._hear()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    @property
    def port(self) -> int:
        for line in self.stderr.splitlines():
            if line.startswith("gateway: serving on "):
                return int(line.removesuffix("/v1").rpartition(":")[2])
        raise LookupError("it does not listen yet")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_ready(self) -> GatewayProcess:
        """Until it says where it listens, and `/readyz` says that it may be used."""
        self.wait_listening()
        wait_until(self.is_ready, "the gateway is ready", START_SECONDS)
        return self

    def wait_listening(self) -> None:
        """Until it says where it listens."""
        with self._news:
            self._news.wait_for(lambda: self._ended or "serving on" in self._hear(), START_SECONDS)
        if "serving on" not in self.stderr:
            raise AssertionError(f"the gateway did not start:\n{self.stderr}")

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as said:
                return bool(said.status == 200)
        except (URLError, ConnectionError, TimeoutError):
            return False

    def drains(self) -> bool:
        """Whether `/readyz` says that it ends. Of several workers one may have ended before."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                return False
        except HTTPError as error:
            return error.code == 503 and b'"draining"' in error.read()
        except (URLError, ConnectionError, TimeoutError):
            return False

    def refuses(self) -> bool:
        """Whether it no longer takes connections."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return False
        except OSError:
            return True

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, as ``name{labels}`` -> value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as said:
            text = said.read().decode()
        samples = (line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, _, value in samples}

    def kill(self) -> None:
        """`kill -9`, and waits until it is gone."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 30) -> int:
        """The exit code, once it has ended; negative for a signal."""
        return self._process.wait(timeout)

    @property
    def running(self) -> bool:
        return self._process.poll() is None


def key_name(key: str | None) -> str | None:
    """An idempotency key as its client wrote it: the ledger has its route before it."""
    return key and key.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Hold:
    """A reservation, as the database has it."""

    rid: str
    state: str
    bound: int
    cost: int
    accounts: tuple[str, ...]
    outcome: str | None
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class Books:
    """A ledger's file, read by somebody who knows nothing of the gateway's code."""

    holds: Mapping[str, Hold]
    balances: Mapping[str, tuple[int, int]]
    """Account -> posted, pending."""
    usage: Mapping[str, int]
    """Sums over usage_daily."""
    journal: Sequence[tuple[str, str, int, int]] = field(default_factory=list)
    """rid, kind, pending, posted."""
    adjustments: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    """Those that belong to no call: id -> amount, accounts."""
    rolled_up: Mapping[str, int] = field(default_factory=dict)
    """Account -> what forgotten holds had posted; '' is all of them once."""

    @classmethod
    def read(cls, database: Path) -> Books:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            db.execute("BEGIN")  # one snapshot for all
            holds = {
                rid: Hold(
                    rid, state, bound, cost, tuple(json.loads(accounts)), outcome, key_name(key)
                )
                for rid, state, bound, cost, accounts, outcome, key in db.execute(
                    "SELECT rid, state, bound, cost, accounts, outcome, idempotency_key FROM hold"
                )
            }
            balances = {
                account: (posted, pending)
                for account, posted, pending in db.execute(
                    "SELECT account, posted, pending FROM balance"
                )
            }
            names = (
                "requests",
                "images",
                "cached_requests",
                "cost",
                "unresolved",
                "unresolved_cost",
            )
            sums = ", ".join(f"coalesce(sum({name}), 0)" for name in names)
            counted = db.execute(f"SELECT {sums} FROM usage_daily").fetchone()  # noqa: S608
            journal = db.execute(
                "SELECT rid, kind, pending, posted FROM journal ORDER BY seq"
            ).fetchall()
            adjustments = {
                name: (amount, tuple(json.loads(accounts)))
                for name, amount, accounts in db.execute(
                    "SELECT id, amount, accounts FROM adjustment WHERE rid IS NULL"
                )
            }
            rolled_up = dict(db.execute("SELECT account, posted FROM rolled_up").fetchall())
        usage = dict(zip(names, counted, strict=True))
        return cls(holds, balances, usage, journal, adjustments, rolled_up)

    def of(self, *states: str) -> list[Hold]:
        return [hold for hold in self.holds.values() if hold.state in states]

    @property
    def open(self) -> list[Hold]:
        return self.of("H")

    @property
    def pending(self) -> int:
        return sum(pending for _, pending in self.balances.values())

    @property
    def spent(self) -> int:
        """What is posted for all holds, those that were forgotten too."""
        return sum(hold.cost for hold in self.holds.values()) + self.rolled_up.get("", 0)

    def check(self) -> None:
        """Every sum that can be taken two ways is the same both ways (I2, I3 of money.md)."""
        posted = dict.fromkeys(self.balances, 0)
        pending = dict.fromkeys(self.balances, 0)
        for hold in self.holds.values():
            for account in hold.accounts:
                posted[account] += hold.cost
                pending[account] += hold.bound if hold.state == "H" else 0
        for amount, accounts in self.adjustments.values():
            for account in accounts:
                posted[account] += amount
        for account, amount in self.rolled_up.items():
            if account:
                posted[account] += amount
        assert {name: (posted[name], pending[name]) for name in posted} == dict(self.balances)
        kinds: dict[str, str] = {}
        moved: dict[str, tuple[int, int]] = {}
        for rid, kind, held, spent in self.journal:
            if rid in self.adjustments:
                assert (kind, held, spent) == ("A", 0, self.adjustments[rid][0])
                continue
            before = moved.get(rid, (0, 0))
            moved[rid] = (before[0] + held, before[1] + spent)
            if kind == "B":
                # It is held for another way, at that way's price.
                assert (kinds.get(rid), spent) == ("H", 0), (rid, kind)
                continue
            # Held once, and then on to an end; an expiry may be corrected by the call itself, and
            # every end by a person: then it is posted.
            step = kinds.get(rid, "") + kind
            assert step in ("H", "HP", "HV", "HX", "XP", "XV", "PA", "VA", "XA"), (rid, kind)
            kinds[rid] = "P" if kind == "A" else kind
        assert kinds == {hold.rid: hold.state for hold in self.holds.values()}
        assert moved == {
            hold.rid: (hold.bound if hold.state == "H" else 0, hold.cost)
            for hold in self.holds.values()
        }
        expired, closed = self.of("X"), self.of("P", "X")
        assert all(hold.cost == hold.bound for hold in expired)
        assert all(hold.cost == 0 for hold in self.of("H", "V"))
        adjusted = sum(amount for amount, _ in self.adjustments.values())
        assert self.usage["cost"] == self.spent + adjusted
        if not self.rolled_up:
            assert self.usage["requests"] == len(closed) + self.usage["cached_requests"]
        assert self.usage["unresolved"] == len(expired)
        assert self.usage["unresolved_cost"] == sum(hold.cost for hold in expired)


def bill(record: Record) -> int:
    """What the upstream charges for a request, in nano-dollars, from its own usage."""
    usage = record.usage
    assert isinstance(usage, dict)
    given, made = usage["input_tokens_details"], usage["output_tokens"]
    assert isinstance(given, dict)
    assert isinstance(made, int)
    text, image = given["text_tokens"], given["image_tokens"]
    assert isinstance(text, int)
    assert isinstance(image, int)
    return 5_000 * text + 8_000 * image + 30_000 * made
