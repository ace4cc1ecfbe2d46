"""T3: every store and upstream call of one request fails, one after the other, in every way.

A request without a fault says which calls there are. Then it is asked again for each of them: the
call fails before it is made, or its answer is lost, or it hangs until its port's deadline, or the
process dies there. Each ending is a row of reliability.md 4 and of the tables below; whatever
happens, I1 to I8 of money.md hold, nothing stays held, and the next request is served.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.domain import keys
from gateway.domain.call import Json
from gateway.domain.team import Key, Limits, Team
from gateway.ports import Directory, Store
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.stores.postgres import PostgresStore
from gateway.stores.sqlite import SQLiteStore
from tests.e2e.test_bad_inputs import PNG
from tests.faults import KILLED, PIECE_BYTES, Faults, Place, Way, install, ledger_of
from tests.faulty_gateway import Child, Nursery
from tests.postgres import Postgres
from tests.processes import bill
from tests.redis_servers import say
from tests.running import MODEL, GatewayUnderTest, TestClock, config_of, run_gateway
from tests.sizes import some
from tests.torture.verdict import Ledger, Notes, judge
from tests.valkey import Valkey, eventually, run_valkey

PEPPER = "pepper-0123456789abcdef-0123456789"
Tell = Callable[[str], None]
ERRORS = (Way.BEFORE, Way.AFTER, Way.HANG, Way.HANG_MADE)
KILLS = (Way.KILL_BEFORE, Way.KILL_AFTER)
SETTLE_TRIES = 3
"""Of ``SETTLE_PAUSES_SECONDS``; after them the settlement is kept on disk."""
BUDGET = 1000 * 10**9
LEASE = {"lease_seconds": 1.0, "sweep_seconds": 0.2}
POOR = "denied"
HIT = "#hit"


@dataclass(frozen=True)
class Ending:
    """How a request ends: its status, its error's code, and what became of its hold: P, V, X, or
    nothing. ``broken_off``: a stream that had begun ends with an error."""

    status: int
    code: str
    state: str
    broken_off: bool = False


DELIVERED = Ending(200, "", "P")


@dataclass(frozen=True)
class Scenario:
    """One kind of request, and the calls that it makes at least, when all is well."""

    name: str
    calls: Sequence[str]
    ending: Ending = DELIVERED
    kind: str = "json"
    away: Mapping[str, int] = field(default_factory=dict)


ADMITTED = ("directory.find_key", "ledger.claimed", "cache.get", "gate.take", "ledger.reserve")
BOUGHT = (*ADMITTED, "upstream.send", "reply.chunk", "reply.chunk", "reply.chunk")
SCENARIOS = [
    Scenario("json", [*BOUGHT, "ledger.settle", "cache.put", "gate.release"]),
    Scenario(
        "stream",
        [*BOUGHT, *["reply.chunk"] * 4, "ledger.settle", "cache.put", "gate.release"],
        kind="stream",
    ),
    Scenario("edit", [*BOUGHT, "ledger.settle", "cache.put", "gate.release"], kind="edit"),
    Scenario(
        "unsettled",
        [
            *BOUGHT,
            *["ledger.settle"] * SETTLE_TRIES,
            "safe.keep",
            "ledger.settle",
            "safe.settled",
            "cache.put",
            "gate.release",
        ],
        away={"ledger.settle": SETTLE_TRIES},
    ),
    Scenario(
        "refused",
        [*ADMITTED, "upstream.send", "reply.chunk", "ledger.settle", "gate.release"],
        Ending(429, "rate_limit_exceeded", "V"),
    ),
    Scenario(
        POOR,
        [*ADMITTED, "gate.undo", "ledger.balances"],
        Ending(429, "insufficient_quota", ""),
    ),
    Scenario(
        "hit",
        ["directory.find_key", "cache.get", "gate.take", "ledger.replay", "ledger.balances"],
        Ending(200, "", ""),
    ),
]

PLAIN = Scenario("plain", [])
ERROR_STEP, KILL_STEP = 3, 2
"""Every third way of a call's four to fail, and every other of its two to die, except in a soak:
the next place of the same call has the next way, in whichever scenario it is."""
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

LEDGER_AWAY = "ledger_unavailable"
ENDINGS: Mapping[tuple[str, Way], Ending] = {
    # Nothing was sent: 503, and an SDK may try again. A hold whose answer was lost is voided.
    **{("directory.find_key", way): Ending(503, LEDGER_AWAY, "") for way in ERRORS},
    **{("ledger.claimed", way): Ending(503, LEDGER_AWAY, "") for way in ERRORS},
    ("ledger.reserve", Way.BEFORE): Ending(503, LEDGER_AWAY, ""),
    ("ledger.reserve", Way.HANG): Ending(503, LEDGER_AWAY, ""),
    ("ledger.reserve", Way.AFTER): Ending(503, LEDGER_AWAY, "V"),
    ("ledger.reserve", Way.HANG_MADE): Ending(503, LEDGER_AWAY, "V"),
    ("upstream.send", Way.BEFORE): Ending(503, "upstream_unavailable", "V"),
    ("upstream.send", Way.HANG): Ending(503, "upstream_unavailable", "V"),
    # It may have been bought: no retry, and the bound is booked.
    ("upstream.send", Way.AFTER): Ending(502, "upstream_outcome_unknown", "X"),
    ("upstream.send", Way.HANG_MADE): Ending(504, "upstream_outcome_unknown", "X"),
    ("reply.chunk", Way.BEFORE): Ending(502, "upstream_bad_response", "X"),
    ("reply.chunk", Way.AFTER): Ending(502, "upstream_bad_response", "X"),
    ("reply.chunk", Way.HANG): Ending(504, "upstream_bad_response", "X"),
    ("reply.chunk", Way.HANG_MADE): Ending(504, "upstream_bad_response", "X"),
    # All else is ours, before or behind the purchase: the request ends as it does without a fault.
}
"""How a request for a picture ends that meets a fault."""


@dataclass
class Said:
    """What a client got. ``status`` 0: the connection broke before the head. ``text`` is what came
    of the body; ``whole`` is all of it, a picture."""

    status: int = 0
    code: str = ""
    rid: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    text: bytes = b""
    whole: bool = False
    broken_off: bool = False
    cost: int = 0


class Client:
    """Asks as each scenario does, and notes what it was told of money."""

    def __init__(self, sandbox: SandboxServer) -> None:
        self._sandbox = sandbox
        self.notes = Notes()
        self.told: dict[str, str] = {}
        """rid -> the name of the call."""

    async def ask(self, base_url: str, key: str, scenario: Scenario, name: str) -> Said:
        """``name`` is the idempotency key, and up to its mark the prompt."""
        parameters: dict[str, Any] = {
            "model": MODEL, "prompt": name.removesuffix(HIT), "quality": "low", "size": "1024x1024",
        }  # fmt: skip
        headers = {"authorization": f"Bearer {key}", "idempotency-key": name}
        path = "edits" if scenario.kind == "edit" else "generations"
        sent: dict[str, Any] = {"json": parameters}
        if scenario.kind == "stream":
            parameters |= {"stream": True, "partial_images": 2}
        elif scenario.kind == "edit":
            sent = {"data": parameters, "files": {"image": ("a.png", PNG, "image/png")}}
        said = Said()
        async with httpx.AsyncClient(headers=headers, timeout=30, verify=False) as http:
            try:
                async with http.stream("POST", f"{base_url}/images/{path}", **sent) as answer:
                    said.status, said.headers = answer.status_code, answer.headers
                    said.rid = answer.headers["x-request-id"]
                    async for chunk in answer.aiter_bytes():
                        said.text += chunk
                    self._read(said, answer, scenario)
            except httpx.TransportError:
                return said
        self.told[said.rid] = name
        if said.whole and said.headers.get("x-cache") != "hit":
            assert name not in self.notes.charged, "one call, charged twice"
            self.notes.charged[name] = said.cost
        return said

    def _read(self, said: Said, answer: httpx.Response, scenario: Scenario) -> None:
        if answer.status_code != 200:
            said.code = httpx.Response(200, content=said.text).json()["error"]["code"] or ""
            return
        if scenario.kind == "stream":
            said.broken_off = b"event: error" in said.text
            said.whole = b"event: image_generation.completed" in said.text
            if said.whole:
                last = said.text.rstrip().rpartition(b"data: ")[2]
                usage = httpx.Response(200, content=last).json()["usage"]
                tokens = usage["input_tokens_details"]["text_tokens"]
                said.cost = 5_000 * tokens + 30_000 * usage["output_tokens"]
            return
        said.whole = bool(httpx.Response(200, content=said.text).json()["data"][0]["b64_json"])
        said.cost = round(float(answer.headers["x-cost-usd"]) * 10**9)

    def bought(self, name: str) -> int:
        prompt = name.removesuffix(HIT)
        return sum(record.fields["prompt"] == prompt for record in self._sandbox.journal.billed)

    def judge(self, books: Ledger) -> None:
        """Nothing is lost, doubled, over a budget or under the bill, and all sums are right."""
        seen: set[str] = set()
        billed = []
        for record in self._sandbox.journal.billed:
            name = str(record.fields["prompt"])
            # Where the cache was away, what it had is bought again, by the call that missed it.
            if name.startswith("hit") and name in seen:
                name += HIT
            seen.add(name)
            billed.append((name, bill(record)))
        assert billed or all(hold.state == "V" for hold in books.holds)
        budgets = {
            account: 1 if f":{POOR}" in account else BUDGET
            for account in books.balances
            if account.startswith("team:") and "|d|" in account
        }
        verdict = judge(books, self.notes, billed, budgets)
        assert verdict.clean, verdict.details


async def enrol(directory: Directory, names: Sequence[str]) -> None:
    """Teams of the directory, which may do one thing at a time; those named ``denied`` are poor."""
    for name in names:
        day = 1 if name.startswith(POOR) else BUDGET
        limits = Limits(requests_per_minute=100_000, concurrent_requests=1, budget_day=day)
        await directory.create_team(Team(name, limits=limits))
        await directory.create_key(Key(f"k_{name}", name), keys.digest(PEPPER.encode(), key(name)))


def key(team: str) -> str:
    return f"{team}-key-0123456789abcdef"


@pytest.fixture
def sandbox(clock: TestClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock, journal=Journal(records=100_000)) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with run_valkey() as running:
        yield running


@pytest.fixture
def valkey(server: Valkey) -> Valkey:
    """It knows nothing of the tests before."""
    say(server.port, "FLUSHALL")
    return server


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints a row of the table: at ``-v`` at once, else where the test fails."""

    def row(line: str) -> None:
        with capsys.disabled() if request.config.get_verbosity() > 0 else nullcontext():
            print(line)

    return row


