"""Over ways and keys until one answers: whom a call is sent to, in which order, and who covers it.

The upstreams are scripts, the ledger is the one in memory, and time is moved by hand.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from gateway.domain.call import Call, Encoding, Operation
from gateway.domain.charge import Quote
from gateway.domain.errors import (
    GatewayError,
    LedgerUnavailable,
    Overloaded,
    UpstreamAccount,
    UpstreamBroken,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.domain.ledger import (
    Basis,
    Claim,
    Denied,
    Event,
    Held,
    Line,
    Outcome,
    Reroute,
    Settlement,
)
from gateway.domain.money import Money
from gateway.domain.price import Answer, Bound, Confidence, PriceList, PriceRow
from gateway.domain.quota import Demand, Limit, Scope, Unit, Window, period
from gateway.domain.receipt import CacheResult
from gateway.domain.route import Model, Target
from gateway.domain.team import Caller, Key, Team
from gateway.ports import Credential, NotKnown, Outgoing, Reply, Take
from gateway.relay.attempts import (
    PATIENCE_SECONDS,
    PAUSE_SECONDS,
    RETRY_SECONDS,
    Attempts,
    Failed,
    Opened,
)
from gateway.relay.body import Room, Spool
from gateway.relay.health import Health, HealthListener, Why
from gateway.relay.plan import Plan, Way
from gateway.stores.memory_ledger import MemoryStore
from gateway.upstream import openai

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
RID = "req_1"
CENT = 10_000_000
BODY = b'{"model":"flare","prompt":"cat"}'


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return self.seconds


class Most:
    """The chance that always draws the most."""

    def uniform(self, a: float, b: float, /) -> float:
        return b


class Told(Reply):
    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._status, self._body, self._headers = status, body, headers
        self.closed = False

    @property
    def status(self) -> int:
        return self._status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._headers

    async def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        yield self._body

    async def aclose(self) -> None:
        self.closed = True


Step = GatewayError | Told
Script = Callable[[], Step | BaseException]


def says(status: int, code: str = "some_code", **headers: str) -> Script:
    error = {"message": "m", "type": "t", "param": None, "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: Told(status, json.dumps({"error": error}).encode(), named)


def html(status: int) -> Script:
    return lambda: Told(status, b"<html>", {})


def unreached(reason: str) -> Script:
    return lambda: UpstreamUnavailable("It was not reached.", reason=reason)


def lost(reason: str) -> Script:
    return lambda: UpstreamUnknown("It was sent.", reason=reason)


def good() -> Told:
    return Told(200, b"{}", {"content-type": "application/json"})


class Scripted:
    """An upstream that does with each request what its script says, and good answers then."""

    def __init__(self, name: str, *script: Script, keys: Sequence[Credential] | int = 1) -> None:
        self.name = name
        self.provider = "openai"
        self.address = ("upstream.test", 443)
        self.ready = True
        self.script = list(script)
        self.credentials: Sequence[Credential] = (
            [Credential(str(number + 1)) for number in range(keys)]
            if isinstance(keys, int)
            else keys
        )
        self.bodies: list[bytes] = []
        self.log: list[str] = []

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        assert outgoing.body is not None
        self.bodies.append(b"".join([bytes(piece) async for piece in outgoing.body]))
        self.log.append(f"{self.name}/{credential}")
        found = self.script.pop(0)() if self.script else good()
        if isinstance(found, BaseException):
            raise found
        return found

    def masked(self, text: bytes) -> bytes:
        return text

    async def aclose(self) -> None:
        return


class Heard(HealthListener):
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.news: list[tuple[str, ...]] = []
        self.answers: list[tuple[str, int]] = []

    def answered(self, upstream: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.answers.append((upstream, status))

    def failed(self, upstream: str, kind: str) -> None:
        self.kinds.append(f"{upstream} {kind}")

    def retried(self, upstream: str, outcome: str) -> None:
        self.news.append(("retried", upstream, outcome))

    def fell_back(self, model: str, to: str) -> None:
        self.news.append(("fell back", model, to))

    def disabled(self, upstream: str, key: str, why: Why, model: str, seconds: float) -> None:
        self.news.append(("disabled", upstream, key, why.value, model))


@dataclass
class PerPicture:
    amount: Money

    def knows(self, size: str, quality: str) -> bool:
        return True

    def bound(self, call: Call, prices: PriceList) -> Bound:
        return Bound(self.amount, Confidence.HARD)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        return self.amount


def a_quote(cents: int) -> Quote:
    price = PerPicture(cents * CENT)
    row = PriceRow("openai", f"at {cents}", date(2026, 1, 1), "list", price)
    return Quote(Bound(cents * CENT, Confidence.HARD), PriceList({}), row, cents * CENT)


FLARE = Model("flare", Target("a", "flare"), label="flare")
CALL = Call(
    *(Operation.GENERATION, Encoding.JSON, "application/json", "flare", 9),
    *({"prompt": "cat"}, (), 1),
    model_said="flare",
)


class Ledger:
    """The one in memory, which notes reroutes and may be away for them."""

    def __init__(self, budget: Money | None) -> None:
        self.store = MemoryStore()
        self.reroutes: list[Reroute] = []
        self.away: Exception | None = None
        limit = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, budget)
        self.lines = (Line(limit, period(Window.DAY, NOW)),)

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        self.reroutes.append(reroute)
        if self.away is not None:
            raise self.away
        return await self.store.ledger.reroute(reroute)


@dataclass
class Bench:
    """One call over some upstreams; ``cents`` are what each way costs at most."""

    upstreams: Sequence[Scripted]
    cents: Sequence[int] = ()
    models: Sequence[Model] = ()
    budget: Money | None = None
    most: int = 2
    clock: Clock = field(default_factory=Clock)
    heard: Heard = field(default_factory=Heard)
    slept: list[float] = field(default_factory=list)
    fingerprint: str = "f"
    shut: frozenset[str] = frozenset()
    """Upstreams that may not be gone to."""
    entered: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.health = Health(self.clock.monotonic, Most(), self.heard)
        self.ledger = Ledger(self.budget)
        self.log: list[str] = []
        for upstream in self.upstreams:
            upstream.log = self.log
        self.attempts = Attempts(
            openai.request,
            self.ledger,  # type: ignore[arg-type]
            self.health,
            self.clock,
            self.most,
            self._sleep,
            Most(),
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.seconds += seconds

    def _enter(self, way: Way) -> bool:
        self.entered.append(way.upstream.name)
        return way.upstream.name not in self.shut

    @property
    def plan(self) -> Plan:
        ways = []
        for place, upstream in enumerate(self.upstreams):
            model = self.models[place] if self.models else FLARE
            cents = self.cents[place] if self.cents else 10
            ways.append(Way(model, Target(upstream.name, "flare"), upstream, a_quote(cents)))
        return Plan(
            Caller(Team("growth"), Key("k1", "growth")), CALL, FLARE, tuple(ways),
            Demand(), (), self.ledger.lines, self.fingerprint, CacheResult.OFF, False, NOW,
        )  # fmt: skip

    async def call(self, folder: Path, rid: str = RID) -> Opened | Failed:
        """Reserves, opens, and settles at the way's price or voids."""
        plan, ledger = self.plan, self.ledger.store.ledger
        held = await ledger.reserve(
            Claim(
                *(rid, "growth", "k1", plan.model.name, CALL.operation, plan.upstream.name, 1),
                *(plan.quote.bound.amount, plan.lines, NOW, NOW + timedelta(minutes=11)),
                plan.quote.price_id,
            )
        )
        assert isinstance(held, Held)
        body = Spool(Room(1 << 20, 1 << 20, folder), 1 << 20)
        await body.write(BODY)
        self.log.clear()
        try:
            found = await self.attempts.open(rid, plan, body, held, self._enter)
        finally:
            body.close()
        if isinstance(found, Opened):
            cost = found.way.quote.bound.amount
            await ledger.settle(
                Settlement(rid, Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost, images=1)
            )
        else:
            await ledger.settle(Settlement(rid, Event.VOID, Outcome.REFUSED, Basis.NONE))
        assert await ledger.open_holds() == 0
        assert await self.ledger.store.books.audit() == []
        return found

    async def spent(self) -> list[tuple[str, int]]:
        rows = await self.ledger.store.ledger.usage()
        return [(row.model, row.cost) for row in rows]


