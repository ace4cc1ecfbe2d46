"""What every ``Directory`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from gateway.domain.team import Key, Limits, PerUser, Team
from gateway.ports import AlreadyExists, Directory, NotKnown

AT = datetime(2026, 11, 22, 12, 30, 15, 123456, tzinfo=UTC)
LIMITS = Limits(60, 20, 10, budget_day=5_000_000_000, budget_month=2**62, max_cost_per_request=1)
GROWTH = Team("growth", frozenset({"flare", "team-art"}), LIMITS, cache_enabled=False)
ART = Team(
    "art",
    disabled=True,
    time_zone="Asia/Tokyo",
    per_user=PerUser(Limits(images_per_minute=5, budget_day=2**62), required=True),
)
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


async def test_everything_comes_back_as_it_went_in(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_team(ART)
    await directory.create_key(PLAIN, b"\x00\xff")
    await directory.create_key(CI, b"\x01")
    assert await directory.teams() == [ART, GROWTH]
    assert await directory.keys() == [CI, PLAIN]
    assert await directory.find_key(b"\x00\xff") == (GROWTH, PLAIN)
    assert await directory.find_key(b"\x01") == (GROWTH, CI)


async def test_some_teams_are_the_first_that_may_spend(directory: Directory) -> None:
    for team in (GROWTH, ART, Team("brand"), Team("zoo")):
        await directory.create_team(team)
    assert await directory.some_teams(2) == [Team("brand"), GROWTH]
    assert await directory.some_teams(0) == []
    assert [team.id for team in await directory.some_teams(9)] == ["brand", "growth", "zoo"]


async def test_pages_of_everybody_by_name(directory: Directory) -> None:
    brand, zoo = Team("brand"), Team("zoo", limits=Limits(soft_budget_total=0))
    for team in (GROWTH, ART, brand, zoo):
        await directory.create_team(team)
    art, soft = Key("k_art", "art"), Key("k_soft", "zoo", limits=Limits(soft_budget_week=3))
    for number, key in enumerate((soft, CI, PLAIN, art)):
        await directory.create_key(key, bytes([number]))
    assert await directory.teams_behind("", 3) == [ART, brand, GROWTH]
    assert await directory.teams_behind("growth", 3) == [zoo]
    assert await directory.teams_behind("zoo", 3) == []
    assert await directory.keys_behind("", 2) == [(ART, art), (GROWTH, CI)]
    assert await directory.keys_behind("k_ci", 5) == [(GROWTH, PLAIN), (zoo, soft)]
    assert await directory.keys_behind("k_soft", 5) == []


async def test_teams_and_keys_of_these_names(directory: Directory) -> None:
    for team in (GROWTH, ART):
        await directory.create_team(team)
    for number, key in enumerate((CI, PLAIN)):
        await directory.create_key(key, bytes([number]))
    assert await directory.teams_named(["art", "nobody"]) == [ART]
    assert await directory.teams_named([]) == []
    assert await directory.keys_named(["nobody", "k_plain"]) == [(GROWTH, PLAIN)]
    assert await directory.keys_named([]) == []


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


async def test_a_key_moves_to_another_pepper(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    await directory.create_key(PLAIN, b"old")
    await directory.create_key(CI, b"other")
    await directory.rehash_key(b"old", b"new", "0123abcd")
    moved = replace(PLAIN, pepper="0123abcd")
    assert await directory.find_key(b"new") == (GROWTH, moved)
    assert await directory.find_key(b"old") is None
    # Two replicas do so at once, and whoever comes second finds nothing to do.
    await directory.rehash_key(b"old", b"new", "0123abcd")
    await directory.rehash_key(b"nobody's", b"new", "0123abcd")
    assert await directory.find_key(b"new") == (GROWTH, moved)
    assert await directory.find_key(b"other") == (GROWTH, CI)
    # One of an earlier release did not say its pepper.
    await directory.rehash_key(b"other", b"other", "4567cdef")
    assert await directory.find_key(b"other") == (GROWTH, replace(CI, pepper="4567cdef"))
    assert await directory.keys() == [replace(CI, pepper="4567cdef"), moved]


async def test_a_key_says_its_pepper(directory: Directory) -> None:
    await directory.create_team(GROWTH)
    made = replace(PLAIN, pepper="0123abcd")
    await directory.create_key(made, b"1")
    assert await directory.find_key(b"1") == (GROWTH, made)
    assert await directory.revoke_key("k_plain", AT) == replace(made, revoked=AT)


async def test_the_id_of_a_declared_key_outlives_two_peppers(directory: Directory) -> None:
    assert await directory.declared_id([b"1"], "k_first") == "k_first"
    assert await directory.declared_id([b"1"], "k_other") == "k_first"
    assert await directory.declared_id([b"2", b"1"], "k_second") == "k_first"
    # The first pepper is thrown away, and a third one comes.
    assert await directory.declared_id([b"3", b"2"], "k_third") == "k_first"
    assert await directory.declared_id([b"3"], "k_third") == "k_first"
    assert await directory.declared_id([b"stranger"], "k_stranger") == "k_stranger"


async def test_the_newest_pepper_says_whose_id_it_is(directory: Directory) -> None:
    await directory.declared_id([b"old"], "k_old")
    await directory.declared_id([b"new"], "k_new")
    assert await directory.declared_id([b"new", b"old"], "k_proposed") == "k_new"
    assert await directory.declared_id([b"old"], "k_proposed") == "k_old"


async def test_many_replicas_agree_on_a_declared_id(directory: Directory) -> None:
    answers = await asyncio.gather(
        *(directory.declared_id([b"2", b"1"], f"k_{number}") for number in range(20))
    )
    assert len(set(answers)) == 1


async def test_ping(directory: Directory) -> None:
    await directory.ping()