def rules_for(sandbox: SandboxServer, scenario: Scenario, name: str) -> None:
    """The upstream refuses a call of that scenario once; all else is quick."""
    sandbox.rules.clear()
    if scenario.name == "refused":
        body: Json = {"error": {"message": "Slow down.", "type": "requests", "param": None,
                          "code": "rate_limit_exceeded"}}  # fmt: skip
        # Hardly a rest: the next call is one of its own.
        advice = {"retry-after-ms": "1"}
        sandbox.rules.add(Rule(prompt=name, times=1, status=429, body=body, headers=advice))
    sandbox.rules.add(Rule(payload_bytes=400))


def configuration(valkey: Valkey, database: str | None = None, **storage: Any) -> dict[str, Any]:
    storage = {"redis": valkey.url, "pepper": PEPPER, **storage}
    return {
        "storage": storage | ({"database": database} if database else {}),
        "ledger": LEASE,
        "relay": {"attempts": 1},
    }


def state_of(books: Ledger, name: str, rid: str) -> str:
    """What became of a call's hold; empty where it has none. A voided one has lost its key."""
    return "".join(hold.state for hold in books.holds if name == hold.key or rid == hold.rid)


class Story:
    """One gateway, and one scenario again and again, its n-th call failing."""

    def __init__(
        self, gateway: GatewayUnderTest, faults: Faults, scenario: Scenario, deny: bool
    ) -> None:
        self.gateway, self.faults, self.scenario, self.deny = gateway, faults, scenario, deny
        self.client = Client(gateway.sandbox)
        self.database = gateway.config.parent / "data" / "gateway.db"
        self.example = b""
        """A whole stream, as it was sent."""

    async def ask(self, name: str, scenario: Scenario | None = None) -> Said:
        team = self.scenario.name
        return await self.client.ask(
            self.gateway.base_url, key(team), scenario or self.scenario, name
        )

    async def at_rest(self) -> None:
        """Until nothing is on its way any more, and Redis is asked again."""
        await self.gateway.gateway.flights.drain(10)

        async def quiet() -> bool:
            metrics = await self.gateway.metrics()
            degraded = metrics["gateway_gate_degraded"]
            return not degraded and not metrics["gateway_ledger_open_holds"]

        await eventually(quiet)

    async def once(self, name: str, place: Place, way: Way) -> tuple[Said, list[str]]:
        """The request, with a fault; the calls that it made."""
        rules_for(self.gateway.sandbox, self.scenario, name)
        if self.scenario.name == "hit":
            assert (await self.ask(name.removesuffix(HIT))).whole
            await self.at_rest()
        self.faults.arm(place, way, self.scenario.away)
        said = await self.ask(name)
        await self.gateway.gateway.flights.drain(10)
        calls = self.faults.disarm()
        await self.at_rest()
        return said, calls

    def expected(self, calls: Sequence[str], number: int, way: Way) -> Ending:
        call = calls[number - 1]
        if call == "gate.take" and self.deny:
            return Ending(503, "gate_unavailable", "")
        if call == "cache.get" and self.scenario.name == "hit":
            return DELIVERED
        if call == "reply.chunk" and self.scenario.name == "refused":
            return Ending(429, "", "V")  # the status was said, and decides; its text was lost
        ending = ENDINGS.get((call, way), self.scenario.ending)
        if self.scenario.name == POOR and call == "ledger.reserve":
            return Ending(503, LEDGER_AWAY, "")
        if call == "reply.chunk" and self.scenario.kind == "stream":
            came = PIECE_BYTES * calls[: number - 1].count("reply.chunk")
            if came >= end_of(self.example, b"event: image_generation.completed"):
                return DELIVERED
            if came >= end_of(self.example, b"event: image_generation.partial_image"):
                return Ending(200, "", "X", broken_off=True)
        return ending

    def check(self, said: Said, expected: Ending) -> str:
        """The hold's state, once the answer is the one that was expected."""
        assert (said.status, said.code) == (expected.status, expected.code)
        assert said.broken_off == expected.broken_off
        assert said.whole == (expected.status == 200 and not expected.broken_off)
        retry = said.headers.get("x-should-retry")
        if expected.state == "X" and said.status != 200:
            assert retry == "false", "what may have been bought is not bought again"
        if expected.status == 503:
            assert retry != "false"
            assert int(said.headers["retry-after"]) > 0
        state = state_of(ledger_of(self.database), self.client.told[said.rid], said.rid)
        assert state == expected.state
        return state

    async def check_retry(self, name: str, state: str, call: str, way: Way) -> None:
        """The same request again: whatever was bought is bought once. A slot whose call Redis has
        taken, and could not say so, is given back a moment later."""
        rules_for(self.gateway.sandbox, PLAIN, name)
        again = await self.ask(name)

        async def let_in() -> bool:
            nonlocal again
            if again.code != "rate_limit_exceeded":
                return True
            again = await self.ask(name)
            return False

        if call.startswith("gate."):
            await eventually(let_in)
        if state == "X":
            assert (again.status, again.code) == (502, "upstream_outcome_unknown")
        elif self.scenario.name == POOR:
            assert again.code == "insufficient_quota"
        elif state == "P" and call.startswith("gate.") and again.status != 200:
            # Redis was taken for away meanwhile, and it is where answers are kept.
            assert (again.status, again.code) == (410, "idempotent_result_expired")
        else:
            assert (again.status, again.whole) == (200, True)
            replayed = state == "P" or self.scenario.name == "hit"
            assert (again.headers["x-cache"] == "hit") == replayed
        twice = self.scenario.name == "hit" and state == "P"
        assert self.client.bought(name) <= 1 + twice

    async def check_next(self, name: str, call: str) -> None:
        """One at a time, and the next one is let in: nobody holds the slot any more. What Redis
        did not hear, it hears soon."""

        async def served() -> bool:
            said = await self.ask(f"{name}~", PLAIN)
            if self.scenario.name == POOR:
                assert said.code in ("insufficient_quota", "rate_limit_exceeded")
                return said.code == "insufficient_quota"
            if said.status == 429 and call.startswith("gate."):
                return False
            assert (said.status, said.whole) == (200, True)
            return True

        await eventually(served)