A, B = "a", "b"


def answered(found: Opened | Failed) -> Opened:
    assert isinstance(found, Opened), found
    return found


def failed(found: Opened | Failed) -> Failed:
    assert isinstance(found, Failed)
    return found


async def test_the_first_way_answers(tmp_path: Path) -> None:
    bench = Bench([Scripted(A), Scripted(B)])
    found = answered(await bench.call(tmp_path))
    assert (bench.log, found.attempts, found.way.upstream.name) == (["a/1"], 1, A)
    assert (bench.ledger.reroutes, bench.heard.kinds) == ([], [])


@pytest.mark.parametrize(
    ("script", "heard"),
    [
        (says(429), [(A, 429), (B, 200)]),
        (html(502), [(A, 502)]),
        (unreached("connect"), [(A, 0), (B, 200)]),
        (lost("disconnect"), [(A, 0)]),
        # Nothing was sent, and the upstream has no part in it.
        (lambda: Overloaded("Busy.", reason="pool"), [(B, 200)]),
        (lambda: OSError("the disk"), []),
    ],
    ids=["429", "502", "connect", "disconnect", "pool", "disk"],
)
async def test_what_is_heard_of_each_attempt(
    tmp_path: Path, script: Script, heard: list[tuple[str, int]]
) -> None:
    bench = Bench([Scripted(A, script), Scripted(B)])
    await bench.call(tmp_path)
    assert bench.heard.answers == heard


