"""Which upstreams and keys are left alone, and for how long: a table of states, with the clock in
the test's hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.relay.health import (
    MAX_QUARANTINE_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    PROBE_SECONDS,
    CircuitState,
    Health,
    HealthListener,
    Ticket,
    Why,
)

ONE = ("openai", "1", "flare")
TWO = ("openai", "2", "flare")


class Dearest:
    """The chance that always draws the most."""

    def uniform(self, a: float, b: float, /) -> float:
        return b


class Heard(HealthListener):
    def __init__(self) -> None:
        self.news: list[tuple[object, ...]] = []

    def circuit(self, upstream: str, key: str, state: CircuitState) -> None:
        self.news.append((upstream, key, state.name))

    def cooled(self, upstream: str, key: str, seconds: float) -> None:
        self.news.append((upstream, key, seconds))

    def disabled(self, upstream: str, key: str, why: Why, model: str, seconds: float) -> None:
        self.news.append((upstream, key, why.value, model, seconds))

    def enabled(self, upstream: str, key: str, why: Why) -> None:
        self.news.append((upstream, key, why.value, "over"))

    def retried(self, upstream: str, outcome: str) -> None:
        self.news.append((upstream, outcome))


class Ward:
    """A health whose time is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.heard = Heard()
        self.health = Health(lambda: self.seconds, Dearest(), self.heard)

    def leave(self, named: tuple[str, str, str] = ONE) -> Ticket:
        ticket = self.health.admit(*named)
        assert ticket is not None
        return ticket

    def waits(self, named: tuple[str, str, str] = ONE) -> float:
        """Seconds; where there are any, nobody gets leave."""
        seconds = self.health.wait(*named)
        assert not seconds or self.health.admit(*named) is None
        return seconds

    def fail(self, count: int = 1) -> None:
        for _ in range(count):
            self.health.failed(self.leave())

    def told(self) -> list[tuple[object, ...]]:
        news, self.heard.news = self.heard.news, []
        return news


@pytest.fixture
def ward() -> Ward:
    return Ward()


# The breaker


def test_five_failures_in_a_row_open_it(ward: Ward) -> None:
    ward.fail(4)
    assert ward.waits() == 0
    ward.fail()
    assert ward.waits() == 5
    assert ward.waits(TWO) == 0
    assert ward.told() == [("openai", "1", "OPEN")]


def test_failures_long_ago_do_not_count(ward: Ward) -> None:
    ward.fail(4)
    ward.seconds += 10.1
    ward.fail(4)
    assert ward.waits() == 0
    ward.fail()
    assert ward.waits() == 5


def test_a_success_in_between_begins_the_count_anew(ward: Ward) -> None:
    ward.fail(4)
    ward.health.succeeded(ward.leave())
    ward.fail(4)
    assert ward.waits() == 0
    assert ward.told() == []


def test_one_probe_and_its_success_closes_it(ward: Ward) -> None:
    ward.fail(5)
    ward.seconds += 5
    probe = ward.leave()
    assert probe.probe
    assert ward.waits() == PROBE_SECONDS
    ward.health.succeeded(probe)
    assert ward.waits() == 0
    assert not ward.leave().probe
    assert [news[2] for news in ward.told()] == ["OPEN", "HALF_OPEN", "CLOSED"]


def test_each_probe_that_fails_doubles_the_time(ward: Ward) -> None:
    ward.fail(5)
    for seconds in (5, 10, 20, 40, 60, 60):
        assert ward.waits() == seconds
        ward.seconds += seconds
        ward.fail()
    ward.seconds += 60
    ward.health.succeeded(ward.leave())
    ward.fail(5)
    assert ward.waits() == 5


def test_what_was_under_way_when_it_opened_changes_nothing(ward: Ward) -> None:
    early, late = ward.leave(), ward.leave()
    ward.fail(5)
    ward.health.succeeded(early)
    ward.health.failed(late)
    assert ward.waits() == 5


@pytest.mark.parametrize("ending", ["unsure", "failed"])
def test_a_probe_that_is_swallowed_is_a_failure(ward: Ward, ending: str) -> None:
    ward.fail(5)
    ward.seconds += 5
    getattr(ward.health, ending)(ward.leave())
    assert ward.waits() == 10


def test_a_probe_that_was_not_sent_leaves_its_place(ward: Ward) -> None:
    ward.fail(5)
    ward.seconds += 5
    ward.health.unused(ward.leave())
    assert ward.leave().probe
    assert [news[2] for news in ward.told()] == ["OPEN", "HALF_OPEN", "OPEN", "HALF_OPEN"]