def name_of(scenario: Scenario, number: int, way: Way) -> str:
    """All of one length, so that all answers are."""
    mark = HIT if scenario.name == "hit" else ""
    return f"{scenario.name}-{number:03}-{list(Way).index(way)}{mark}"


def ways_of(scenario: Scenario, place: Place, ways: Sequence[Way], step: int) -> list[Way]:
    """How the call at that place fails: in all ways where there are too few places to share."""
    name, which = place
    counts = [one.calls.count(name) for one in SCENARIOS]
    if sum(counts) < step:
        return list(ways)
    return some(ways, sum(counts[: SCENARIOS.index(scenario)]) + which, step)


@pytest.mark.parametrize(("ways", "step"), [(ERRORS, ERROR_STEP), (KILLS, KILL_STEP)])
def test_every_call_fails_in_every_way_somewhere(ways: Sequence[Way], step: int) -> None:
    met = {
        (name, way)
        for scenario in SCENARIOS
        for name in {*scenario.calls}
        for which in range(1, scenario.calls.count(name) + 1)
        for way in ways_of(scenario, (name, which), ways, step)
    }
    assert met == {(name, way) for one in SCENARIOS for name in one.calls for way in ways}


def end_of(stream: bytes, event: bytes) -> int:
    """Where the first event of a kind has come whole."""
    return stream.index(b"\n\n", stream.index(event)) + 2