# What happens next: first upstream's answer, whom the call was sent to, how it ended.
ONE_KEY: list[tuple[str, Script, list[str], int]] = [
    *((reason, unreached(reason), ["a/1", "b/1"], 200) for reason in ("dns", "connect", "tls")),
    ("connect_timeout", unreached("connect_timeout"), ["a/1", "b/1"], 200),
    ("pool", lambda: Overloaded("Busy.", reason="pool"), ["a/1", "b/1"], 200),
    ("401", says(401), ["a/1", "b/1"], 200),
    ("403", says(403), ["a/1", "b/1"], 200),
    ("403 html", html(403), ["a/1", "b/1"], 200),
    ("403 moderation", says(403, "content_policy_violation"), ["a/1"], 403),
    ("billing", says(429, "insufficient_quota"), ["a/1", "b/1"], 200),
    ("billing as 400", says(400, "billing_hard_limit_reached"), ["a/1", "b/1"], 200),
    ("404", says(404), ["a/1", "b/1"], 200),
    ("413", says(413), ["a/1", "b/1"], 200),
    ("429", says(429), ["a/1", "b/1"], 200),
    ("500", says(500), ["a/1", "b/1"], 200),
    ("503", says(503), ["a/1", "b/1"], 200),
    ("400", says(400), ["a/1"], 400),
    ("422", says(422), ["a/1"], 422),
    ("moderation", says(400, "moderation_blocked"), ["a/1"], 400),
    ("redirect", says(307), ["a/1"], 502),
    ("edge", html(502), ["a/1"], 504),
    ("500 html", html(500), ["a/1"], 504),
    *((reason, lost(reason), ["a/1"], 502)
      for reason in ("write", "write_timeout", "disconnect", "read_timeout", "protocol")),
]  # fmt: skip


@pytest.mark.parametrize(("script", "log", "status"), [row[1:] for row in ONE_KEY],
                         ids=[row[0] for row in ONE_KEY])  # fmt: skip
async def test_who_is_asked_next(
    tmp_path: Path, script: Script, log: list[str], status: int
) -> None:
    bench = Bench([Scripted(A, script), Scripted(B)], cents=[10, 12])
    found = await bench.call(tmp_path)
    assert bench.log == log
    if status == 200:
        assert answered(found).way.upstream.name == B
        assert [one.upstream for one in bench.ledger.reroutes] == [B]
        assert await bench.spent() == [("flare", 12 * CENT)]
    else:
        assert failed(found).error.status == status
        assert await bench.spent() == []
    assert bench.slept == []