def test_a_probe_that_is_still_under_way_has_got_through(ward: Ward) -> None:
    ward.fail(5)
    ward.seconds += 5
    probe = ward.leave()
    ward.seconds += PROBE_SECONDS - 1
    assert ward.waits() == 1
    ward.seconds += 1
    assert ward.waits() == 0
    assert [news[2] for news in ward.told()] == ["OPEN", "HALF_OPEN", "CLOSED"]
    assert not ward.leave().probe
    ward.health.failed(probe)
    assert ward.waits() == 0, "one failure like any other"
    ward.fail(4)
    assert ward.waits() == 5, "and its time begins anew"


@pytest.mark.parametrize("ending", ["succeeded", "failed", "unsure", "refused"])
def test_a_probe_of_an_earlier_rest_says_nothing_of_a_later_one(ward: Ward, ending: str) -> None:
    ward.fail(5)
    ward.seconds += 5
    probe = ward.leave()
    ward.seconds += PROBE_SECONDS
    ward.fail(5)
    assert ward.waits() == 5
    ward.told()
    if ending == "refused":
        ward.health.refused(probe, Why.FORBIDDEN)
    else:
        getattr(ward.health, ending)(probe)
    assert ward.waits(("openai", "1", "sunburst")) == 5
    assert [news for news in ward.told() if news[2] in CircuitState.__members__] == []


def test_a_quarantines_probe_that_nobody_answers_for_is_forgotten(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.seconds += 60
    ward.leave()
    ward.seconds += PROBE_SECONDS
    assert ward.leave().probe
    assert ward.health.quarantined(*ONE) is Why.AUTH


@pytest.mark.parametrize(
    ("calls", "seconds"),
    [
        (["x"] * 50, 0),
        ([""] * 5, 5),
        (["x", "x", "y", "x", "x"], 5),
        (["x", "x", "x", "x", ""], 5),
        (["y", *["x"] * 4], 5),
    ],
)
def test_one_request_alone_does_not_open_it(ward: Ward, calls: list[str], seconds: float) -> None:
    for who in calls:
        ward.health.failed(ward.leave(), who)
    assert ward.waits() == seconds


def test_a_refusal_of_the_request_shows_that_it_is_there(ward: Ward) -> None:
    ward.fail(5)
    ward.seconds += 5
    ward.health.alive(ward.leave())
    assert ward.waits() == 0


# The cool-down


def test_what_a_429_asks_for(ward: Ward) -> None:
    ward.health.limited(ward.leave(), 7.5)
    assert (ward.waits(), ward.waits(TWO)) == (7.5, 0)
    ward.seconds += 7.5
    assert ward.waits() == 0
    assert ward.told() == [("openai", "1", 7.5)]


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(3600, MAX_RETRY_AFTER_SECONDS), (float("inf"), MAX_RETRY_AFTER_SECONDS),
     (0, 0.5), (-5, 0.5), (float("nan"), 0.5), (0.25, 0.25)],
)  # fmt: skip
def test_what_a_429_asks_for_is_not_believed_beyond_reason(
    ward: Ward, asked: float, seconds: float
) -> None:
    ward.health.limited(ward.leave(), asked)
    assert ward.waits() == seconds


def test_without_a_word_the_time_doubles(ward: Ward) -> None:
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        ward.health.limited(ward.leave(), None)
        assert ward.waits() == seconds
        ward.seconds += seconds
    ward.health.succeeded(ward.leave())
    ward.health.limited(ward.leave(), None)
    assert ward.waits() == 1


def test_many_at_once_double_it_once(ward: Ward) -> None:
    tickets = [ward.leave() for _ in range(50)]
    for ticket in tickets:
        ward.health.limited(ticket, None)
    assert ward.waits() == 1


def test_a_limit_is_of_one_model(ward: Ward) -> None:
    other = ("openai", "1", "sunburst")
    ward.health.limited(ward.leave(), None)
    assert (ward.waits(), ward.waits(other)) == (1, 0)
    ward.health.succeeded(ward.leave(other))
    ward.health.limited(ward.leave(other), None)
    ward.seconds += 1
    ward.health.limited(ward.leave(), None)
    assert (ward.waits(), ward.waits(other)) == (2, 0)