def is_subsequence(wanted: Sequence[str], calls: Sequence[str]) -> bool:
    rest = iter(calls)
    return all(call in rest for call in wanted)


def check_recorded(calls: Sequence[str], scenario: Scenario) -> None:
    """The cases cannot become fewer without somebody hearing of it."""
    bare = [call for call in calls if call not in ("safe.settled", "cache.put")]
    wanted = [call for call in scenario.calls if call not in ("safe.settled", "cache.put")]
    assert is_subsequence(wanted, bare), calls
    # An errand of its own: it may come before or after what follows.
    assert {"safe.settled", "cache.put"} & {*scenario.calls} <= {*calls}


@pytest.mark.parametrize(
    ("scenario", "deny"),
    [*((scenario, False) for scenario in SCENARIOS), (SCENARIOS[0], True)],
    ids=[*(scenario.name for scenario in SCENARIOS), "json, deny"],
)
async def test_every_call_fails_and_money_is_exact(
    tmp_path: Path,
    sandbox: SandboxServer,
    clock: TestClock,
    valkey: Valkey,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    scenario: Scenario,
    deny: bool,
) -> None:
    faults = Faults()
    install(faults, monkeypatch.setattr)
    changes = configuration(valkey, without_redis="deny" if deny else "local")
    wrong: list[str] = []
    async with run_gateway(tmp_path, sandbox, changes, clock) as gateway:
        await enrol(gateway.gateway.directory, [scenario.name])
        story = Story(gateway, faults, scenario, deny)
        await story.at_rest()
        said, calls = await story.once(name_of(scenario, 0, Way.BEFORE), ("", 0), Way.BEFORE)
        places = faults.places
        story.example = said.text
        story.check(said, scenario.ending)
        check_recorded(calls, scenario)
        for number, call in enumerate(calls, start=1):
            # Only the gate's own calls can end otherwise where Redis is not done without.
            step = 1 if deny and call.startswith("gate.") else ERROR_STEP
            for way in ways_of(scenario, places[number - 1], ERRORS, step):
                name = name_of(scenario, number, way)
                said, made = await story.once(name, places[number - 1], way)
                expected = story.expected(calls, number, way)
                row = f"{scenario.name:9} {number:2} {call:18} {way.value:14}"
                try:
                    assert faults.met == call, made
                    state = story.check(said, expected)
                    await story.check_retry(story.client.told[said.rid], state, call, way)
                    await story.at_rest()
                    await story.check_next(story.client.told[said.rid], call)
                    await story.at_rest()
                    assert await faults.stores[0].books.audit() == []
                except AssertionError as error:
                    wrong.append(f"{row}: {error}")
                tell(f"{row} -> {said.status} {said.code:24} {expected.state or '-'}")
        story.client.judge(ledger_of(story.database))
        metrics = await gateway.metrics()
        assert metrics["gateway_settlements_waiting"] == 0
        assert metrics["gateway_inflight_requests"] == 0
        assert metrics['gateway_inflight_bytes{where="memory"}'] == 0
    assert wrong == []