ALONE: list[tuple[str, Script, list[str], int, int]] = [
    ("connect", unreached("connect"), ["a/1", "a/1"], 503, 0),
    ("dns", unreached("dns"), ["a/1", "a/1"], 503, 0),
    ("tls", unreached("tls"), ["a/1"], 503, 0),
    ("500", says(500), ["a/1", "a/1"], 500, 2),
    ("503", says(503), ["a/1", "a/1"], 503, 2),
    ("404", says(404), ["a/1"], 404, 1),
    ("413", says(413), ["a/1"], 413, 1),
    ("429", says(429, retry_after="7"), ["a/1"], 429, 1),
    ("429 at once", says(429, retry_after="0"), ["a/1"], 429, 1),
    ("401", says(401), ["a/1"], 503, 1),
    ("403 html", html(403), ["a/1"], 502, 1),
]


@pytest.mark.parametrize(("script", "log", "status", "attempts"), [row[1:] for row in ALONE],
                         ids=[row[0] for row in ALONE])  # fmt: skip
async def test_one_upstream_alone(
    tmp_path: Path, script: Script, log: list[str], status: int, attempts: int
) -> None:
    bench = Bench([Scripted(A, *[script] * 5)])
    found = failed(await bench.call(tmp_path))
    assert (bench.log, found.error.status, found.attempts) == (log, status, attempts)
    assert bench.slept == [PAUSE_SECONDS[1]] * (len(log) - 1)
    assert await bench.spent() == []


async def test_a_second_attempt_at_the_same_upstream_sends_the_same_bytes(tmp_path: Path) -> None:
    upstream = Scripted(A, says(500))
    bench = Bench([upstream])
    assert answered(await bench.call(tmp_path)).attempts == 2
    assert upstream.bodies == [BODY, BODY]
    assert bench.heard.news == [("retried", A, "answered")]


async def test_no_attempt_begins_that_could_outlive_the_hold(tmp_path: Path) -> None:
    bench = Bench([Scripted(A), Scripted(B)])

    def late(seconds: float) -> Script:
        def answer() -> Step | BaseException:
            bench.clock.seconds += seconds
            return failing()

        failing = says(500)
        return answer

    bench.upstreams[0].script.append(late(PATIENCE_SECONDS - 1))
    assert answered(await bench.call(tmp_path)).attempts == 2
    bench.upstreams[0].script.append(late(PATIENCE_SECONDS + 1))
    found = failed(await bench.call(tmp_path, "req_2"))
    assert (found.error.status, bench.log) == (500, ["a/1"])


async def test_refused_keys_are_not_counted(tmp_path: Path) -> None:
    """Five keys, four of them refused: each is asked once, and the fifth buys."""
    refusals = [says(401), says(429, "insufficient_quota"), says(402), says(403)]
    bench = Bench([Scripted(A, *refusals, keys=5)])
    found = answered(await bench.call(tmp_path))
    assert bench.log == ["a/1", "a/2", "a/3", "a/4", "a/5"]
    assert found.attempts == 5
    whys = [(one[2], one[3], one[4]) for one in bench.heard.news]
    assert whys == [
        ("1", "auth", ""), ("2", "billing", ""), ("3", "billing", ""), ("4", "forbidden", "flare"),
    ]  # fmt: skip
    assert answered(await bench.call(tmp_path, "req_2")).attempts == 1
    assert bench.log == ["a/5"]


async def test_what_is_forbidden_counts(tmp_path: Path) -> None:
    """A model that the account may not use is so with every key: not all of them are asked."""
    bench = Bench([Scripted(A, *[says(403)] * 5, keys=5)])
    assert failed(await bench.call(tmp_path)).attempts == 2
    assert bench.log == ["a/1", "a/2"]


@pytest.mark.parametrize("script", [html(403), says(403, "moderation_blocked")])
async def test_a_403_about_one_request_takes_no_model_away(tmp_path: Path, script: Script) -> None:
    bench = Bench([Scripted(A, script)])
    failed(await bench.call(tmp_path))
    assert bench.health.quarantined(A, "1", "flare") is None
    assert bench.heard.news == []
    answered(await bench.call(tmp_path, "req_2"))
    assert bench.log == ["a/1"]


