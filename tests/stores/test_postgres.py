"""PostgreSQL at its worst, over real sockets: killed, frozen, cut at COMMIT, out of date."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import psycopg
import pytest
import trustme

from gateway.domain.books import Adjustment, Correction
from gateway.domain.call import Operation
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import (
    Balance,
    Basis,
    Claimed,
    Denied,
    Event,
    Held,
    Outcome,
    Replay,
    Settlement,
    State,
)
from gateway.domain.team import Team
from gateway.ports import BooksChanged, NotKnown, StoreError
from gateway.stores import postgres_writer
from gateway.stores.page import Outdated
from gateway.stores.postgres import PostgresStore
from gateway.stores.postgres_books import BY_USER, BY_USER_SIGNED
from gateway.stores.postgres_link import Link
from gateway.stores.postgres_page import Page
from gateway.stores.postgres_schema import upgrade, versions
from gateway.stores.schema import Versions, migrations
from tests.contract.stores import LEASE, NOON, claim, elsewhere, expired, lines, settled
from tests.postgres import PASSWORD, USER, CuttingWire, Postgres, run_postgres
from tests.stores.test_sqlite import file_named
from tests.valkey import eventually

NEWEST = len(migrations("postgres"))
ACCOUNTS = tuple(line.account for line in lines())


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Never mistreated for longer than a test."""
    with run_postgres() as running:
        yield running


@asynccontextmanager
async def opened(url: str, *, caller_time: bool = True) -> AsyncIterator[PostgresStore]:
    """A store, and afterwards books that add up."""
    # In a thread: a wire in front of the server runs in this loop.
    store = await asyncio.to_thread(PostgresStore.open, url, caller_time=caller_time)
    try:
        yield store
        assert await store.books.audit() == []
    finally:
        await store.aclose()