def state_after(calls: Sequence[str], number: int, way: Way, scenario: Scenario) -> str:
    """What the books say of a call whose process died at its n-th store or upstream call, once the
    lease is over: what was settled, or kept on disk, is exact; what was only held is the bound."""
    made = [*calls[: number - 1], *([calls[number - 1]] if way.made else [])]
    tries = made.count("ledger.settle")
    if "safe.keep" in made or tries > scenario.away.get("ledger.settle", 0):
        return scenario.ending.state
    if way.made and calls[number - 1] == "ledger.settle":
        return scenario.ending.state
    return "X" if "ledger.reserve" in made and scenario.name != POOR else ""


class Deaths:
    """Gateways of one configuration that die one after the other, each at another call."""

    def __init__(self, nursery: Nursery, config: Path, client: Client, scenario: Scenario) -> None:
        self._nursery, self._config = nursery, config
        self._client, self._scenario = client, scenario
        self.said: dict[str, Said] = {}

    async def start(
        self,
        place: Place = ("", 0),
        way: Way = Way.KILL_BEFORE,
        away: Mapping[str, int] | None = None,
    ) -> Child:
        return await asyncio.to_thread(self._nursery.start, self._config, place, way, away)

    async def die(self, name: str, team: str, place: Place, way: Way) -> int:
        """One request to one gateway; the exit code."""
        child = await self.start(place, way, self._scenario.away)
        self.said[name] = await self._client.ask(child.base_url, key(team), self._scenario, name)
        waiting = asyncio.ensure_future(asyncio.to_thread(child.wait))
        if not (await asyncio.wait({waiting}, timeout=15))[0]:
            os.kill(child.pid, signal.SIGTERM)  # and the test says what it has outlived
        return await waiting