def test_limits_of_long_ago_are_forgotten(ward: Ward) -> None:
    for number in range(100):
        ward.health.limited(ward.leave(("openai", "1", f"model-{number}")), 10)
        ward.seconds += 10
    assert len(ward.health._keys["openai", "1"].cool) <= 8
    ward.health.limited(ward.leave(("openai", "1", "model-0")), None)
    assert ward.waits(("openai", "1", "model-0")) == 1


def test_a_shorter_word_does_not_shorten_a_longer_one(ward: Ward) -> None:
    first, second = ward.leave(), ward.leave()
    ward.health.limited(first, 30)
    ward.health.limited(second, 2)
    assert ward.waits() == 30


# The quarantine


@pytest.mark.parametrize(("why", "of_all"), [(Why.AUTH, True), (Why.BILLING, True),
                                             (Why.FORBIDDEN, False)])  # fmt: skip
def test_a_refused_key(ward: Ward, why: Why, of_all: bool) -> None:
    ward.health.refused(ward.leave(), why)
    other_model = ("openai", "1", "sunburst")
    assert (ward.waits(), ward.waits(TWO)) == (60, 0)
    assert ward.waits(other_model) == (60 if of_all else 0)
    assert ward.health.quarantined(*ONE) is why
    assert ward.health.quarantined(*other_model) is (why if of_all else None)
    assert ward.told() == [("openai", "1", why.value, "" if of_all else "flare", 60)]


def test_a_quarantine_doubles_and_one_success_ends_it(ward: Ward) -> None:
    for seconds in (60, 120, 240, 480, 600, 600):
        ward.health.refused(ward.leave(), Why.AUTH)
        assert ward.waits() == seconds
        ward.seconds += seconds
    probe = ward.leave()
    assert ward.waits() == PROBE_SECONDS
    assert ward.health.quarantined(*ONE) is Why.AUTH
    ward.health.succeeded(probe)
    assert (ward.waits(), ward.health.quarantined(*ONE)) == (0, None)
    assert ward.told()[-1] == ("openai", "1", "auth", "over")


def test_many_that_are_refused_at_once_are_one_refusal(ward: Ward) -> None:
    tickets = [ward.leave() for _ in range(20)]
    for ticket in tickets:
        ward.health.refused(ticket, Why.BILLING)
    assert ward.waits() == 60
    assert len(ward.told()) == 1


@pytest.mark.parametrize("ending", ["unsure", "failed"])
def test_a_probe_that_says_nothing_of_the_key_leaves_it_to_the_next(
    ward: Ward, ending: str
) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.seconds += 60
    getattr(ward.health, ending)(ward.leave())
    assert ward.leave().probe
    assert ward.health.quarantined(*ONE) is Why.AUTH