def rows(url: str, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(sql.encode()).fetchall()


def command(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.encode())


async def reservable(store: PostgresStore, rid: str) -> None:
    """Until the store takes reservations again."""

    async def taken() -> bool:
        try:
            return isinstance(await store.ledger.reserve(claim(rid, 0)), Held)
        except LedgerUnavailable:
            return False

    await eventually(taken, 20)


async def test_two_processes_that_mend_the_same_difference_do_it_once(server: Postgres) -> None:
    """They share no account, so that only their turn keeps one from reading too early."""
    url = server.fresh_database()
    async with opened(url) as one, opened(url) as two:
        for day in range(1, 21):
            on = f"2026-11-{day:02}"

            async def mend(store: PostgresStore, name: str, on: str = on) -> list[str]:
                adjustment = Adjustment(
                    f"{on}-{name}", name, "flare", on, 5, (f"team:{name}|m",), "drift", "bob", NOON
                )
                return await store.books.adjust_all([adjustment], {(on, "flare"): 0})

            done = await asyncio.gather(
                mend(one, "growth"), mend(two, "design"), return_exceptions=True
            )
            assert [type(end) for end in done].count(BooksChanged) == 1, on
            assert sum(row.cost for row in await one.ledger.usage(on, on)) == 5


# The server dies, freezes, ends connections, turns read-only


async def test_what_was_acknowledged_survives_a_kill_of_the_server() -> None:
    with run_postgres(durable=True) as server:
        async with opened(server.fresh_database()) as store:
            budget = lines(team_day=600)
            acknowledged: set[str] = set()

            async def pair(number: int) -> None:
                for step in range(20):
                    rid = f"r{number}-{step}"
                    held = await store.ledger.reserve(claim(rid, 10, limits=budget))
                    assert isinstance(held, Held | Denied)
                    if isinstance(held, Held):
                        acknowledged.add(rid)

            calls = [asyncio.create_task(pair(number)) for number in range(50)]
            await eventually(lambda: len(acknowledged) >= 5)
            await asyncio.to_thread(server.kill)
            failed = await asyncio.gather(*calls, return_exceptions=True)
            assert any(isinstance(one, LedgerUnavailable) for one in failed)
            assert all(one is None or isinstance(one, LedgerUnavailable) for one in failed)
            with pytest.raises(LedgerUnavailable):
                await store.ledger.reserve(claim("away"))
            with pytest.raises(LedgerUnavailable):
                await store.ledger.balances(budget)

            await asyncio.to_thread(server.restart)
            await reservable(store, "back")
            kept = [await store.books.find(rid) for rid in acknowledged]
            assert None not in kept
            assert await store.books.audit() == []
            # Repeats of all of them take nothing twice, and the budget holds to the end.
            await asyncio.gather(
                *(
                    store.ledger.reserve(claim(f"r{number}-{step}", 10, limits=budget))
                    for number in range(50)
                    for step in range(20)
                )
            )
            assert await store.ledger.balances(budget) == [Balance(0, 600)] * 4


async def test_a_frozen_server_is_noticed_and_recovered_from(server: Postgres) -> None:
    async with opened(server.fresh_database()) as store:
        await store.ledger.reserve(claim("before"))
        server.freeze()
        try:
            started = time.monotonic()
            answers = await asyncio.gather(
                *(store.ledger.reserve(claim(f"r{number}")) for number in range(20)),
                store.ledger.settle(settled("before", 3)),
                store.ledger.balances(lines()),
                store.directory.find_key(b"x"),
                return_exceptions=True,
            )
            assert {type(answer) for answer in answers} == {LedgerUnavailable}
            assert time.monotonic() - started < 4
        finally:
            server.thaw()
        await reservable(store, "after")
        await store.ledger.settle(settled("before", 3))
        held = await store.ledger.open_holds()
        # What nobody waited for any more may stand; it is one hold each at most.
        assert 1 <= held <= 21
        assert (await store.ledger.balances(lines()))[0] == Balance(3, 10 * (held - 1))


async def test_connections_that_the_server_ends_are_replaced(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as store:
        for number in range(3):
            assert server.end_connections(url.rpartition("/")[2]) == 2
            assert isinstance(await store.ledger.reserve(claim(f"r{number}")), Held)
            assert await store.ledger.open_holds() == number + 1
            await store.ledger.ping()


async def test_a_database_that_turns_read_only_is_unavailable_until_it_is_not(
    server: Postgres,
) -> None:
    """As hosted ones do when their disk is full. What is read goes on."""
    url = server.fresh_database()
    name = url.rpartition("/")[2]
    async with opened(url) as store:
        server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        server.end_connections(name)
        with pytest.raises(LedgerUnavailable):
            await store.ledger.reserve(claim("a"))
        assert await store.ledger.open_holds() == 0
        server.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        assert isinstance(await store.ledger.reserve(claim("a")), Held)


async def test_a_row_that_somebody_holds_delays_only_until_it_is_given_back(
    server: Postgres,
) -> None:
    url = server.fresh_database()
    async with opened(url) as store:
        await store.ledger.reserve(claim("a"))
        with psycopg.connect(url) as other:
            other.execute("SELECT * FROM balance FOR UPDATE")
            waiting = asyncio.create_task(store.ledger.reserve(claim("b")))
            # Beyond one lock_timeout: the second attempt gets it.
            done, _ = await asyncio.wait({waiting}, timeout=1.3)
            assert not done
            other.rollback()
            assert isinstance(await waiting, Held)
            other.execute("SELECT * FROM balance FOR UPDATE")
            started = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                await store.ledger.reserve(claim("c"))
            assert 2.5 < time.monotonic() - started < 4
        await reservable(store, "d")
        assert await store.books.find("c") is None


# The answer to COMMIT is lost


async def test_a_commit_whose_answer_is_lost_happens_once(server: Postgres) -> None:
    url = server.fresh_database()
    async with CuttingWire(server.port) as wire:
        through = server.url(url.rpartition("/")[2], wire.port)
        async with opened(through) as store:
            wire.cut_commits(1)
            assert await store.ledger.reserve(claim("a")) == Held("a", (Balance(0, 10),) * 4)
            wire.cut_commits(1)
            assert await store.ledger.reroute(elsewhere("a", 15)) == Held(
                "a", (Balance(0, 15),) * 4
            )
            wire.cut_commits(1)
            entry = await store.ledger.settle(settled("a", 7))
            assert (entry.applied, entry.cost) == (True, 7)
            wire.cut_commits(1)
            await store.ledger.replay(
                Replay("hit", "growth", "k1", "flare", Operation.EDIT, 1, 6, NOON)
            )
            await eventually(lambda: wire.cut == 4)
            wire.cut_commits(1)
            drift = Adjustment("d", "growth", "flare", "2026-11-22", 5, ACCOUNTS, "r", "ann", NOON)
            assert await store.books.adjust(drift)
            wire.cut_commits(1)
            await store.directory.create_team(Team("design"))
            wire.cut_commits(1)
            assert await store.upkeep.claim_notice("a", "budget:80", NOON, 60)
            assert wire.cut == 7

            assert [line.kind for line in await store.books.journal("a")] == ["H", "B", "P"]
            assert await store.ledger.balances(lines()) == [Balance(12, 0)] * 4
            first, second = await store.ledger.usage()
            assert (first.cost, second.requests, second.cached_requests) == (5, 2, 1)
            assert second.avoided == 6


async def test_a_commit_that_never_arrived_is_sent_again(server: Postgres) -> None:
    """The server still has the transaction, with all its locks: it is ended first."""
    url = server.fresh_database()
    async with CuttingWire(server.port) as wire:
        through = server.url(url.rpartition("/")[2], wire.port)
        async with opened(through) as store:
            wire.swallow_commits(1)
            answers = await asyncio.gather(
                store.ledger.replay(
                    Replay("hit", "growth", "k1", "flare", Operation.EDIT, 1, 6, NOON)
                ),
                *(store.ledger.reserve(claim(f"r{number}")) for number in range(5)),
            )
            assert wire.cut == 1
            assert all(isinstance(one, Held) and not one.duplicate for one in answers[1:])
            assert await store.ledger.balances(lines()) == [Balance(0, 50)] * 4
            (row,) = await store.ledger.usage()
            assert (row.requests, row.avoided) == (1, 6)


async def test_many_lost_answers_under_load(server: Postgres) -> None:
    url = server.fresh_database()
    async with CuttingWire(server.port) as wire:
        through = server.url(url.rpartition("/")[2], wire.port)
        async with opened(through) as store:

            async def pair(number: int) -> None:
                await store.ledger.reserve(claim(f"r{number}", 10))
                await store.ledger.replay(
                    Replay(f"h{number}", "growth", "k1", "flare", Operation.EDIT, 1, 6, NOON)
                )
                await store.ledger.settle(settled(f"r{number}", 7))

            for cuts in range(10):
                wire.cut_commits(1)
                await asyncio.gather(*(pair(20 * cuts + number) for number in range(20)))
            assert wire.cut == 10
            assert await store.ledger.sweep(NOON) == []
            assert await store.ledger.balances(lines()) == [Balance(1400, 0)] * 4
            (row,) = await store.ledger.usage()
            assert (row.requests, row.cached_requests, row.cost) == (400, 200, 1400)


# No standby answers


@asynccontextmanager
async def standby_away(server: Postgres) -> AsyncIterator[None]:
    """The synchronous standby is gone: until the end of this no COMMIT is answered."""
    server.execute("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (gone)'")
    server.execute("SELECT pg_reload_conf()")
    with contextlib.closing(psycopg.connect(server.url(), autocommit=True)) as probe:

        def hangs() -> bool:
            probe.pgconn.consume_input()
            if not probe.pgconn.is_busy():
                while probe.pgconn.get_result() is not None:
                    pass
                probe.pgconn.send_query(b"SELECT pg_logical_emit_message(true, '', '')")
            return waiting_for_a_standby(server.url()) != set()

        try:
            await eventually(hangs)
            yield
        finally:
            server.execute("ALTER SYSTEM RESET synchronous_standby_names")
            server.execute("SELECT pg_reload_conf()")


def waiting_for_a_standby(url: str) -> set[object]:
    """The processes of this database whose COMMIT does."""
    found = rows(
        url,
        "SELECT pid FROM pg_stat_activity"
        " WHERE wait_event = 'SyncRep' AND datname = current_database()",
    )
    return {pid for (pid,) in found}


async def test_what_no_standby_has_is_not_acknowledged(server: Postgres) -> None:
    """The server commits it for itself when the process that waits is ended. Were it acknowledged
    then, a failover would lose it."""
    url = server.fresh_database()
    drift = Adjustment("d", "growth", "flare", "2026-11-22", 5, ACCOUNTS, "r", "ann", NOON)
    async with opened(url) as store:
        await store.ledger.reserve(claim("before"))
        async with standby_away(server):
            for turn in range(3):
                started = time.monotonic()
                answers = await asyncio.gather(
                    store.ledger.reserve(claim(f"r{turn}")),
                    store.ledger.settle(settled("before", 3)),
                    store.books.adjust(drift),
                    store.directory.create_team(Team(f"t{turn}")),
                    return_exceptions=True,
                )
                assert {type(answer) for answer in answers} == {LedgerUnavailable}
                assert time.monotonic() - started < 4
                # What hangs is ended before more is begun.
                hanging = waiting_for_a_standby(url)
                assert len(hanging) <= 1
            await eventually(lambda: hanging.isdisjoint(waiting_for_a_standby(url)))
        await reservable(store, "after")
        for turn in range(3):
            assert isinstance(await store.ledger.reserve(claim(f"r{turn}")), Held)
        await store.ledger.settle(settled("before", 3))
        await store.books.adjust(drift)
        assert await store.ledger.balances(lines()) == [Balance(8, 30)] * 4
        assert waiting_for_a_standby(url) == set()


async def test_nothing_overtakes_a_commit_that_hangs(server: Postgres) -> None:
    """A void comes after the reservation that it ends, though that was given up long before."""
    url = server.fresh_database()
    name = url.rpartition("/")[2]
    # What this changes need not wait for a standby.
    local = server.url(options="-csynchronous_commit%3Dlocal")
    refused = Settlement("late", Event.VOID, Outcome.REFUSED, Basis.NONE)
    async with opened(url) as store:
        await store.ledger.reserve(claim("warm"))
        async with standby_away(server):
            reserve = asyncio.create_task(store.ledger.reserve(claim("late")))
            await eventually(lambda: waiting_for_a_standby(url) != set())
            hanging = waiting_for_a_standby(url)
            command(local, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            try:
                with pytest.raises(LedgerUnavailable):
                    await reserve
                # Behind it in the queue: it fails once no new connection is tried for any more.
                with pytest.raises(LedgerUnavailable):
                    await store.ledger.settle(settled("warm", 3))
            finally:
                command(local, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            void = asyncio.create_task(store.ledger.settle(refused))
            await eventually(lambda: waiting_for_a_standby(url) - hanging != set())
        assert (await void).state is State.VOIDED
        await eventually(lambda: waiting_for_a_standby(url) == set())
        hold = await store.books.find("late")
        assert hold is not None
        assert hold.state is State.VOIDED
        await store.ledger.settle(settled("warm", 3))
        assert await store.ledger.balances(lines()) == [Balance(3, 0)] * 4


# Two replicas on one database


async def test_two_replicas_never_pass_a_budget_nor_wait_for_each_other(
    server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second:
        # Accounts in opposite orders, a row that nobody has used before, room for 60 of 100.
        budget = lines(team_day=600)

        async def call(store: PostgresStore, number: int) -> bool:
            order = budget if number % 2 else budget[::-1]
            answer = await store.ledger.reserve(claim(f"r{number}", 10, limits=order))
            return isinstance(answer, Held)

        stores = (first, second)
        taken = await asyncio.gather(
            *(call(stores[number // 2 % 2], number) for number in range(100))
        )
        assert sum(taken) == 60
        ends = [
            stores[turn].ledger.settle(settled(f"r{number}", 6))
            for number, held in enumerate(taken)
            if held
            for turn in (0, 1)
        ]
        entries = await asyncio.gather(*ends)
        assert sum(entry.applied for entry in entries) == 60
        assert await second.ledger.balances(budget) == [Balance(360, 0)] * 4
    assert "deadlock" not in caplog.text


async def test_whatever_replicas_do_at_once_there_is_no_deadlock(
    server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Any accounts in any order, new ones too; ends, sweeps, corrections and retention between."""
    url = server.fresh_database()
    chance = random.Random(7)
    every = [line for day in range(5) for line in lines(at=NOON + timedelta(days=40 * day))]
    async with opened(url) as first, opened(url) as second, opened(url) as third:
        stores = (first, second, third)

        async def live(rid: str) -> None:
            some = tuple(chance.sample(every, chance.randint(1, 8)))
            await chance.choice(stores).ledger.reserve(claim(rid, 10, limits=some))
            if chance.random() < 0.3:
                others = tuple(chance.sample(every, chance.randint(0, 4)))
                with contextlib.suppress(NotKnown):
                    way = elsewhere(rid, chance.randint(5, 15), limits=others)
                    await chance.choice(stores).ledger.reroute(way)
            if chance.random() < 0.8:
                await chance.choice(stores).ledger.settle(settled(rid, chance.randint(0, 12)))
            if chance.random() < 0.3:
                fix = Correction(f"c{rid}", rid, 5, "r", "ann", NOON)
                with contextlib.suppress(NotKnown):
                    await chance.choice(stores).books.correct(fix)

        async def keep(store: PostgresStore) -> None:
            await store.ledger.sweep(NOON + 2 * LEASE, limit=5)
            await store.upkeep.forget(NOON + timedelta(seconds=1), limit=5)
            await store.upkeep.beat("w", NOON)

        for turn in range(12):
            await asyncio.gather(
                *(live(f"r{turn}-{number}") for number in range(25)),
                *(keep(store) for store in stores),
            )
    # Each transaction that failed is logged; races for a row are not deadlocks.
    assert "deadlock" not in caplog.text


async def test_one_key_or_one_rid_at_two_replicas_is_one_call(server: Postgres) -> None:
    """Even where their accounts differ, so that no lock makes one wait for the other."""
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second:
        tomorrow = NOON + timedelta(days=40)
        for number in range(20):
            here = claim(f"a{number}", key=f"i{number}")
            there = replace(claim(f"b{number}", key=f"i{number}", at=tomorrow), at=NOON)
            answers = await asyncio.gather(first.ledger.reserve(here), second.ledger.reserve(there))
            assert sorted(type(one).__name__ for one in answers) == ["Claimed", "Held"]
            same = [claim(f"c{number}"), claim(f"c{number}", at=tomorrow)]
            held = await asyncio.gather(
                first.ledger.reserve(same[0]), second.ledger.reserve(same[1])
            )
            assert sorted(isinstance(one, Held) and one.duplicate for one in held) == [False, True]


async def test_an_unknown_outcome_is_repeated_at_one_of_two_replicas(server: Postgres) -> None:
    """Even where their accounts differ; and the other one hears of it at once."""
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second:
        tomorrow = NOON + timedelta(days=40)
        for number in range(20):
            key = f"i{number}"
            await first.ledger.reserve(claim(f"a{number}", key=key))
            await first.ledger.settle(expired(f"a{number}"))
            here = replace(claim(f"b{number}", key=key), repeat_unknown=True)
            there = claim(f"c{number}", key=key, at=tomorrow)
            there = replace(there, at=NOON, repeat_unknown=True)
            answers = await asyncio.gather(first.ledger.reserve(here), second.ledger.reserve(there))
            assert sorted(type(one).__name__ for one in answers) == ["Claimed", "Held"]
            (held,) = (one for one in answers if isinstance(one, Held))
            for store in (first, second):
                known = await store.ledger.claimed("growth", key, "f", NOON)
                assert known == Claimed(held.rid, State.HELD, same_fingerprint=True)
        assert await first.books.audit() == []


# What a writer remembers


async def test_a_writer_asks_for_nothing_that_it_has_committed_itself(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    execute = Link.execute

    def heard(link: Link, query: str, *more: Any, **options: Any) -> Any:
        asked.append(" ".join(query.split()))
        return execute(link, query, *more, **options)

    async with opened(server.fresh_database()) as store:
        await store.ledger.reserve(claim("first"))
        monkeypatch.setattr(Link, "execute", heard)
        assert isinstance(await store.ledger.reserve(claim("second")), Held)
        for rid in ("first", "second"):
            assert (await store.ledger.settle(settled(rid, 7))).applied
        asked_for = [query for query in asked if "accounts FROM hold" in query]
        made = [query for query in asked if query.startswith("INSERT INTO balance")]
        assert (asked_for, made) == ([], [])
        # An end is forgotten: it has to be looked for.
        assert not (await store.ledger.settle(settled("first", 7))).applied
        assert "SELECT accounts FROM hold WHERE rid = ANY(%s::text[])" in asked
        monkeypatch.undo()


async def test_what_a_writer_remembers_may_be_wrong(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as store, opened(url) as other:
        assert isinstance(await store.ledger.reserve(claim("first", 0)), Held)
        # It trusts that a hold is new, and another one has made it, of other accounts.
        await other.ledger.reserve(claim("theirs", limits=lines(team="design"), team="design"))
        held = await store.ledger.reserve(claim("theirs"))
        assert isinstance(held, Held)
        assert held.duplicate
        assert held.balances == (Balance(0, 10),) * 4
        # A hold that it made was ended by another one.
        assert (await other.ledger.settle(settled("first", 0))).applied
        assert not (await store.ledger.settle(settled("first", 0))).applied
        # Accounts that it knows are gone: the server is one that never had them.
        await other.ledger.settle(settled("theirs", 0))
        command(url, "DELETE FROM balance")
        assert isinstance(await store.ledger.reserve(claim("anew")), Held)


async def test_a_writer_that_was_wrong_begins_anew_at_once_and_nothing_has_failed(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres_writer, "PAUSE_SECONDS", 10 * postgres_writer.PATIENCE_SECONDS)
    url = server.fresh_database()
    async with opened(url) as store, opened(url) as other:
        await store.ledger.reserve(claim("first"))
        await other.ledger.reserve(claim("theirs", limits=lines(team="design"), team="design"))
        with caplog.at_level(logging.DEBUG):
            held = await store.ledger.reserve(claim("theirs"))
        assert isinstance(held, Held)
        assert held.duplicate
        assert not caplog.records


async def test_a_writer_that_is_wrong_again_and_again_gives_up_and_says_so(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def outdated(*_: object) -> NoReturn:
        raise Outdated

    monkeypatch.setattr(postgres_writer, "PAUSE_SECONDS", 0.01)
    async with opened(server.fresh_database()) as store:
        with monkeypatch.context() as patched:
            patched.setattr(Page, "locked", outdated)
            with pytest.raises(LedgerUnavailable):
                await store.ledger.reserve(claim("r"))
        assert caplog.text.count("a transaction of the ledger failed") == 3
        assert isinstance(await store.ledger.reserve(claim("r")), Held)


async def test_a_writer_whose_tables_were_new_reads_no_more_as_they_grow(server: Postgres) -> None:
    """Its plans are as old as it is, and the server has no statistics for a minute."""
    url, calls = server.fresh_database(), 400
    store = PostgresStore.open(url, caller_time=True)
    for number in range(0, calls, 4):
        rids = [f"r{number + part}" for part in range(4)]
        await asyncio.gather(*(store.ledger.reserve(claim(rid, key=rid)) for rid in rids))
        await asyncio.gather(*(store.ledger.settle(settled(rid, 5)) for rid in rids))
    await store.aclose()
    # A connection's statistics are complete once it has ended.
    ours = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    await eventually(
        lambda: not rows(url, ours + "pg_backend_pid() AND backend_type = 'client backend'")
    )
    [(read, made)] = rows(
        url,
        "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::int, sum(n_tup_ins)::int"
        " FROM pg_stat_user_tables WHERE relname = 'hold'",
    )
    assert isinstance(read, int)
    assert made == calls
    assert read <= 4 * calls  # to settle a call it is locked, and written


async def test_replicas_that_sweep_at_once_expire_each_hold_once(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second, opened(url) as third:
        await asyncio.gather(*(first.ledger.reserve(claim(f"r{number}")) for number in range(60)))
        late = NOON + 2 * LEASE
        swept = await asyncio.gather(
            *(store.ledger.sweep(late, limit=15) for store in (first, second, third))
        )
        assert all(len(entries) <= 15 for entries in swept)
        expired = [entry.rid for entries in swept for entry in entries]
        while entries := await second.ledger.sweep(late):
            expired += [entry.rid for entry in entries]
        assert sorted(expired) == sorted(f"r{number}" for number in range(60))
        assert await first.ledger.unresolved() == 600


async def test_a_correction_at_two_replicas_is_applied_once(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second:
        await first.ledger.reserve(claim("r"))
        await first.ledger.sweep(NOON + 2 * LEASE)
        truth = Correction("c", "r", 4, "the invoice", "ann", NOON)
        drift = Adjustment("d", "growth", "flare", "2026-11-22", 5, ACCOUNTS, "r", "ann", NOON)
        entries = await asyncio.gather(*(store.books.correct(truth) for store in (first, second)))
        assert sorted(entry.applied for entry in entries) == [False, True]
        applied = await asyncio.gather(*(store.books.adjust(drift) for store in (first, second)))
        assert sorted(applied) == [False, True]
        assert await first.ledger.balances(lines()) == [Balance(9, 0)] * 4


async def test_replicas_agree_about_the_id_of_a_declared_key(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as first, opened(url) as second:
        named = await asyncio.gather(
            *(
                store.directory.declared_id([b"new", b"old"], f"k{number}")
                for number, store in enumerate((first, second))
            )
        )
        assert len(set(named)) == 1


# One bad call among many


async def test_a_bad_call_does_not_sink_the_batch(server: Postgres) -> None:
    async with opened(server.fresh_database()) as store:
        bad = {3: claim("r3", 2**63), 5: claim("r5\0"), 7: claim("r7", 2**63, limits=())}
        answers = await asyncio.gather(
            *(store.ledger.reserve(bad.get(number, claim(f"r{number}"))) for number in range(20)),
            return_exceptions=True,
        )
        failed = {
            number: type(answer)
            for number, answer in enumerate(answers)
            if not isinstance(answer, Held)
        }
        assert failed.keys() == bad.keys()
        assert failed[3] is OverflowError
        assert issubclass(failed[5], psycopg.DataError)
        assert issubclass(failed[7], psycopg.DataError)
        assert await store.ledger.balances(lines()) == [Balance(0, 170)] * 4


async def test_a_bad_call_costs_the_others_a_few_transactions(server: Postgres) -> None:
    """It is looked for by halves. A name like this is refused before it comes here."""
    url = server.fresh_database()
    async with opened(url) as store:
        calls = [claim(f"r{number}") for number in range(128)]
        calls[77] = replace(calls[77], model="a\0b")
        answers = await asyncio.gather(*map(store.ledger.reserve, calls), return_exceptions=True)
        assert isinstance(answers.pop(77), psycopg.DataError)
        assert all(isinstance(answer, Held) for answer in answers)
        ((transactions,),) = rows(url, "SELECT last FROM writer")
        assert isinstance(transactions, int)
        assert transactions < 30


async def test_the_journal_is_append_only(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as store:
        await store.ledger.reserve(claim("r"))
        for sql in ("UPDATE journal SET pending = 0", "DELETE FROM journal", "TRUNCATE journal"):
            with pytest.raises(psycopg.Error, match="append-only"):
                command(url, sql)
        assert [line.kind for line in await store.books.journal("r")] == ["H"]


# Whose clock


async def test_leases_and_beats_are_judged_by_the_servers_clock(server: Postgres) -> None:
    """This process believes that it is 2020, or 2040: nobody's lease is over for that."""
    async with opened(server.fresh_database(), caller_time=False) as store:
        past, future = datetime(2020, 1, 1, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)
        await store.ledger.reserve(claim("r", at=past))
        await store.upkeep.beat("w1", past)
        assert store.clock_skew_seconds < -150e6
        await store.upkeep.beat("w1", future)
        assert store.clock_skew_seconds > 400e6
        await store.upkeep.beat("w1", datetime.now(UTC))
        assert abs(store.clock_skew_seconds) < 1.5
        assert await store.ledger.sweep(future) == []
        assert await store.ledger.sweep(future, silent_before=future - timedelta(minutes=1)) == []
        hold = await store.books.find("r")
        assert hold is not None
        assert abs(hold.lease_ends - datetime.now(UTC) - LEASE) < timedelta(seconds=10)
        # A worker that was silent for longer than nothing is dead.
        swept = await store.ledger.sweep(past, silent_before=past)
        assert [entry.state for entry in swept] == [State.EXPIRED]


# The schema


def test_a_database_without_the_schema_is_refused(server: Postgres) -> None:
    with pytest.raises(StoreError, match=r"has schema 0, .* run `gateway db upgrade`"):
        PostgresStore.open(server.empty_database())


def test_a_database_that_has_not_every_character_is_refused(server: Postgres) -> None:
    server.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with pytest.raises(StoreError, match=r"encoding LATIN1, and UTF8 is needed: .* template0"):
        upgrade(server.url("latin"))


def test_a_newer_schema_is_refused_at_start_but_those_that_run_go_on(server: Postgres) -> None:
    url = server.fresh_database()

    async def story() -> None:
        async with opened(url) as running:
            command(url, "INSERT INTO schema_version SELECT max(version) + 1 FROM schema_version")
            with pytest.raises(StoreError, match=f"schema {NEWEST + 1}, this program knows"):
                PostgresStore.open(url)
            with pytest.raises(StoreError, match="newer release"):
                upgrade(url)
            assert isinstance(await running.ledger.reserve(claim("r")), Held)

    asyncio.run(story())


def test_upgrades_that_run_at_once_apply_everything_once(server: Postgres) -> None:
    url = server.empty_database()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(upgrade, [url] * 4))
    # The others come in between, or behind it.
    before = sorted(one.database for one in found)
    assert before.count(0) == 1
    assert before[-1] <= NEWEST
    assert versions(url) == Versions(NEWEST, NEWEST)
    assert rows(url, "SELECT version FROM schema_version") == [
        (number,) for number in range(1, NEWEST + 1)
    ]


# What is said, and what is never said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda url: url.replace(PASSWORD, "wr0ng-" + PASSWORD), "password authentication failed"),
        (lambda url: url.replace("/fresh_", "/no_such_"), "does not exist"),
        (lambda url: url + "?sslmode=verify-full&sslrootcert=system", "SSL"),
        (lambda url: url + "?no_such_parameter=1", "unknown name"),
        (lambda url: url.replace(PASSWORD, PASSWORD + "%zz"), "percent-encoded"),
        (lambda url: url.replace(PASSWORD, PASSWORD + "@"), "cannot be used"),
    ],
    ids=["password", "database", "tls", "parameter", "encoding", "unquoted"],
)
def test_a_store_that_cannot_be_opened_says_why_but_never_the_password(
    server: Postgres, change: object, said: str
) -> None:
    assert callable(change)
    url = change(server.fresh_database())
    with pytest.raises(StoreError) as refused:
        PostgresStore.open(url)
    error: BaseException | None = refused.value
    assert said in str(error)
    assert "\n" not in str(error)
    while error is not None:
        assert PASSWORD not in str(error) + repr(error)
        assert error.__suppress_context__ or error.__context__ is None
        error = error.__cause__


async def test_a_server_that_is_gone_is_said_without_the_password(
    server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.fresh_database()
    async with CuttingWire(server.port) as wire:
        through = server.url(url.rpartition("/")[2], wire.port)
        store = await asyncio.to_thread(PostgresStore.open, through)
    with caplog.at_level(logging.DEBUG), pytest.raises(LedgerUnavailable):
        await store.ledger.reserve(claim("r"))
    with pytest.raises(LedgerUnavailable):
        await store.ledger.ping()
    await store.aclose()
    assert "a transaction of the ledger failed" in caplog.text
    assert PASSWORD not in caplog.text


async def test_the_url_says_how_the_connection_is_encrypted(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    with run_postgres() as server:
        try:
            server.encrypt(authority.issue_cert("127.0.0.1"))
        except psycopg.errors.InvalidParameterValue:
            pytest.skip("the server that pip installs has no TLS; Debian's has")
        url = server.fresh_database()
        checked = f"{url}?sslmode=verify-full&sslrootcert={tmp_path}"
        async with opened(f"{checked}/ca.pem") as store:
            assert isinstance(await store.ledger.reserve(claim("r")), Held)
            encrypted = rows(
                url,
                "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                " WHERE application_name = 'image-gateway'",
            )
            assert encrypted == [(True,), (True,)]
        with pytest.raises(StoreError, match="certificate verify failed"):
            PostgresStore.open(f"{checked}/stranger.pem")


def test_of_several_hosts_the_one_that_answers_is_taken(server: Postgres) -> None:
    url = server.fresh_database().replace("@127.0.0.1", "@127.0.0.1:1,127.0.0.1")
    assert versions(url) == Versions(NEWEST, NEWEST)


def test_a_password_may_have_any_character(server: Postgres) -> None:
    password = "p@ss/w:rd?#%&= é"
    server.execute("CREATE ROLE odd LOGIN SUPERUSER PASSWORD 'p@ss/w:rd?#%&= é'")
    url = server.fresh_database().replace(f"{USER}:{PASSWORD}", f"odd:{quote(password, safe='')}")
    assert versions(url) == Versions(NEWEST, NEWEST)


async def test_what_is_queued_is_committed_before_it_closes(server: Postgres) -> None:
    url = server.fresh_database()
    store = PostgresStore.open(url)
    calls = [asyncio.create_task(store.ledger.reserve(claim(f"r{one}"))) for one in range(300)]
    await asyncio.sleep(0)
    await store.aclose()
    assert all(isinstance(one, Held) for one in await asyncio.gather(*calls))
    with pytest.raises(LedgerUnavailable):
        await store.ledger.reserve(claim("late"))
    with pytest.raises(LedgerUnavailable):
        await store.ledger.open_holds()
    await store.aclose()
    assert rows(url, "SELECT count(*) FROM hold") == [(300,)]


async def test_a_database_of_the_release_before_users(server: Postgres) -> None:
    """Its calls named nobody. While it is brought up to date, a process that runs goes on: with
    statements that it has prepared long before there were users."""
    url = server.empty_database()
    with psycopg.connect(url, autocommit=True) as link:
        link.execute(migrations("postgres")[0].encode())
        link.execute(
            "CREATE TABLE schema_version (version INTEGER NOT NULL PRIMARY KEY,"
            " applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())"
        )
        link.execute("INSERT INTO schema_version (version) VALUES (1)")
        hold = {
            "rid": "old", "state": "H", "bound": 9, "cost": 0, "accounts": '["a"]',
            "team": "growth", "key_id": "k", "model": "m", "operation": "edit", "upstream": "u",
            "images": 1, "price_id": "", "fingerprint": "", "worker": "", "at": 0,
            "day": "2026-11-22", "lease_ends": 1, "flags": "[]",
        }  # fmt: skip
        columns = ", ".join(hold)
        insert = (
            f"INSERT INTO hold ({columns})"  # noqa: S608 - names of columns
            f" SELECT {columns} FROM json_populate_recordset(NULL::hold, %s)"
        ).encode()
        lost = {**hold, "state": "X", "cost": 1, "accounts": "[]"}
        for number in range(8):
            link.execute(insert, (json.dumps([{**lost, "rid": f"lost-{number}"}]),), prepare=True)
        link.execute(insert, (json.dumps([hold]),), prepare=True)
        link.execute("INSERT INTO balance VALUES ('a', 0, 9)")
        link.execute("INSERT INTO journal (rid, kind, pending, posted) VALUES ('old', 'H', 9, 0)")
        assert upgrade(url).database == 1
        link.execute(insert, (json.dumps([{**lost, "rid": "later"}]),), prepare=True)
        link.execute("DELETE FROM hold WHERE state = 'X'")
    async with opened(url) as store:
        await store.ledger.settle(settled("old", 4))
        await store.ledger.reserve(replace(claim("new"), user="u_1"))
        await store.ledger.settle(settled("new", 5))
        found = await store.books.usage_by_user("growth")
        assert [(one.user, one.cost) for one in found] == [("", 4), ("u_1", 5)]


@pytest.mark.parametrize("sql", [BY_USER, BY_USER_SIGNED])
@pytest.mark.parametrize("team", ["team3", None])
def test_usage_by_user_goes_along_an_index(server: Postgres, team: str | None, sql: str) -> None:
    url = server.fresh_database()
    asked = {
        "team": team,
        "periods": ["2026-11-05"],
        "wholes": [1],
        "halves": [0],
        "months": ["2026-11"],
    }
    with psycopg.connect(url, autocommit=True) as link:
        link.execute(
            "INSERT INTO usage_by_user"
            " SELECT '2026-11-' || lpad((n % 28 + 1)::text, 2, '0'), 'team' || n % 20, 'u' || n,"
            " 1, 1, 1, 0 FROM generate_series(1, 20000) AS n"
        )
        link.execute("ANALYZE")
        plan = str(link.execute(f"EXPLAIN {sql}".encode(), asked).fetchall())
    assert "usage_by_user_pkey" in plan
    assert "Seq Scan on usage_by_user" not in plan


def make_release(link: psycopg.Connection[Any], release: int) -> None:
    """The schema as it was."""
    for number, text in enumerate(migrations("postgres")[:release], start=1):
        link.execute(text.encode())
        if number == 1:
            link.execute(
                "CREATE TABLE schema_version (version INTEGER PRIMARY KEY,"
                " applied_at TIMESTAMPTZ NOT NULL DEFAULT now())"
            )
        link.execute("INSERT INTO schema_version (version) VALUES (%s)", (number,))


async def test_an_upgrade_behind_a_long_read_keeps_no_call_waiting(server: Postgres) -> None:
    url = server.empty_database()
    with psycopg.connect(url, autocommit=True) as calls, psycopg.connect(url) as report:
        make_release(calls, 4)
        report.execute("SELECT count(*) FROM usage_by_user")
        upgraded = asyncio.create_task(asyncio.to_thread(upgrade, url))

        def waits() -> bool:
            found = calls.execute(
                "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'usage_by_user'::regclass"
            )
            return found.fetchone() is not None

        await eventually(waits)
        calls.execute("SET statement_timeout = '3s'")
        calls.execute("UPDATE hold SET cost = 1")
        assert not upgraded.done()
        report.rollback()
        await upgraded
    assert not upgrade(url).upgrade_needed


@pytest.mark.parametrize(("release", "tens"), [(2, 2), (2, 1), (4, 1), (4, 0)])
async def test_the_schema_is_upgraded_while_calls_go_on(
    server: Postgres, release: int, tens: int
) -> None:
    """A gateway of a release before settles and forgets calls before, between and behind the
    steps; several upgrade at once, and one does it again. Every call is counted once, in its half
    of the month as well."""
    url = server.empty_database()
    days = [f"2026-11-{tens}{number}" for number in (5, 6, 7)]
    with psycopg.connect(url, autocommit=True) as old:
        make_release(old, release)
        old.execute(
            "INSERT INTO hold (rid, state, bound, cost, accounts, team, key_id, model, operation,"
            " upstream, images, price_id, fingerprint, worker, at, day, lease_ends, outcome,"
            " end_user)"
            " SELECT 'r' || n, CASE WHEN n > 30 THEN 'H' ELSE 'P' END, 9,"
            " CASE WHEN n > 30 THEN 0 ELSE 2 END, '[]', 'growth', 'k', 'm', 'edit', 'u', 3, '', '',"
            " '', 0, (%s::text[])[1 + n %% 3], 0, CASE WHEN n <= 30 THEN 'delivered' END,"
            " 'u' || n %% 2 FROM generate_series(1, 60) AS n",
            (days,),
        )
        # Five calls of a day were forgotten: they are in its sum alone.
        old.execute(
            "INSERT INTO usage_daily SELECT day, 'growth', 'k', 'm', count(*) + 5, 0, 0, 0, 0, 0,"
            " 0, sum(cost) + 10, 0, 0, 0, 0 FROM hold WHERE state = 'P' GROUP BY day"
        )
        if release >= 4:
            for day in days:
                old.execute("SELECT count_users_of_day(%s)", (day,))
                old.execute("SELECT count_forgotten_of_day(%s)", (day,))
            old.execute("SELECT count_users_of_month('2026-11')")
        stop = threading.Event()

        def go_on() -> None:
            with psycopg.connect(url, autocommit=True) as link:
                for number in range(31, 61):
                    stop.wait(0.01)
                    with link.transaction():
                        link.execute(
                            "UPDATE hold SET state = 'P', cost = 2, outcome = 'delivered'"
                            " WHERE rid = %s",
                            (f"r{number}",),
                        )
                        link.execute(
                            "UPDATE usage_daily SET requests = requests + 1, cost = cost + 2"
                            " WHERE day = %s",
                            (days[number % 3],),
                        )

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(go_on))
            for _ in range(3):
                tasks.create_task(asyncio.to_thread(upgrade, url))
    assert not upgrade(url).upgrade_needed
    store = PostgresStore.open(url)
    for since, until in (
        ("2026-11-01", "2026-11-30"),
        (days[0], days[-1]),
        ("2026-11-01", "2026-11-15") if tens == 0 else ("2026-11-14", "2026-11-30"),
    ):
        found = await store.books.usage_by_user("growth", since, until)
        assert [(one.user, one.requests, one.images, one.cost) for one in found] == [
            ("", 15, 0, 30),
            ("u0", 30, 90, 60),
            ("u1", 30, 90, 60),
        ]
    early = await store.books.usage_by_user("growth", "2026-11-01", "2026-11-15")
    assert sum(one.requests for one in early) == {0: 75, 1: 25, 2: 0}[tens]
    audited = [one.what for one in await store.books.audit()]
    assert not [what for what in audited if "and its" in what or "days 1 to 15" in what]
    await store.aclose()


async def test_nothing_is_remembered_of_a_file_that_was_disowned(server: Postgres) -> None:
    url = server.fresh_database()
    async with opened(url) as store:
        await store.ownership.record([file_named("my diary.png")])
        assert await store.ownership.disown("growth", "file-1")
        assert rows(url, "SELECT id, detail FROM owned") == [("file-1", "{}")]