async def recorded(
    folder: Path,
    sandbox: SandboxServer,
    changes: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    scenario: Scenario,
) -> tuple[list[str], list[Place]]:
    """The calls of a request that nothing happens to."""
    faults = Faults()
    with monkeypatch.context() as patch:
        install(faults, patch.setattr)
        async with run_gateway(folder, sandbox, changes) as gateway:
            await enrol(gateway.gateway.directory, [scenario.name])
            story = Story(gateway, faults, scenario, deny=False)
            await story.at_rest()
            _, calls = await story.once(name_of(scenario, 0, Way.BEFORE), ("", 0), Way.BEFORE)
    check_recorded(calls, scenario)
    return calls, faults.places


async def until_ended(database: Path | str) -> None:
    def ended() -> bool:
        return all(hold.state != "H" for hold in ledger_of(database).holds)

    await eventually(ended, 20)


async def deaths(
    folder: Path,
    sandbox: SandboxServer,
    valkey: Valkey,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    scenario: Scenario,
    database: str | None = None,
    only: Callable[[str], bool] = lambda call: True,
) -> None:
    """A process dies at each call that is meant, before it and after it; then a gateway that
    nothing happens to finds what they left."""
    for name in ("recorded", "dying"):
        (folder / name).mkdir()
    calls, places = await recorded(
        folder / "recorded", sandbox, configuration(valkey), monkeypatch, scenario
    )
    sandbox.journal.clear()
    config = config_of(folder / "dying", sandbox.base_url, configuration(valkey, database))
    books: Path | str = database or config.parent / "data" / "gateway.db"
    cases = [
        (number, call, way)
        for number, call in enumerate(calls, start=1)
        for way in ways_of(scenario, places[number - 1], KILLS, KILL_STEP)
        if only(call)
    ]
    teams = {
        (number, way): f"{scenario.name}{number}{way.made}".lower() for number, _, way in cases
    }
    if isinstance(books, Path):
        books.parent.mkdir()
    store: Store = SQLiteStore.open(books) if isinstance(books, Path) else PostgresStore.open(books)
    await enrol(store.directory, list(teams.values()))
    client = Client(sandbox)
    with Nursery() as nursery:
        dying = Deaths(nursery, config, client, scenario)
        if scenario.name == "hit":
            warm = await dying.start()
            rules_for(sandbox, PLAIN, "")
            for number, _, way in cases:
                bought = name_of(scenario, number, way).removesuffix(HIT)
                url, secret = warm.base_url, key(teams[number, way])
                assert (await client.ask(url, secret, PLAIN, bought)).whole
            assert await asyncio.to_thread(warm.end) == 0
        for number, call, way in cases:
            name, team = name_of(scenario, number, way), teams[number, way]
            rules_for(sandbox, scenario, name)
            code = await dying.die(name, team, places[number - 1], way)
            assert code == KILLED, f"it outlived {call} {way.value}"
        clean = await dying.start()
        await until_ended(books)
        assert await store.books.audit() == []
        wrong = []
        for number, call, way in cases:
            name, team = name_of(scenario, number, way), teams[number, way]
            expected = state_after(calls, number, way, scenario)
            state = state_of(ledger_of(books), name, dying.said[name].rid or "?")
            row = f"{scenario.name:9} {number:2} {call:18} {way.value:14} -> {state or '-'}"
            tell(row)
            if state != expected:
                wrong.append(f"{row}, expected {expected or '-'}")
                continue
            rules_for(sandbox, PLAIN, name)
            wrong += [
                f"{row}: {why}" async for why in after(client, clean, scenario, team, name, state)
            ]
        assert wrong == []
        assert await asyncio.to_thread(clean.end) == 0
    assert await store.books.audit() == []
    await store.aclose()
    client.judge(ledger_of(books))


