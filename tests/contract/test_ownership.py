"""What every ``Ownership`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta, timezone

import psycopg
import pytest

from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.ports import Ownership
from tests.contract.stores import NOON, SPOILERS

SECOND = timedelta(seconds=1)
FILE, RESPONSE, PICTURE = OwnedKind.FILE, OwnedKind.RESPONSE, OwnedKind.PICTURE
AT_OPENAI = Anchor("openai", "0123456789abcdef")
CAT = Owned(
    "file-cat",
    FILE,
    "growth",
    "k1",
    AT_OPENAI,
    NOON,
    size_bytes=2**40,
    detail={"purpose": "vision", "filename": "\x00 \ud800 é \U0001f5bc.png", "n": [1, 1.5, None]},
)
ANSWER = Owned(
    "resp_1",
    RESPONSE,
    "growth",
    "k2",
    Anchor("azure", ""),
    NOON + timedelta(microseconds=1),
    NOON + 30 * SECOND,
    detail={"context_tokens": 812, "pictures": 1},
)


def file(number: int, purpose: str = "vision", team: str = "growth") -> Owned:
    """Two are made in each second, so that their ids decide."""
    return replace(
        CAT,
        id=f"file-{number}",
        team=team,
        created=NOON + number // 2 * SECOND,
        size_bytes=number,
        detail={"purpose": purpose},
    )


async def listed(ownership: Ownership, **asked: object) -> list[str]:
    page = {"limit": 100, **asked}
    return [one.id for one in await ownership.owned("growth", FILE, NOON, **page)]  # type: ignore[arg-type]


async def test_everything_comes_back_as_it_went_in(ownership: Ownership) -> None:
    picture = replace(ANSWER, id="ig_1", kind=PICTURE, detail={})
    await ownership.record([CAT, ANSWER, picture])
    asked = ["resp_1", "ig_1", "file-cat", "file-cat", "nobody's"]
    expected = {one.id: one for one in (CAT, ANSWER, picture)}
    assert await ownership.find("growth", asked, NOON) == expected
    assert await ownership.find("growth", [], NOON) == {}
    await ownership.record([])


async def test_what_belongs_to_another_team_is_nobodys(ownership: Ownership) -> None:
    await ownership.record([CAT])
    assert await ownership.find("art", ["file-cat"], NOON) == {}
    assert await ownership.owned("art", FILE, NOON, limit=10) == []
    assert await ownership.owned("growth", RESPONSE, NOON, limit=10) == []
    assert await ownership.total_bytes("art", FILE, NOON) == 0
    assert not await ownership.disown("art", "file-cat")
    assert await ownership.find("growth", ["file-cat"], NOON) == {"file-cat": CAT}


async def test_an_id_stays_its_owners(ownership: Ownership) -> None:
    await ownership.record([CAT])
    stolen = replace(CAT, team="art", expires=NOON + SECOND, size_bytes=1, detail={})
    await ownership.record([stolen, replace(ANSWER, team="art")])
    assert await ownership.find("growth", ["file-cat"], NOON) == {"file-cat": CAT}
    assert list(await ownership.find("art", ["file-cat", "resp_1"], NOON)) == ["resp_1"]


async def test_its_owner_replaces_what_may_change(ownership: Ownership) -> None:
    await ownership.record([CAT])
    changed = replace(CAT, expires=NOON + SECOND, size_bytes=7, detail={"purpose": "user_data"})
    moved = replace(
        changed, kind=RESPONSE, key_id="k9", anchor=Anchor("azure", "9"), created=NOON + SECOND
    )
    await ownership.record([moved])
    assert await ownership.find("growth", ["file-cat"], NOON) == {"file-cat": changed}
    assert await listed(ownership, purpose="user_data") == ["file-cat"]
    assert await listed(ownership, purpose="vision") == []
    await ownership.record([CAT])
    assert await ownership.find("growth", ["file-cat"], NOON) == {"file-cat": CAT}


async def test_one_id_twice_at_once(ownership: Ownership) -> None:
    await ownership.record([CAT, replace(CAT, size_bytes=3), replace(CAT, team="art")])
    found = await ownership.find("growth", ["file-cat"], NOON)
    assert found == {"file-cat": replace(CAT, size_bytes=3)}


async def test_what_has_expired_is_nobodys(ownership: Ownership) -> None:
    over = replace(CAT, expires=NOON + SECOND)
    await ownership.record([over, file(1)])
    assert list(await ownership.find("growth", ["file-cat"], NOON)) == ["file-cat"]
    for later in (NOON + SECOND, NOON + 2 * SECOND):
        assert await ownership.find("growth", ["file-cat"], later) == {}
        assert await ownership.owned("growth", FILE, later, limit=10) == [file(1)]
        assert await ownership.total_bytes("growth", FILE, later) == 1
    assert await ownership.total_bytes("growth", FILE, NOON) == 2**40 + 1


async def test_pages_in_both_directions(ownership: Ownership) -> None:
    await ownership.record([file(number) for number in (3, 1, 4, 0, 2, 5)])
    newest = [f"file-{number}" for number in (5, 4, 3, 2, 1, 0)]
    for newest_first, all_of_them in ((True, newest), (False, newest[::-1])):
        for limit in (1, 2, 4, 6, 7):
            seen: list[str] = []
            while page := await listed(
                ownership,
                limit=limit,
                after=seen[-1] if seen else "",
                newest_first=newest_first,
            ):
                assert len(page) <= limit
                seen += page
            assert seen == all_of_them


async def test_a_page_of_one_purpose(ownership: Ownership) -> None:
    await ownership.record(
        [file(number, ("vision", "user_data")[number % 2]) for number in range(6)]
    )
    await ownership.record(
        [replace(CAT, detail={"purpose": ["vision"]}), replace(ANSWER, kind=FILE)]
    )
    assert await listed(ownership, purpose="vision") == ["file-4", "file-2", "file-0"]
    assert await listed(ownership, purpose="vision", limit=1, after="file-3") == ["file-2"]
    assert await listed(ownership, purpose="batch") == []


async def test_a_page_behind_what_is_gone(ownership: Ownership) -> None:
    """A client that deletes what it lists goes on where it was."""
    await ownership.record([file(number) for number in range(6)])
    page = await listed(ownership, limit=2)
    for id in page:
        assert await ownership.disown("growth", id)
    assert await listed(ownership, after=page[-1]) == ["file-3", "file-2", "file-1", "file-0"]
    await ownership.record([replace(file(2), expires=NOON)])
    assert await listed(ownership, after="file-2") == ["file-1", "file-0"]


@pytest.mark.parametrize("after", ["nobody's", "file-art", "resp_1"])
async def test_a_page_behind_what_was_never_there(ownership: Ownership, after: str) -> None:
    """Neither another team's id nor one of another kind says where it would stand."""
    await ownership.record([file(1), replace(CAT, id="file-art", team="art"), ANSWER])
    assert await listed(ownership, after=after) == []


