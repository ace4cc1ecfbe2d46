"""Every cell of money.md 3's table, and what each move does to the daily roll-up."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.books import Correction
from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import (
    Balance,
    Basis,
    Denied,
    Event,
    Line,
    Outcome,
    Part,
    Replay,
    Reroute,
    Route,
    Settlement,
    State,
)
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.domain.transition import (
    Bump,
    Counts,
    Move,
    by_model,
    contradicts,
    corrected,
    corrected_part,
    correction,
    correction_counts,
    counted,
    counted_replay,
    expiry,
    no_room,
    no_room_elsewhere,
    replay_by_model,
    rerouted,
    settled_part,
    transition,
    usage_day,
    yields_key,
)

H, P, V, X = State.HELD, State.POSTED, State.VOIDED, State.EXPIRED
SETTLE, VOID, EXPIRE = Event.SETTLE, Event.VOID, Event.EXPIRE

# A bound of 10; the call did cost 7. What is posted before: H 0, X 10, P 7, V 0.
POSTED_BEFORE = {H: 0, X: 10, P: 7, V: 0}


@pytest.mark.parametrize(
    ("state", "event", "move"),
    [
        (H, SETTLE, Move(P, 7, pending=-10, posted=7)),
        (H, VOID, Move(V, 0, pending=-10)),
        (H, EXPIRE, Move(X, 10, pending=-10, posted=10)),
        (X, SETTLE, Move(P, 7, posted=-3)),
        (X, VOID, Move(V, 0, posted=-10)),
        (X, EXPIRE, Move(X, 10, applied=False)),
        (P, SETTLE, Move(P, 7, applied=False)),
        (P, VOID, Move(P, 7, applied=False)),
        (P, EXPIRE, Move(P, 7, applied=False)),
        (V, SETTLE, Move(V, 0, applied=False)),
        (V, VOID, Move(V, 0, applied=False)),
        (V, EXPIRE, Move(V, 0, applied=False)),
    ],
)
def test_the_table(state: State, event: Event, move: Move) -> None:
    assert transition(state, event, 10, POSTED_BEFORE[state], 7) == move


def test_more_than_the_bound_is_posted_in_full() -> None:
    assert transition(H, SETTLE, 10, 0, 25) == Move(P, 25, pending=-10, posted=25)
    assert transition(X, SETTLE, 10, 10, 25) == Move(P, 25, posted=15)


amounts = st.integers(0, 2**62)


@given(
    bound=amounts,
    events=st.lists(st.tuples(st.sampled_from(Event), amounts), max_size=6),
)
def test_the_sums_of_the_moves_are_the_hold(bound: int, events: list[tuple[Event, int]]) -> None:
    state, cost, pending, posted = H, 0, bound, 0
    for event, amount in events:
        move = transition(state, event, bound, cost, amount)
        state, cost = move.state, move.cost
        pending, posted = pending + move.pending, posted + move.posted
        assert pending == (bound if state is H else 0)
        assert posted == cost


@pytest.mark.parametrize(
    ("state", "event", "new_cost", "alarm"),
    [
        (P, SETTLE, 7, False),
        (P, SETTLE, 8, True),
        (P, VOID, 7, True),
        (P, EXPIRE, 10, False),
        (V, SETTLE, 0, False),
        (V, SETTLE, 7, True),
        (V, VOID, 7, False),
        (V, EXPIRE, 10, False),
        (H, SETTLE, 8, False),
        (X, SETTLE, 8, False),
        (X, EXPIRE, 9, False),
    ],
)
def test_a_repeat_that_names_another_amount(
    state: State, event: Event, new_cost: int, alarm: bool
) -> None:
    assert contradicts(state, event, POSTED_BEFORE[state], new_cost) is alarm


def settlement(event: Event, cost: int = 0, *flags: str) -> Settlement:
    usage = Usage(text_in=1, image_in=2, text_out=3, image_out=4)
    return Settlement(
        "r", event, Outcome.DELIVERED, Basis.USAGE, cost, usage, images=5, flags=flags
    )


def test_what_each_state_counts() -> None:
    posted = settlement(SETTLE, 7, "soft")
    assert counted(P, 7, posted, posted.flags) == Counts(
        requests=1, images=5, text_in=1, image_in=2, text_out=3, image_out=4, cost=7
    )
    assert counted(X, 10, posted, ()) == Counts(
        requests=1, cost=10, unresolved=1, unresolved_cost=10
    )
    assert counted(H, 0, posted, ()) == counted(V, 0, posted, ()) == Counts()


@pytest.mark.parametrize("flag", ["unpriced", "no_usage", "invalid_usage", "over_bound"])
def test_doubtful_costs_are_flagged(flag: str) -> None:
    assert counted(P, 7, settlement(SETTLE, 7), ("soft", flag)).flagged == 1


def test_soft_alone_is_no_flag() -> None:
    assert counted(P, 7, settlement(SETTLE, 7), ("soft",)).flagged == 0


def test_a_late_truth_replaces_what_the_expiry_counted() -> None:
    late = settlement(SETTLE, 7)
    move = transition(X, SETTLE, 10, 10, 7)
    assert correction(X, 10, ("no_usage",), move, late) == Counts(
        requests=0,
        images=5,
        text_in=1,
        image_in=2,
        text_out=3,
        image_out=4,
        cost=-3,
        unresolved=-1,
        unresolved_cost=-10,
        flagged=-1,
    )


def test_a_late_void_takes_back_what_the_expiry_counted() -> None:
    move = transition(X, VOID, 10, 10, 0)
    back = correction(X, 10, ("no_usage",), move, settlement(VOID))
    expired = counted(X, 10, settlement(EXPIRE), ("no_usage",))
    assert back.plus(expired) == Counts()


# Going elsewhere

HERE, THERE = Route("flare", "openai", "p1"), Route("flare", "azure", "p2")
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def line(owner: str, amount: int | None) -> Line:
    return Line(Limit(Scope.TEAM, owner, Unit.MONEY, Window.DAY, amount), period(Window.DAY, NOON))


def reroute(bound: int, *lines: Line, to: Route = THERE) -> Reroute:
    return Reroute("r", *to, bound, lines, NOON)


@pytest.mark.parametrize(
    ("state", "bound", "to", "new_bound", "bump"),
    [
        (H, 10, THERE, 25, Bump(25, 15)),
        (H, 10, THERE, 10, Bump(10, 0)),
        (H, 10, THERE, 3, Bump(10, 0)),
        (H, 0, THERE, 0, Bump(0, 0)),
        (H, 10, HERE, 11, Bump(11, 1)),
        (H, 10, HERE, 10, Bump(10, 0, applied=False)),
        (H, 10, HERE, 9, Bump(10, 0, applied=False)),
        (H, 10, Route("blaze", "openai", "p1"), 10, Bump(10, 0)),
        (H, 10, Route("flare", "azure", "p1"), 10, Bump(10, 0)),
        (H, 10, Route("flare", "openai", "p2"), 10, Bump(10, 0)),
        (P, 10, THERE, 25, None),
        (V, 10, THERE, 25, None),
        (X, 10, THERE, 25, None),
        (X, 10, HERE, 10, None),
    ],
)
def test_the_table_of_reroutes(
    state: State, bound: int, to: Route, new_bound: int, bump: Bump | None
) -> None:
    assert rerouted(state, bound, HERE, reroute(new_bound, to=to)) == bump


@given(bound=amounts, bounds=st.lists(amounts, max_size=5), end=amounts)
def test_what_reroutes_add_an_end_takes_back(bound: int, bounds: list[int], end: int) -> None:
    pending, route = bound, HERE
    for number, new_bound in enumerate(bounds):
        asked = reroute(new_bound, to=Route("m", "u", f"p{number}"))
        bump = rerouted(H, bound, route, asked)
        assert bump is not None
        assert bump.bound >= bound
        bound, route, pending = bump.bound, asked.route, pending + bump.pending
        assert pending == bound
    assert pending + transition(H, SETTLE, bound, 0, end).pending == 0


def test_the_first_line_without_room() -> None:
    lines = (line("a", None), line("b", 20), line("c", 15))
    balances = {one.account: Balance(posted=4, pending=6) for one in lines}
    assert no_room(lines, balances, 5) is None
    assert no_room(lines, balances, 6) == Denied(lines[2], Balance(4, 6))
    assert no_room(lines, balances, 11) == Denied(lines[1], Balance(4, 6))


def test_a_hold_has_to_fit_whole_where_it_grows() -> None:
    mine, free, others = line("a", 20), line("b", None), line("c", 0)
    asked = reroute(16, free, others, mine)
    balances = {one.account: Balance(posted=4, pending=11) for one in (mine, free, others)}
    accounts = (mine.account, free.account)
    # The 11 that are held have 10 of this call: 5 of others and 16 are more than 20.
    assert no_room_elsewhere(asked, Bump(16, 6), accounts, balances) == Denied(mine, Balance(4, 1))
    assert no_room_elsewhere(asked, Bump(15, 5), accounts, balances) is None
    assert no_room_elsewhere(asked, Bump(99, 0), accounts, balances) is None


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_who_gives_its_key_away(state: State, same: bool, repeat: bool) -> None:
    yields = {(V, True, False), (V, True, True), (X, True, True)}
    assert yields_key(state, same, repeat) is ((state, same, repeat) in yields)


# What a person says


@pytest.mark.parametrize(
    ("state", "cost", "new_cost", "doubtful", "move"),
    [
        (H, 0, 7, False, Move(H, 0, applied=False)),
        (H, 0, 0, True, Move(H, 0, applied=False)),
        (P, 7, 7, False, Move(P, 7, applied=False)),
        (P, 7, 7, True, Move(P, 7, posted=0)),
        (P, 7, 9, False, Move(P, 9, posted=2)),
        (P, 7, 0, False, Move(P, 0, posted=-7)),
        (X, 10, 10, False, Move(P, 10, posted=0)),
        (X, 10, 4, True, Move(P, 4, posted=-6)),
        (X, 10, 25, False, Move(P, 25, posted=15)),
        (V, 0, 9, False, Move(P, 9, posted=9)),
        (V, 0, 0, False, Move(P, 0, posted=0)),
    ],
)
def test_the_table_of_corrections(
    state: State, cost: int, new_cost: int, doubtful: bool, move: Move
) -> None:
    assert corrected(state, cost, new_cost, doubtful) == move


def said(cost: int) -> Correction:
    return Correction("c", "r", cost, "reason", "actor", datetime(2026, 11, 22, tzinfo=UTC), 2)


@pytest.mark.parametrize(
    ("before", "cost", "flags", "gained"),
    [
        (P, 7, (), Counts(cost=-3)),
        (P, 7, ("soft",), Counts(cost=-3)),
        (P, 7, ("soft", "no_usage"), Counts(cost=-3, flagged=-1)),
        (X, 10, (), Counts(images=2, cost=-6, unresolved=-1, unresolved_cost=-10)),
        (
            X,
            10,
            ("over_bound",),
            Counts(images=2, cost=-6, unresolved=-1, unresolved_cost=-10, flagged=-1),
        ),
        (V, 0, (), Counts(requests=1, images=2, cost=4)),
        # A voided call was counted nowhere, so there is no flag to take back.
        (V, 0, ("no_usage",), Counts(requests=1, images=2, cost=4)),
    ],
)
def test_what_a_correction_adds_to_the_day(
    before: State, cost: int, flags: tuple[str, ...], gained: Counts
) -> None:
    assert correction_counts(before, cost, flags, said(4)) == gained


@given(
    before=st.sampled_from((P, V, X)),
    cost=amounts,
    new_cost=amounts,
    flag=st.sampled_from(((), ("soft",), ("no_usage",))),
)
def test_a_corrected_call_counts_as_one_that_was_posted_so(
    before: State, cost: int, new_cost: int, flag: tuple[str, ...]
) -> None:
    posted = settlement(SETTLE, cost, *flag)
    old = counted(before, cost, posted, flag)
    new = old.plus(correction_counts(before, old.cost, flag, said(new_cost)))
    assert (new.requests, new.cost) == (1, new_cost)
    assert (new.unresolved, new.unresolved_cost, new.flagged) == (0, 0, 0)
    assert new.images == (5 if before is P else 2)


def test_a_replay_counts_what_it_avoided() -> None:
    at = datetime(2026, 11, 22, tzinfo=UTC)
    replay = Replay("r", "growth", "k", "m", Operation.EDIT, images=2, avoided=9, at=at)
    assert counted_replay(replay) == Counts(requests=1, images=2, cached_requests=1, avoided=9)


def test_an_expiry_is_owed_at_the_bound() -> None:
    assert expiry("r", 10) == Settlement("r", EXPIRE, Outcome.UNKNOWN, Basis.ESTIMATED, cost=10)


def test_the_day_is_utc() -> None:
    tokyo = timezone(timedelta(hours=9))
    assert usage_day(datetime(2026, 11, 23, 8, 59, tzinfo=tokyo)) == "2026-11-22"
    assert usage_day(datetime(2026, 11, 23, 9, 0, tzinfo=tokyo)) == "2026-11-23"


# What another model drew


PART = Part("art", 2, 12, Usage(text_in=1, image_out=7))


@pytest.mark.parametrize(
    ("cost", "new_cost", "part"),
    [(17, 17, 12), (17, 34, 24), (17, 18, 12), (17, 16, 11), (17, 0, 0), (12, 5, 5), (0, 9, 0)],
)
def test_a_part_of_a_corrected_call_keeps_its_share(cost: int, new_cost: int, part: int) -> None:
    assert corrected_part(PART, cost, new_cost) == replace(PART, cost=part)
    assert corrected_part(None, cost, new_cost) is None


@given(cost=amounts, new_cost=amounts, share=st.fractions(0, 1))
def test_a_share_is_within_the_whole(cost: int, new_cost: int, share: Fraction) -> None:
    found = corrected_part(replace(PART, cost=int(cost * share)), cost, new_cost)
    assert found is not None
    assert 0 <= found.cost <= new_cost


@pytest.mark.parametrize("state", [P, V, X])
def test_only_a_posted_call_has_a_part(state: State) -> None:
    said = replace(settlement(SETTLE, 17), drawn=PART)
    assert settled_part(Move(state, 17), said) == (PART if state is P else None)


def test_the_rows_of_both_models_add_up_to_the_call() -> None:
    whole = Counts(requests=1, images=2, text_in=4, text_out=5, image_out=7, cost=17, flagged=1)
    drawn = Counts(images=2, text_in=1, image_out=7, cost=12)
    assert by_model("text", whole, None) == [("text", whole)]
    assert by_model("text", whole, PART) == [("text", whole.minus(drawn)), ("art", drawn)]
    # Of one that had a part already, what that one gains; also where it loses all of it.
    gone = Counts(cost=-17)
    nothing = replace(PART, cost=0)
    assert by_model("text", gone, nothing, PART) == [
        ("text", Counts(cost=-5)),
        ("art", Counts(cost=-12)),
    ]
    assert by_model("text", gone, PART, PART) == [("text", gone)]


def test_the_pictures_of_a_kept_response_count_with_who_drew_them() -> None:
    at = datetime(2026, 11, 22, tzinfo=UTC)
    replay = Replay("r", "growth", "k", "text", Operation.RESPONSE, 2, 9, at, draws="art")
    assert replay_by_model(replay) == [
        ("text", Counts(requests=1, cached_requests=1, avoided=9)),
        ("art", Counts(images=2)),
    ]