async def after(
    client: Client, clean: Child, scenario: Scenario, team: str, name: str, state: str
) -> AsyncIterator[str]:
    """What is wrong with the next requests of a team whose gateway has died: its slot is free, and
    the same request again buys nothing twice."""

    async def served() -> bool:
        said = await client.ask(clean.base_url, key(team), PLAIN, f"{name}~")
        return said.whole or said.code == "insufficient_quota"

    await eventually(served)
    again = await client.ask(clean.base_url, key(team), scenario, name)
    answered = "hit" if again.headers.get("x-cache") == "hit" else str(again.code or again.status)
    # What was paid for by a process that died before it had put it away is gone, and says so.
    allowed = {"X": {"upstream_outcome_unknown"}, "P": {"idempotent_result_expired", "hit"}}.get(
        state, {POOR: {"insufficient_quota"}, "hit": {"hit"}}.get(scenario.name, {"200"})
    )
    if answered not in allowed:
        yield f"asked again it was {answered}"
    if client.bought(name) > 1:
        yield "it was bought twice"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[*BY_NAME])
async def test_a_process_dies_at_every_call_and_money_is_exact(
    tmp_path: Path,
    sandbox: SandboxServer,
    valkey: Valkey,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    scenario: Scenario,
) -> None:
    await deaths(tmp_path, sandbox, valkey, monkeypatch, tell, scenario)


async def test_a_process_dies_at_every_call_to_postgresql(
    tmp_path: Path,
    sandbox: SandboxServer,
    valkey: Valkey,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    postgres: Postgres,
) -> None:
    await deaths(
        tmp_path,
        sandbox,
        valkey,
        monkeypatch,
        tell,
        BY_NAME["unsettled"],
        postgres.fresh_database(),
        lambda call: call.startswith(("ledger.", "directory.", "safe.")),
    )