async def test_a_limit_until_a_date(tmp_path: Path) -> None:
    until = (NOW + timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    bench = Bench([Scripted(A, says(429, retry_after=until))])
    failed(await bench.call(tmp_path))
    assert bench.health.wait(A, "1", "flare") == 30


async def test_a_limited_key_is_left_alone_and_another_is_asked(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, says(429, retry_after="30"), keys=2), Scripted(B)])
    answered(await bench.call(tmp_path))
    assert bench.log == ["a/1", "a/2"]
    answered(await bench.call(tmp_path, "req_2"))
    assert bench.log == ["a/2"]
    bench.clock.seconds += 30
    log = []
    for rid in ("req_3", "req_4"):
        answered(await bench.call(tmp_path, rid))
        log += bench.log
    assert sorted(log) == ["a/1", "a/2"]


async def test_both_keys_limited_and_attempts_used_up(tmp_path: Path) -> None:
    limited = says(429, retry_after="7", retry_after_ms="6500")
    bench = Bench([Scripted(A, limited, limited, keys=2), Scripted(B)])
    found = failed(await bench.call(tmp_path))
    assert bench.log == ["a/1", "a/2"]
    assert (found.error.status, found.attempts) == (429, 2)
    assert found.error.headers == (("retry-after", "7"), ("retry-after-ms", "6500"))


async def test_where_everybody_rests_nothing_is_sent(tmp_path: Path) -> None:
    limited = [says(429, retry_after=seconds) for seconds in ("40", "30")]
    bench = Bench([Scripted(A, *limited, keys=2)])
    failed(await bench.call(tmp_path))
    bench.clock.seconds += 10
    found = failed(await bench.call(tmp_path, "req_2"))
    assert (bench.log, found.attempts) == ([], 0)
    assert (found.error.status, found.error.code) == (503, "upstream_unavailable")
    assert found.error.retry_after_seconds == pytest.approx(20)


@pytest.mark.parametrize(
    ("code", "said"),
    [("x", "upstream_account_refused"), ("insufficient_quota", "upstream_account_exhausted")],
)
async def test_where_every_key_is_refused_it_is_the_owners_account(
    tmp_path: Path, code: str, said: str
) -> None:
    status = 401 if code == "x" else 429
    bench = Bench([Scripted(A, *[says(status, code)] * 2, keys=2)])
    for rid, sent in ((RID, 2), ("req_2", 0)):
        found = failed(await bench.call(tmp_path, rid))
        assert isinstance(found.error, UpstreamAccount)
        assert (found.error.code, found.error.should_retry) == (said, False)
        assert (len(bench.log), found.attempts) == (sent, sent)


async def test_keys_by_order_and_weight(tmp_path: Path) -> None:
    keys = [Credential("1", 1, 3), Credential("2", 1, 1), Credential("3", 2, 1)]
    bench = Bench([Scripted(A, keys=keys)])
    log = []
    for number in range(8):
        await bench.call(tmp_path, f"req_{number}")
        log += bench.log
    assert sorted(log) == ["a/1"] * 6 + ["a/2"] * 2


async def test_a_dead_upstream_sees_hardly_more_than_its_calls(tmp_path: Path) -> None:
    """Its ten retries, and a tenth of its successes; the breaker is left out by the pauses."""
    calls = 300
    bench = Bench([Scripted(A, *[says(500)] * 1000)])
    sent = 0
    for number in range(calls):
        bench.clock.seconds += 100
        await bench.call(tmp_path, f"req_{number}")
        sent += len(bench.log)
    assert sent == calls + 10
    assert bench.heard.news.count(("retried", A, "failed")) == 10
    assert bench.heard.news.count(("retried", A, "no_budget")) == calls - 10


