"""Whose an id is, and where it lives."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from gateway.domain.call import Call, Encoding, InputImage, Operation, Reference
from gateway.domain.errors import InvalidRequest, NotOwned
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.team import Caller, Key, Team
from gateway.ports import Credential
from gateway.relay.inputs import from_id
from gateway.relay.references import References, keys_at
from gateway.stores.memory_ownership import MemoryOwnership
from gateway.stores.memory_rows import MemoryRows
from tests.clock import StillClock

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
HERE, THERE = Anchor("openai", "m1"), Anchor("azure", "m2")
CALLER = Caller(Team("growth"), Key("k1", "growth"))


def owned(id: str, anchor: Anchor = HERE, team: str = "growth", size: int = 7) -> Owned:
    return Owned(id, OwnedKind.FILE, team, "k1", anchor, NOON, size_bytes=size)


def call_of(*ids: str) -> Call:
    return Call(
        Operation.EDIT, Encoding.JSON, "application/json", "m", 1, {},
        inputs=(InputImage("image", "d", 5, "image/png"), *(from_id(id, "image") for id in ids)),
        references=tuple(
            Reference("file", id, f"images[{place}].file_id") for place, id in enumerate(ids, 1)
        ),
    )  # fmt: skip


async def looked_up(*rows: Owned) -> tuple[References, list[OwnedKind]]:
    ownership, denied = MemoryOwnership(MemoryRows()), list[OwnedKind]()
    await ownership.record(rows)
    return References(ownership, StillClock(NOON), denied.append), denied


async def test_a_call_that_names_nothing_is_as_it_was() -> None:
    references, _ = await looked_up()
    call = call_of()
    assert await references.resolve(CALLER, call) == (call, None, {})


async def test_sizes_come_from_the_rows() -> None:
    references, _ = await looked_up(owned("a"), owned("b", size=0))
    resolved = await references.resolve(CALLER, call_of("a", "b", "a"))
    # None is 0: that would be a picture known by its address alone.
    assert [one.size_bytes for one in resolved.call.inputs] == [5, 7, 1, 7]
    assert resolved.anchor == HERE
    assert resolved.owned.keys() == {"a", "b"}


async def test_keys_of_one_upstream_may_be_mixed_and_upstreams_not() -> None:
    references, _ = await looked_up(
        owned("a"), owned("b", Anchor("openai", "m9")), owned("c", THERE)
    )
    assert (await references.resolve(CALLER, call_of("b", "a"))).anchor == Anchor("openai", "m9")
    with pytest.raises(InvalidRequest) as refused:
        await references.resolve(CALLER, call_of("a", "c"))
    assert (refused.value.code, refused.value.param) == ("mixed_upstreams", "images[2].file_id")


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        (None, []),
        (owned("b", team="design"), [OwnedKind.FILE]),
        (replace(owned("b"), kind=OwnedKind.RESPONSE), []),
        (replace(owned("b"), expires=NOON), []),
        (replace(owned("b", team="design"), expires=NOON), []),
    ],
)
async def test_what_is_not_the_teams_is_not_there(
    row: Owned | None, counted: list[OwnedKind]
) -> None:
    references, denied = await looked_up(owned("a"), *([row] if row else []))
    with pytest.raises(NotOwned) as refused:
        await references.resolve(CALLER, call_of("a", "b"))
    assert (refused.value.message, refused.value.param) == (
        "No such File object: b",
        "images[2].file_id",
    )
    assert denied == counted


@pytest.mark.parametrize(
    ("named", "is_there", "found"),
    [
        (OwnedKind.ITEM, OwnedKind.ITEM, True),
        (OwnedKind.ITEM, OwnedKind.PICTURE, True),
        (OwnedKind.PICTURE, OwnedKind.ITEM, False),
        (OwnedKind.ITEM, OwnedKind.RESPONSE, False),
        (OwnedKind.ITEM, OwnedKind.FILE, False),
    ],
)
async def test_a_picture_is_an_item_too(named: OwnedKind, is_there: OwnedKind, found: bool) -> None:
    references, _ = await looked_up(replace(owned("b"), kind=is_there))
    call = replace(call_of(), references=(Reference(named.value, "b", "input[0].id"),))
    if found:
        assert (await references.resolve(CALLER, call)).owned["b"].kind is is_there
        return
    with pytest.raises(NotOwned):
        await references.resolve(CALLER, call)


def test_the_key_that_made_it_or_any_where_that_is_gone() -> None:
    one, two = Credential("1", mark="m1"), Credential("2", mark="m2")
    assert keys_at((one, two), None) == (one, two)
    assert list(keys_at((one, two), Anchor("openai", "m2"))) == [two]
    assert list(keys_at((one, two), Anchor("openai", "m3"))) == [one, two]
    sandbox = Credential("-")
    assert list(keys_at((sandbox,), Anchor("sandbox", ""))) == [sandbox]