async def test_disowned_is_gone(ownership: Ownership) -> None:
    await ownership.record([CAT, file(1)])
    assert await ownership.disown("growth", "file-cat")
    assert not await ownership.disown("growth", "file-cat")
    assert not await ownership.disown("growth", "nobody's")
    assert await ownership.find("growth", ["file-cat", "file-1"], NOON) == {"file-1": file(1)}
    assert await ownership.total_bytes("growth", FILE, NOON) == 1
    # Nor does another team come by it.
    await ownership.record([replace(CAT, team="art")])
    assert await ownership.find("art", ["file-cat"], NOON) == {}
    assert await ownership.forget_expired(NOON) == 1


async def test_what_has_expired_is_deleted_in_batches(ownership: Ownership) -> None:
    await ownership.record(
        [replace(file(number), expires=NOON + number * SECOND) for number in range(5)]
    )
    await ownership.record([file(7), CAT])
    assert await ownership.disown("growth", "file-7")
    later = NOON + 3 * SECOND
    assert await ownership.forget_expired(later, limit=3) == 3
    assert await ownership.forget_expired(later, limit=3) == 2
    assert await ownership.forget_expired(later, limit=3) == 0
    assert await listed(ownership) == ["file-4", "file-cat"]


@pytest.mark.parametrize("id", ["a\0b", "\ud800", "", "x" * 100_000, "'; DROP TABLE owned; --"])
async def test_ids_that_no_provider_makes(ownership: Ownership, id: str) -> None:
    await ownership.record([CAT])
    assert list(await ownership.find("growth", [id, "file-cat"], NOON)) == ["file-cat"]
    assert not await ownership.disown("growth", id)
    assert await listed(ownership, after=id) == ([] if id else ["file-cat"])


async def test_instants_are_kept_whatever_their_zone(ownership: Ownership) -> None:
    tokyo = timezone(timedelta(hours=9))
    there = replace(
        ANSWER,
        created=ANSWER.created.astimezone(tokyo),
        expires=(NOON + 30 * SECOND).astimezone(tokyo),
    )
    await ownership.record([there])
    assert await ownership.find("growth", ["resp_1"], NOON.astimezone(tokyo)) == {"resp_1": ANSWER}


async def test_many_ids_in_one_look_up(ownership: Ownership) -> None:
    many = [file(number) for number in range(300)]
    await ownership.record(many)
    found = await ownership.find("growth", [one.id for one in many], NOON)
    assert found == {one.id: one for one in many}


async def test_the_same_ids_from_many_at_once(ownership: Ownership) -> None:
    """They meet in another order each, and nobody waits for ever."""
    batch = [file(number) for number in range(20)]
    await asyncio.gather(
        *(ownership.record(batch[turn:] + batch[:turn]) for turn in range(len(batch)))
    )
    assert await ownership.total_bytes("growth", FILE, NOON) == sum(range(20))


@pytest.mark.parametrize("store", SPOILERS, indirect=True)
async def test_all_of_them_or_none(ownership: Ownership) -> None:
    with pytest.raises((OverflowError, psycopg.DataError)):
        await ownership.record([file(1), replace(CAT, size_bytes=2**70)])
    assert await listed(ownership) == []


async def test_who_reaches_for_anothers_id_is_told_from_who_is_mistaken(
    ownership: Ownership,
) -> None:
    await ownership.record([CAT, replace(ANSWER, team="design"), file(2, team="design")])
    asked = [CAT.id, ANSWER.id, "file-2", "file-nobody", "\x00"]
    assert await ownership.others("growth", asked, NOON) == {ANSWER.id, "file-2"}
    assert await ownership.others("design", asked, NOON) == {CAT.id}
    assert await ownership.others("growth", asked, NOON + 30 * SECOND) == {"file-2"}
    assert await ownership.others("growth", [], NOON) == frozenset()