def test_a_429_shows_that_a_key_is_known_again(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.seconds += 60
    ward.health.limited(ward.leave(), 3)
    assert (ward.waits(), ward.health.quarantined(*ONE)) == (3, None)


@pytest.mark.parametrize("ending", ["alive", "limited"])
def test_only_a_picture_shows_that_there_is_money_again(ward: Ward, ending: str) -> None:
    ward.health.refused(ward.leave(), Why.BILLING)
    ward.seconds += 60
    if ending == "limited":
        ward.health.limited(ward.leave(), 1)
    else:
        ward.health.alive(ward.leave())
    assert ward.health.quarantined(*ONE) is Why.BILLING
    ward.seconds += 1
    probe = ward.leave()
    assert probe.probe
    ward.health.succeeded(probe)
    assert ward.health.quarantined(*ONE) is None
    assert ward.told()[-1] == ("openai", "1", "billing", "over")


def test_a_key_that_is_refused_for_another_reason(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.seconds += 60
    ward.health.refused(ward.leave(), Why.BILLING)
    assert ward.health.quarantined(*ONE) is Why.BILLING
    assert ward.told() == [
        ("openai", "1", "auth", "", 60),
        ("openai", "1", "auth", "over"),
        ("openai", "1", "billing", "", 120),
    ]


def test_a_model_that_nobody_asks_for_again_is_forgotten(ward: Ward) -> None:
    ward.health.refused(ward.leave(("openai", "1", "chosen-by-a-client")), Why.FORBIDDEN)
    ward.seconds += 1000
    ward.health.refused(ward.leave(), Why.FORBIDDEN)
    ward.told()
    ward.seconds += 60 + 1800 - 1000
    ward.health.look()
    assert ward.health.quarantined("openai", "1", "chosen-by-a-client") is Why.FORBIDDEN
    ward.seconds += 1
    ward.health.look()
    assert ward.health.quarantined("openai", "1", "chosen-by-a-client") is None
    assert ward.health.quarantined(*ONE) is Why.FORBIDDEN
    assert ward.told() == []
    ward.seconds += 1000
    ward.health.look()
    assert ward.told() == [("openai", "1", "forbidden", "over")]
    assert ward.health.quarantined(*ONE) is None


def test_a_model_that_is_probed_is_not_forgotten(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.FORBIDDEN)
    ward.seconds += 1800
    probe = ward.leave()
    ward.seconds += 1800
    ward.health.look()
    assert ward.health.quarantined(*ONE) is Why.FORBIDDEN
    ward.health.refused(probe, Why.FORBIDDEN)
    assert ward.waits() == 120


@pytest.mark.parametrize("why", [Why.AUTH, Why.BILLING])
def test_a_key_that_is_refused_for_all_is_not_forgotten(ward: Ward, why: Why) -> None:
    ward.health.refused(ward.leave(), why)
    ward.seconds += 1_000_000
    ward.health.look()
    assert ward.health.quarantined(*ONE) is why


def test_a_client_that_invents_names_fills_nothing(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.seconds += 60
    ward.health.succeeded(ward.leave())
    ward.told()
    for number in range(1000):
        ward.health.refused(ward.leave(("openai", "1", f"name-{number}")), Why.FORBIDDEN)
    kept = [n for n in range(1000) if ward.health.quarantined("openai", "1", f"name-{n}")]
    assert kept == list(range(1000 - 64, 1000))
    assert ("openai", "1", "forbidden", "over") not in ward.told()


@pytest.mark.parametrize("ending", ["failed", "refused", "limited"])
def test_what_is_heard_of_a_key_that_is_gone(ward: Ward, ending: str) -> None:
    tickets = [ward.leave() for _ in range(5)]
    ward.health.keep("openai", ["2"])
    for ticket in tickets:
        match ending:
            case "failed":
                ward.health.failed(ticket)
            case "refused":
                ward.health.refused(ticket, Why.AUTH)
            case _:
                ward.health.limited(ticket, 30)
    assert (ward.waits(), ward.told()) == (0, [])
    ward.health.limited(ward.leave(TWO), 30)
    assert ward.waits(TWO) == 30


def test_keys_that_are_gone_are_forgotten(ward: Ward) -> None:
    ward.health.refused(ward.leave(), Why.AUTH)
    ward.health.refused(ward.leave(TWO), Why.AUTH)
    ward.health.keep("openai", ["2", "3"])
    ward.health.keep("azure", [])
    assert (ward.waits(), ward.waits(TWO)) == (0, 60)
    assert ward.told()[-1] == ("openai", "1", "auth", "over")


# The budget of retries


def test_a_dead_upstream_is_hardly_asked_twice(ward: Ward) -> None:
    assert [ward.health.take_retry("openai") for _ in range(12)] == [True] * 10 + [False] * 2
    assert ward.health.take_retry("azure")
    assert ward.told() == [("openai", "no_budget")] * 2
    for _ in range(9):
        ward.health.succeeded(ward.leave())
    assert not ward.health.take_retry("openai")
    for _ in range(2):
        ward.health.succeeded(ward.leave())
    assert ward.health.take_retry("openai")


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_never_more_than_a_tenth_of_the_successes_and_ten(calls: list[bool]) -> None:
    ward = Ward()
    successes = retries = 0
    for success in calls:
        if success:
            ward.health.succeeded(ward.leave())
            successes += 1
        else:
            retries += ward.health.take_retry("openai")
    assert retries <= 10 + successes / 10


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["succeeded", "alive", "failed", "unsure", "unused", "crash", "refused",
                             "limited"]),
            st.floats(0, 700),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_no_key_is_lost_for_ever(steps: list[tuple[str, float]]) -> None:
    """Whatever happens, in whatever order: after the longest rest somebody is let through."""
    ward = Ward()
    for ending, seconds in steps:
        ticket = ward.health.admit(*ONE)
        if ticket is not None:
            match ending:
                case "crash":
                    pass
                case "refused":
                    ward.health.refused(ticket, Why.FORBIDDEN)
                case "limited":
                    ward.health.limited(ticket, None)
                case _:
                    getattr(ward.health, ending)(ticket)
        ward.seconds += seconds
    assert ward.health.wait(*ONE) <= MAX_QUARANTINE_SECONDS
    ward.seconds += MAX_QUARANTINE_SECONDS
    ward.health.succeeded(ward.leave())
    assert ward.waits() == 0