async def test_a_breaker_lets_one_real_probe_through(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, *[unreached("connect")] * 5), Scripted(B)])
    for number in range(5):
        answered(await bench.call(tmp_path, f"req_{number}"))
        assert bench.log == ["a/1", "b/1"]
    answered(await bench.call(tmp_path, "req_open"))
    assert bench.log == ["b/1"]
    bench.clock.seconds += 5
    assert bench.health.wait(A, "1", "flare") == 0
    answered(await bench.call(tmp_path, "req_probe"))
    assert bench.log == ["a/1"]
    answered(await bench.call(tmp_path, "req_closed"))
    assert bench.log == ["a/1"]


async def test_one_poisoned_request_opens_no_breaker(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, *[says(500)] * 20)])
    for number in range(4):
        failed(await bench.call(tmp_path, f"req_{number}"))
        assert bench.log == ["a/1", "a/1"]
    assert bench.health.wait(A, "1", "flare") == 0
    bench.fingerprint = "another"
    failed(await bench.call(tmp_path, "req_other"))
    assert bench.health.wait(A, "1", "flare") == 5


async def test_a_crash_in_between_leaves_no_probe_behind(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, *[unreached("connect")] * 5)], most=1)
    for number in range(5):
        await bench.call(tmp_path, f"req_{number}")
    bench.clock.seconds += 5
    bench.upstreams[0].script.append(lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        await bench.call(tmp_path, "req_crash")
    void = Settlement("req_crash", Event.VOID, Outcome.REFUSED, Basis.NONE)
    await bench.ledger.store.ledger.settle(void)
    assert bench.health.wait(A, "1", "flare") == 10
    bench.clock.seconds += 10
    answered(await bench.call(tmp_path, "req_probe"))


# Where it may not go


async def test_a_way_that_may_not_be_entered_is_passed_over(tmp_path: Path) -> None:
    upstreams = [Scripted(A, says(500)), Scripted(B), Scripted("c")]
    bench = Bench(upstreams, shut=frozenset({B}))
    assert answered(await bench.call(tmp_path)).way.upstream.name == "c"
    assert (bench.log, bench.entered) == (["a/1", "c/1"], [A, B, "c"])
    assert [one.upstream for one in bench.ledger.reroutes] == ["c"]


async def test_the_first_error_is_answered_where_no_other_way_may_be_entered(
    tmp_path: Path,
) -> None:
    bench = Bench([Scripted(A, says(404)), Scripted(B)], shut=frozenset({B}))
    assert failed(await bench.call(tmp_path)).error.status == 404
    assert bench.ledger.reroutes == []


async def test_where_no_way_may_be_entered_it_is_worth_another_try(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, says(401)), Scripted(B)], most=1, shut=frozenset({B}))
    failed(await bench.call(tmp_path))
    found = failed(await bench.call(tmp_path, "req_2"))
    assert (bench.log, found.error.code, found.attempts) == ([], "upstream_unavailable", 0)
    assert found.error.retry_after_seconds == RETRY_SECONDS


async def test_a_probe_that_may_not_be_sent_leaves_its_place(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, *[unreached("connect")] * 5)], most=1)
    for number in range(5):
        await bench.call(tmp_path, f"req_{number}")
    bench.clock.seconds += 5
    bench.shut = frozenset({A})
    failed(await bench.call(tmp_path, "req_shut"))
    assert bench.health.wait(A, "1", "flare") == 0


# Money


async def test_a_dearer_way_that_the_budget_has_no_room_for(tmp_path: Path) -> None:
    """The original error is answered, and the hold is what it was."""
    bench = Bench([Scripted(A, says(404)), Scripted(B)], cents=[10, 30], budget=20 * CENT)
    found = failed(await bench.call(tmp_path))
    assert (bench.log, found.error.status) == (["a/1"], 404)
    assert [one.bound for one in bench.ledger.reroutes] == [30 * CENT]
    assert await bench.spent() == []


async def test_a_cheaper_way_behind_one_that_is_too_dear(tmp_path: Path) -> None:
    upstreams = [Scripted(A, says(404)), Scripted(B), Scripted("c")]
    bench = Bench(upstreams, cents=[10, 30, 5], budget=20 * CENT)
    assert answered(await bench.call(tmp_path)).way.upstream.name == "c"
    assert await bench.spent() == [("flare", 5 * CENT)]


