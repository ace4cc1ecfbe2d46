"""From a secret to its caller: keys of the file, keys of the directory, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from gateway.domain import keys
from gateway.domain.errors import InvalidKey, LedgerUnavailable
from gateway.domain.team import Caller, Declared, Key, Team
from gateway.relay import keyring
from gateway.relay.keyring import (
    KNOWN_SECONDS,
    MOVE_AFTER_SECONDS,
    UNKNOWN_SECONDS,
    KeyRing,
)
from tests.clock import StillClock

PEPPER = b"pepper-of-32-bytes-or-a-bit-more"
SECRET = "growth-key-0123456789abcdef"
OTHER = "design-key-0123456789abc9f2c"
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)

GROWTH = Team("growth")
KEY = Key("abc123def4", "growth", "ci", pepper=keys.pepper_id(PEPPER))
NEW_PEPPER = b"another-pepper-of-32-bytes-or-so"


class Directory:
    """Keeps keys by digest, and counts who asks; away when told to be."""

    def __init__(self) -> None:
        self.found: dict[bytes, tuple[Team, Key]] = {}
        self.asked: list[bytes] = []
        self.away = False
        self.read_only = False

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        self.asked.append(digest)
        if self.away:
            raise LedgerUnavailable("The ledger does not answer.")
        return self.found.get(digest)

    async def teams(self) -> list[Team]:
        raise NotImplementedError

    async def some_teams(self, most: int) -> list[Team]:
        raise NotImplementedError

    async def keys(self, team: str | None = None) -> list[Key]:
        raise NotImplementedError

    async def teams_behind(self, after: str, most: int) -> list[Team]:
        raise NotImplementedError

    async def keys_behind(self, after: str, most: int) -> list[tuple[Team, Key]]:
        raise NotImplementedError

    async def teams_named(self, ids: Sequence[str]) -> list[Team]:
        raise NotImplementedError

    async def keys_named(self, ids: Sequence[str]) -> list[tuple[Team, Key]]:
        raise NotImplementedError

    async def create_team(self, team: Team) -> None:
        raise NotImplementedError

    async def update_team(self, team: Team) -> None:
        raise NotImplementedError

    async def create_key(self, key: Key, digest: bytes) -> None:
        raise NotImplementedError

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        raise NotImplementedError

    async def rehash_key(self, old: bytes, new: bytes, pepper: str) -> None:
        if self.read_only:
            raise LedgerUnavailable("The ledger cannot be written.")
        if old in self.found:
            team, key = self.found.pop(old)
            self.found[new] = (team, replace(key, pepper=pepper))

    async def declared_id(self, digests: Sequence[bytes], proposed: str) -> str:
        raise NotImplementedError

    async def ping(self) -> None:
        return


class Bench:
    def __init__(self) -> None:
        self.clock = StillClock(NOW)
        self.directory = Directory()
        self.declared: dict[bytes, tuple[Team, Key]] = {}
        self.ring = self.ring_of(keys.Peppers(PEPPER))

    def ring_of(self, peppers: keys.Peppers) -> KeyRing:
        return KeyRing(peppers, Declared({}, self.declared), self.directory, self.clock)

    def keep(self, team: Team = GROWTH, key: Key = KEY, secret: str = SECRET) -> None:
        self.directory.found[keys.digest(PEPPER, secret)] = (team, key)

    def declare(self, team: Team = GROWTH, key: Key = KEY, secret: str = SECRET) -> None:
        self.declared[keys.digest(PEPPER, secret)] = (team, key)

    async def refused(self, secret: str | None = SECRET) -> str:
        with pytest.raises(InvalidKey) as refused:
            await self.ring.identify(secret)
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
        return refused.value.message

    async def known(self, secret: str = SECRET) -> bool:
        try:
            await self.ring.identify(secret)
        except InvalidKey:
            return False
        return True


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_a_key_of_the_file_is_known_without_asking(bench: Bench) -> None:
    bench.declare()
    bench.directory.away = True
    assert await bench.ring.identify(SECRET) == Caller(GROWTH, KEY)
    assert bench.directory.asked == []


async def test_a_key_of_the_directory_is_asked_for_by_its_digest(bench: Bench) -> None:
    bench.keep()
    assert await bench.ring.identify(SECRET) == Caller(GROWTH, KEY)
    assert bench.directory.asked == [keys.digest(PEPPER, SECRET)]
    assert SECRET.encode() not in bench.directory.asked[0]


async def test_the_file_goes_before_the_directory(bench: Bench) -> None:
    bench.keep(team=Team("old"))
    bench.declare(team=Team("new"))
    assert (await bench.ring.identify(SECRET)).team.id == "new"


@pytest.mark.parametrize("secret", [None, ""])
async def test_no_key(bench: Bench, secret: str | None) -> None:
    assert await bench.refused(secret) == (
        "No key came with this request. Send the key of your team as "
        "`Authorization: Bearer ...` (the SDKs read it from OPENAI_API_KEY)."
    )
    assert bench.directory.asked == []


async def test_an_unknown_key(bench: Bench) -> None:
    assert await bench.refused(OTHER) == (
        "This gateway does not know the key ...9f2c. Ask the owner of your team for one; a "
        "provider's own key does not work here."
    )


@pytest.mark.parametrize("secret", ["short", "a" * 19, "é"])
async def test_a_short_key_is_not_repeated(bench: Bench, secret: str) -> None:
    assert await bench.refused(secret) == (
        "This gateway does not know the key. Ask the owner of your team for one; a "
        "provider's own key does not work here."
    )


async def test_a_mistyped_key(bench: Bench) -> None:
    assert await bench.refused(keys.mint().secret[:-10] + "0000009f2c") == (
        "The key ...9f2c is not complete: its checksum does not fit. Copy it again, whole, or "
        "ask the owner of your team for another."
    )


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("team", "key", "text"),
    [
        (
            *(GROWTH, replace(KEY, revoked=NOW)),
            "The key abc123def4 of team growth was revoked. "
            "Ask the owner of your team for another.",
        ),
        (
            *(GROWTH, replace(KEY, disabled=True)),
            "The key abc123def4 of team growth is disabled. Ask the owner of your team.",
        ),
        (
            *(replace(GROWTH, disabled=True), KEY),
            "Team growth is disabled. Ask the gateway's operator.",
        ),
        (
            *(GROWTH, replace(KEY, expires=NOW)),
            "The key abc123def4 of team growth expired on 2026-11-22 12:00 UTC. "
            "Ask the owner of your team for another.",
        ),
        (
            *(GROWTH, replace(KEY, revoked=NOW, expires=NOW, disabled=True)),
            "The key abc123def4 of team growth was revoked. "
            "Ask the owner of your team for another.",
        ),
    ],
)
async def test_a_key_that_was_known(
    bench: Bench, declared: bool, team: Team, key: Key, text: str
) -> None:
    (bench.declare if declared else bench.keep)(team, key)
    assert await bench.refused() == text


@pytest.mark.parametrize("declared", [True, False])
async def test_a_key_expires_on_the_second(bench: Bench, declared: bool) -> None:
    key = replace(KEY, expires=NOW + timedelta(seconds=2))
    (bench.declare if declared else bench.keep)(GROWTH, key)
    bench.clock.advance(1.999)
    assert await bench.known()
    bench.clock.advance(0.001)
    # Also in the middle of the time for which it is believed.
    assert not await bench.known()


async def test_a_revocation_is_effective_in_seconds(bench: Bench) -> None:
    bench.keep()
    assert await bench.known()
    bench.keep(key=replace(KEY, revoked=NOW))
    bench.clock.advance(KNOWN_SECONDS - 0.001)
    assert await bench.known()
    assert len(bench.directory.asked) == 1
    bench.clock.advance(0.001)
    assert not await bench.known()
    assert len(bench.directory.asked) == 2


async def test_a_new_key_works_within_a_second(bench: Bench) -> None:
    assert not await bench.known()
    bench.keep()
    bench.clock.advance(UNKNOWN_SECONDS - 0.001)
    assert not await bench.known()
    assert len(bench.directory.asked) == 1
    bench.clock.advance(0.001)
    assert await bench.known()


async def test_a_directory_that_is_away_is_not_an_unknown_key(bench: Bench) -> None:
    bench.keep()
    bench.directory.away = True
    for _ in range(2):
        with pytest.raises(LedgerUnavailable):
            await bench.ring.identify(SECRET)
    bench.directory.away = False
    assert await bench.known()
    bench.directory.away = True
    assert await bench.known(), "what is believed is believed without the directory too"
    bench.clock.advance(KNOWN_SECONDS)
    with pytest.raises(LedgerUnavailable):
        await bench.ring.identify(SECRET)


async def test_guessing_fills_no_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "MAX_REMEMBERED", 10)
    bench.keep()
    assert await bench.known()
    for number in range(50):
        assert not await bench.known(f"guess-{number}")
    assert len(vars(bench.ring)["_remembered"]) == 10
    asked = len(bench.directory.asked)
    assert not await bench.known("guess-49")
    assert not await bench.known("guess-40")
    assert len(bench.directory.asked) == asked, "the last ten are remembered"
    assert await bench.known(), "and who was pushed out is asked for again"
    assert len(bench.directory.asked) == asked + 1


ROTATED = keys.Peppers(NEW_PEPPER, (b"one-that-nothing-has-any-more-32b", PEPPER))


async def test_a_key_moves_to_the_new_pepper_with_its_first_call(bench: Bench) -> None:
    bench.keep()
    bench.ring = bench.ring_of(ROTATED)
    assert (await bench.ring.identify(SECRET)).key.id == KEY.id
    moved = replace(KEY, pepper=keys.pepper_id(NEW_PEPPER))
    assert bench.directory.found == {keys.digest(NEW_PEPPER, SECRET): (GROWTH, moved)}
    bench.ring = bench.ring_of(keys.Peppers(NEW_PEPPER))
    assert await bench.ring.identify(SECRET) == Caller(GROWTH, moved)


async def test_a_key_that_cannot_be_moved_works_all_the_same(bench: Bench) -> None:
    bench.keep()
    bench.directory.read_only = True
    bench.ring = bench.ring_of(ROTATED)
    assert await bench.known()
    assert list(bench.directory.found) == [keys.digest(PEPPER, SECRET)]
    bench.directory.read_only = False
    assert await bench.known()
    bench.clock.advance(KNOWN_SECONDS)
    assert await bench.known()
    assert list(bench.directory.found) == [keys.digest(NEW_PEPPER, SECRET)]


async def test_a_key_of_an_earlier_release_is_told_its_pepper(bench: Bench) -> None:
    bench.keep(key=replace(KEY, pepper=""))
    assert await bench.known()
    assert bench.directory.found == {keys.digest(PEPPER, SECRET): (GROWTH, KEY)}


async def test_without_its_pepper_a_key_is_unknown(bench: Bench) -> None:
    bench.keep()
    bench.ring = bench.ring_of(keys.Peppers(NEW_PEPPER))
    assert not await bench.known()


async def test_a_key_that_moves_while_it_is_looked_up_is_found(bench: Bench) -> None:
    """Another process goes by the pepper that this one calls old."""
    bench.directory.found[keys.digest(NEW_PEPPER, SECRET)] = (GROWTH, KEY)
    asked = bench.directory.find_key

    async def find_key(digest: bytes) -> tuple[Team, Key] | None:
        found = await asked(digest)
        if len(bench.directory.asked) == 1:
            await bench.directory.rehash_key(
                keys.digest(NEW_PEPPER, SECRET), keys.digest(PEPPER, SECRET), KEY.pepper
            )
        return found

    bench.directory.find_key = find_key  # type: ignore[method-assign]
    bench.ring = bench.ring_of(keys.Peppers(PEPPER, (NEW_PEPPER,)))
    assert await bench.known()


async def test_new_peppers_move_nothing_before_every_worker_has_them(bench: Bench) -> None:
    bench.keep()
    assert await bench.known()
    bench.ring.replace(ROTATED, Declared())
    bench.clock.advance(MOVE_AFTER_SECONDS - 0.001)
    assert await bench.known()
    assert list(bench.directory.found) == [keys.digest(PEPPER, SECRET)]
    bench.clock.advance(KNOWN_SECONDS)
    assert await bench.known()
    assert list(bench.directory.found) == [keys.digest(NEW_PEPPER, SECRET)]


async def test_what_the_file_declares_is_replaced_whole(bench: Bench) -> None:
    bench.declare()
    assert await bench.known()
    assert not await bench.known(OTHER)
    other = (Team("design"), Key("def456", "design"))
    declared = Declared({"design": other[0]}, {keys.digest(PEPPER, OTHER): other})
    bench.ring.replace(keys.Peppers(PEPPER), declared)
    assert bench.ring.declared is declared
    assert await bench.ring.identify(OTHER) == Caller(*other), "also where it was just unknown"
    assert not await bench.known()
