"""Keys of our own: their form, their checksum, and what may be shown of them."""

from __future__ import annotations

import hashlib
import hmac
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.keys import (
    MIN_SECRET_CHARS,
    Peppers,
    PepperState,
    declared_id,
    digest,
    is_mistyped,
    mint,
    pepper_id,
    pepper_state,
    tail,
)
from gateway.domain.team import Key

FORM = re.compile(r"igw_(?P<env>[a-z]+)_(?P<id>[0-9a-z]{10})_[0-9A-Za-z]{32}_[0-9A-Za-z]{6}")
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_ ."
START = len("igw_")


@pytest.mark.parametrize("env", ["live", "test"])
def test_a_key_says_what_it_is(env: str) -> None:
    minted = mint(env)
    form = FORM.fullmatch(minted.secret)
    assert form is not None
    assert (form["env"], form["id"]) == (env, minted.id)
    assert not is_mistyped(minted.secret)


def test_no_two_keys_are_alike() -> None:
    minted = [mint() for _ in range(200)]
    assert len({one.secret for one in minted}) == len({one.id for one in minted}) == 200


def test_every_wrong_character_is_noticed() -> None:
    secret = mint().secret
    for at in range(START, len(secret)):
        for letter in LETTERS.replace(secret[at], ""):
            assert is_mistyped(secret[:at] + letter + secret[at + 1 :]), (secret, at, letter)


def test_every_missing_doubled_or_swapped_character_is_noticed() -> None:
    secret = mint().secret
    for at in range(START, len(secret)):
        before, here, after = secret[:at], secret[at], secret[at + 1 :]
        assert is_mistyped(before + here + here + after), at
        if not after.startswith(here):
            assert is_mistyped(before + after), at
        if after and after[0] != here:
            assert is_mistyped(before + after[0] + here + after[1:]), at


@pytest.mark.parametrize("cut", [1, 4, 5, 9, 20, 30, 50, 55])
def test_half_a_key_is_noticed(cut: int) -> None:
    assert is_mistyped(mint().secret[:-cut])


@pytest.mark.parametrize(
    "foreign", ["", "sk-proj-0123456789abcdef", "growth-key-0123456789abcdef", "Igw_live_1", "igw"]
)
def test_a_key_of_another_make_is_not_called_mistyped(foreign: str) -> None:
    assert not is_mistyped(foreign)


@pytest.mark.parametrize("odd", ["igw_", "igw_x", "igw_live_ä_ö", "igw__", "igw_\udcff_\udcff"])
def test_no_text_is_too_odd_to_look_at(odd: str) -> None:
    assert is_mistyped(odd)
    assert len(digest(b"pepper", odd)) == 32


def test_the_digest_is_an_hmac_under_the_pepper() -> None:
    assert digest(b"pepper", "s") == hmac.new(b"pepper", b"s", hashlib.sha256).digest()
    assert digest(b"pepper", "s") != digest(b"other", "s")
    assert digest(b"pepper", "s") != digest(b"pepper", "S")


def test_a_declared_key_keeps_its_id() -> None:
    # These stand in ledgers: another alphabet or length would part a key from its past.
    assert declared_id(digest(b"pepper", "growth-key")) == "bw06un2qm4"
    assert declared_id(bytes(32)) == "0000000000"


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_declared_ids_are_public_ids(one: bytes, other: bytes) -> None:
    assert re.fullmatch("[0-9a-z]{10}", declared_id(one))
    assert declared_id(one) == declared_id(bytes(one))
    if one[:8] != other[:8]:
        same = int.from_bytes(one[:8]) % 36**10 == int.from_bytes(other[:8]) % 36**10
        assert (declared_id(one) == declared_id(other)) is same


@settings(max_examples=300)
@given(st.text(max_size=80))
def test_a_tail_shows_four_characters_of_a_long_secret_and_none_of_a_short_one(text: str) -> None:
    shown = tail(text)
    assert shown == ("" if len(text) < MIN_SECRET_CHARS else text[-4:])
    assert len(shown) * 5 <= len(text)


def test_a_peppers_id_tells_nothing_and_stays() -> None:
    assert pepper_id(b"pepper") == hashlib.sha256(b"pepper-idpepper").hexdigest()[:8]
    peppers = Peppers(b"new", (b"newer", b"oldest"))
    assert peppers.ids == (pepper_id(b"new"), pepper_id(b"newer"), pepper_id(b"oldest"))
    assert peppers.digests("s") == tuple(digest(one, "s") for one in (b"new", b"newer", b"oldest"))
    assert (peppers.oldest, Peppers(b"new").oldest) == (b"oldest", b"new")
    assert "new" not in repr(peppers)


@pytest.mark.parametrize(
    ("pepper", "declared", "old", "state"),
    [
        (b"new", False, (b"old",), PepperState.CURRENT),
        (b"old", False, (b"old",), PepperState.OLD),
        (b"old", False, (), PepperState.LOST),
        (b"", False, (), PepperState.CURRENT),
        (b"", False, (b"old",), PepperState.OLD),
        (b"", True, (b"old",), PepperState.CURRENT),
    ],
)
def test_which_pepper_a_key_needs(
    pepper: bytes, declared: bool, old: tuple[bytes, ...], state: PepperState
) -> None:
    key = Key("k", "growth", declared=declared, pepper=pepper_id(pepper) if pepper else "")
    assert pepper_state(key, Peppers(b"new", old)) is state