async def test_a_first_way_that_rests_is_covered_before_the_second_is_sent(tmp_path: Path) -> None:
    bench = Bench([Scripted(A, says(429, retry_after="60")), Scripted(B)], cents=[10, 12])
    answered(await bench.call(tmp_path))
    bench.ledger.reroutes.clear()
    found = answered(await bench.call(tmp_path, "req_2"))
    assert (bench.log, found.attempts) == (["b/1"], 1)
    assert [(one.rid, one.bound) for one in bench.ledger.reroutes] == [("req_2", 12 * CENT)]


@pytest.mark.parametrize("away", [LedgerUnavailable("It is away."), NotKnown("It was swept.")])
async def test_a_ledger_that_cannot_cover_it(tmp_path: Path, away: Exception) -> None:
    bench = Bench([Scripted(A, says(500)), Scripted(B)])
    bench.ledger.away = away
    found = failed(await bench.call(tmp_path))
    assert (bench.log, found.error.status) == (["a/1"], 500)
    resting = Bench([Scripted(A, says(429, retry_after="60")), Scripted(B)], most=1)
    await resting.call(tmp_path)
    resting.ledger.away = away
    with pytest.raises(LedgerUnavailable):
        await resting.call(tmp_path, "req_2")
    assert resting.log == []


# Fallbacks


SUNBURST = replace(FLARE, name="sunburst", label="sunburst")


async def test_a_fallback_comes_after_every_way_of_the_model(tmp_path: Path) -> None:
    upstreams = [Scripted(A, says(500)), Scripted(B, says(404)), Scripted("c")]
    bench = Bench(upstreams, models=[FLARE, FLARE, SUNBURST], cents=[1, 1, 2], most=3)
    found = answered(await bench.call(tmp_path))
    assert bench.log == ["a/1", "b/1", "c/1"]
    assert (found.way.model.name, found.attempts) == ("sunburst", 3)
    assert ("fell back", "flare", "sunburst") in bench.heard.news
    assert [one.model for one in bench.ledger.reroutes] == ["flare", "sunburst"]
    assert await bench.spent() == [("sunburst", 2 * CENT)]


@pytest.mark.parametrize(
    "script", [says(400), says(400, "moderation_blocked"), lost("read_timeout"), html(502)]
)
async def test_a_fallback_never_follows_a_refusal_or_a_doubt(
    tmp_path: Path, script: Script
) -> None:
    bench = Bench([Scripted(A, script), Scripted(B)], models=[FLARE, SUNBURST], most=5)
    failed(await bench.call(tmp_path))
    assert bench.log == ["a/1"]
    assert bench.heard.news == []


async def test_the_attempts_bound_fallbacks_too(tmp_path: Path) -> None:
    upstreams = [Scripted(A, says(500)), Scripted(B, says(500)), Scripted("c")]
    bench = Bench(upstreams, models=[FLARE, FLARE, SUNBURST])
    failed(await bench.call(tmp_path))
    assert bench.log == ["a/1", "b/1"]


# What lands


@pytest.mark.parametrize(
    ("content_type", "error", "kinds"),
    [
        ("application/json", None, []),
        ("application/json", UpstreamBroken("Cut.", reason="truncated"), ["a truncated"]),
        ("application/json", UpstreamBroken("No picture."), ["a bad_answer"]),
        ("text/event-stream", UpstreamBroken("No picture."), ["a sse"]),
        ("application/json", Overloaded("No room here."), []),
    ],
)
async def test_what_becomes_of_a_200_is_counted(
    tmp_path: Path, content_type: str, error: GatewayError | None, kinds: list[str]
) -> None:
    bench = Bench([Scripted(A, lambda: Told(200, b"", {"content-type": content_type}))])
    bench.attempts.landed(answered(await bench.call(tmp_path)), error)
    assert bench.heard.kinds == kinds


async def test_an_empty_account_inside_a_200_is_found_out(tmp_path: Path) -> None:
    bench = Bench([Scripted(A)])
    error = UpstreamAccount("No money.", reason="upstream_account_exhausted")
    bench.attempts.landed(answered(await bench.call(tmp_path)), error)
    assert bench.heard.news == [("disabled", A, "1", "billing", "")]
