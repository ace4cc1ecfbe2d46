"""What every ``Directory`` promises. A new store joins with one factory in ``BACKENDS``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from gateway.domain.team import Key, Limits, Team
from gateway.ports import AlreadyExists, Directory, NotKnown
from gateway.stores.memory_ledger import MemoryDirectory
from gateway.stores.sqlite import SQLiteStore


@asynccontextmanager
async def memory(folder: Path) -> AsyncIterator[Directory]:
    yield MemoryDirectory()


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Directory]:
    store = SQLiteStore.open(folder / "gateway.db")
    yield store.directory
    await store.aclose()


BACKENDS: dict[str, Callable[[Path], AbstractAsyncContextManager[Directory]]] = {
    "memory": memory,
    "sqlite": sqlite,
}

AT = datetime(2026, 11, 22, 12, 30, 15, 123456, tzinfo=UTC)
LIMITS = Limits(60, 20, 10, budget_day=5_000_000_000, budget_month=2**62, max_cost_per_request=1)
GROWTH = Team("growth", frozenset({"flare", "team-art"}), LIMITS, cache_enabled=False)
ART = Team("art", disabled=True)
CI = Key(
    "k_ci",
    "growth",
    "ci",
    models=frozenset({"flare"}),
    limits=Limits(budget_day=1),
    created=AT,
    expires=AT + timedelta(days=40),
    disabled=True,
)
PLAIN = Key("k_plain", "growth")


@pytest.fixture(params=BACKENDS)
async def directory(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Directory]:
    async with BACKENDS[request.param](tmp_path) as opened:
        yield opened


async def test_everything_comes_back_as_it_went_in(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_team(ART)
    await directory.create_key(PLAIN, b"\x00\xff")
    await directory.create_key(CI, b"\x01")
    assert await directory.teams() == [ART, GROWTH]
    assert await directory.keys() == [CI, PLAIN]
    assert await directory.find_key(b"\x00\xff") == (GROWTH, PLAIN)
    assert await directory.find_key(b"\x01") == (GROWTH, CI)


async def test_an_unknown_digest(directory: Directory) -> None:
    assert await directory.find_key(b"\x01") is None


async def test_keys_of_one_team(directory: Directory) -> None:
    for team in (GROWTH, ART):
        await directory.create_team(team)
    await directory.create_key(PLAIN, b"\x01")
    await directory.create_key(Key("k_art", "art"), b"\x02")
    assert await directory.keys("art") == [Key("k_art", "art")]
    assert [key.id for key in await directory.keys()] == ["k_art", "k_plain"]
    assert await directory.keys("nobody") == []


async def test_no_models_is_not_any_model(directory: Directory) -> None:
    await directory.create_team(replace(GROWTH, models=frozenset()))
    await directory.create_key(replace(PLAIN, models=frozenset()), b"\x01")
    found = await directory.find_key(b"\x01")
    assert found is not None
    assert (found[0].models, found[1].models) == (frozenset(), frozenset())


async def test_a_team_twice(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    with pytest.raises(AlreadyExists):
        await directory.create_team(Team("growth"))
    assert await directory.teams() == [GROWTH]


async def test_updating_a_team_replaces_it(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_key(PLAIN, b"\x01")
    changed = Team("growth", disabled=True)
    await directory.update_team(changed)
    assert await directory.find_key(b"\x01") == (changed, PLAIN)
    with pytest.raises(NotKnown):
        await directory.update_team(ART)
    assert await directory.teams() == [changed]


async def test_a_key_twice_by_id_or_by_digest(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_key(PLAIN, b"\x01")
    with pytest.raises(AlreadyExists):
        await directory.create_key(replace(CI, id="k_plain"), b"\x02")
    with pytest.raises(AlreadyExists):
        await directory.create_key(CI, b"\x01")
    assert await directory.keys() == [PLAIN]


async def test_a_key_needs_its_team(directory: Directory) -> None:
    with pytest.raises(NotKnown):
        await directory.create_key(PLAIN, b"\x01")
    assert await directory.find_key(b"\x01") is None


async def test_revoking_twice_keeps_the_first_date(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_key(PLAIN, b"\x01")
    revoked = replace(PLAIN, revoked=AT)
    assert await directory.revoke_key("k_plain", AT) == revoked
    assert await directory.revoke_key("k_plain", AT + timedelta(days=1)) == revoked
    assert await directory.find_key(b"\x01") == (GROWTH, revoked)
    with pytest.raises(NotKnown):
        await directory.revoke_key("nobody", AT)


async def test_instants_are_kept_whatever_their_zone(directory: Directory) -> None:
    tokyo = timezone(timedelta(hours=9))
    await directory.create_team(GROWTH)
    await directory.create_key(replace(PLAIN, created=AT.astimezone(tokyo)), b"\x01")
    assert await directory.keys() == [replace(PLAIN, created=AT)]


async def test_what_a_command_made_is_never_called_declared(directory: Directory) -> None:
    await directory.create_team(replace(GROWTH, declared=True))
    await directory.create_key(replace(PLAIN, declared=True), b"\x01")
    assert await directory.find_key(b"\x01") == (GROWTH, PLAIN)


async def test_the_same_team_from_many_at_once(directory: Directory) -> None:
    answers = await asyncio.gather(
        *(directory.create_team(GROWTH) for _ in range(10)), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 1
    assert sum(isinstance(answer, AlreadyExists) for answer in answers) == 9


async def test_ping(directory: Directory) -> None:
    await directory.ping()
