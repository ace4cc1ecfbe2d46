"""`gateway ledger`: a call looked up, corrected, and the books added up again."""

from __future__ import annotations

import asyncio
import getpass
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from gateway.cli.ledger import team_accounts
from gateway.domain.call import Operation
from gateway.domain.ledger import Claim, Line, Reroute
from gateway.domain.money import format_dollars
from gateway.domain.quota import MONEY_WINDOWS, Limit, Scope, Unit, period
from gateway.domain.team import Team
from gateway.sandbox.server import SandboxServer
from gateway.stores.sqlite import SQLiteStore
from tests.cli.conftest import Say
from tests.cli.spending import DAY, NOON, ONE, PROMPT, spend
from tests.running import ALIAS, MODEL, TestClock, run_gateway

Ask = Callable[..., Any]
DATABASE = Path("data", "gateway.db")


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Books with one call of unknown outcome and one that did not say what it cost."""
    folder = tmp_path_factory.mktemp("spent")
    clock = TestClock(NOON)
    with SandboxServer(clock) as sandbox:
        return asyncio.run(spend(folder, sandbox, clock, lost=1, no_usage=1))


@pytest.fixture
def books(spent: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    folder = tmp_path / "books"
    shutil.copytree(spent[0].parent, folder)
    return folder / spent[0].name


@pytest.fixture
def lost(spent: tuple[Path, list[str]]) -> str:
    return spent[1][0]


def balance(books: Path, account: str) -> Decimal:
    """What an account has posted, in dollars."""
    with sqlite3.connect(books.parent / DATABASE) as database:
        row = database.execute(
            "SELECT posted FROM balance WHERE account = ?", (account,)
        ).fetchone()
    return Decimal(row[0] if row else 0) / 10**9


def booked(ask: Ask, books: Path, team: str, day: str = DAY) -> Decimal:
    found = ask(
        "usage", "--json", "--config", books, "--team", team, "--since", day, "--until", day
    )
    return Decimal(found["total"]["cost_usd"])


def test_unresolved(ask: Ask, say: Say, books: Path, spent: tuple[Path, list[str]]) -> None:
    _, (unknown, silent) = spent
    found = {each["rid"]: each for each in ask("ledger", "unresolved", "--json", "--config", books)}
    assert set(found) == {unknown, silent}
    assert found[unknown]["state"] == "unresolved"
    assert found[unknown]["why"] == "outcome unknown: booked at its bound"
    assert found[silent]["state"] == "posted"
    assert found[silent]["why"] == "the answer had no usage: booked at its bound"
    assert found[unknown]["team"] == "design"

    head, *lines = say("ledger", "unresolved", "--config", books).stdout.splitlines()
    assert head.split() == ["RID", "WHEN", "TEAM", "MODEL", "STATE", "COST", "WHY"]
    assert {line.split()[0] for line in lines} == {unknown, silent}
    limited = say("ledger", "unresolved", "--limit", "1", "--config", books)
    assert len(limited.stdout.splitlines()) == 2
    assert "--limit" in limited.stderr


def test_show(ask: Ask, say: Say, books: Path, lost: str, spent: tuple[Path, list[str]]) -> None:
    found = ask("ledger", "show", lost, "--json", "--config", books)
    assert found["hold"]["state"] == "unresolved"
    assert found["hold"]["cost_usd"] == found["hold"]["bound_usd"]
    assert found["hold"]["accounts"]
    assert [line["kind"] for line in found["journal"]] == ["H", "X"]
    bound = found["hold"]["bound_usd"]
    assert [line["set_aside_usd"] for line in found["journal"]] == [bound, f"-{bound}"]
    assert [line["posted_usd"] for line in found["journal"]] == ["0", bound]

    said = say("ledger", "show", lost, "--config", books).stdout
    assert "team        design" in said
    assert "unresolved (outcome unknown: booked at its bound)" in said
    assert "its bound was set aside" in said
    assert "its outcome is unknown: posted at its bound" in said
    silent = say("ledger", "show", spent[1][1], "--config", books).stdout
    assert (
        "it ended, and its cost was posted; delivered; cost not said, so its bound; images 1; "
        "flags no_usage"
    ) in silent


def test_show_says_where_a_call_went(ask: Ask, say: Say, books: Path) -> None:
    at = datetime(2026, 11, 20, 13, tzinfo=UTC)

    async def go() -> None:
        store = SQLiteStore.open(books.parent / DATABASE)
        await store.ledger.reserve(
            Claim(
                *("req_way", "design", "k1", "flare", Operation.GENERATION, "openai", 1),
                *(40_000_000, (), at, at + timedelta(minutes=11), "p1"),
            )
        )
        await store.ledger.reroute(
            Reroute("req_way", "blaze", "azure", "p2", 50_000_000, (), at + timedelta(seconds=5))
        )
        await store.ledger.reroute(
            Reroute("req_way", "blaze", "other", "", 1, (), at + timedelta(seconds=9))
        )
        await store.aclose()

    asyncio.run(go())
    said = say("ledger", "show", "req_way", "--config", books).stdout
    assert "asked for   generation with blaze from other, n=1" in said
    assert "bound       $0.05, by price (none)" in said
    table = [" ".join(line.split()) for line in said.splitlines()]
    assert table[-3:] == [
        "2026-11-20 13:00:00Z +$0.04 its bound was set aside",
        "2026-11-20 13:00:05Z +$0.01 it went on to azure as blaze, by price p2; "
        "before that flare from openai",
        "2026-11-20 13:00:09Z it went on to other as blaze, by price (none); "
        "before that blaze from azure",
    ]
    found = ask("ledger", "show", "req_way", "--json", "--config", books)
    assert (found["hold"]["model"], found["hold"]["bound_usd"]) == ("blaze", "0.05")
    assert [line["kind"] for line in found["journal"]] == ["H", "B", "B"]
    assert [line["set_aside_usd"] for line in found["journal"]] == ["0.04", "0.01", "0"]
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


def test_what_is_not_there(say: Say, books: Path) -> None:
    said = say("ledger", "show", "req_nothing", "--config", books)
    assert said.exit_code == 1
    assert "the books have no call req_nothing" in said.stderr
    said = say("ledger", "adjust", "req_nothing", "--cost", "1", "--reason", "r", "--config", books)
    assert said.exit_code == 1
    assert "req_nothing" in said.stderr


def test_a_correction(ask: Ask, say: Say, books: Path, lost: str) -> None:
    before = booked(ask, books, "design")
    command = (
        *("ledger", "adjust", lost, "--cost", "0.042", "--images", "1", "--id", "ticket-7"),
        *("--reason", "the provider's log says so", "--config", books),
    )
    said = say(*command)
    bound = ask("ledger", "show", lost, "--json", "--config", books)["hold"]["bound_usd"]
    assert said.exit_code == 0, said.output
    assert said.stdout == (
        f"{lost} (team design, {MODEL}): unresolved ${bound} -> posted $0.042, as ticket-7\n"
    )
    after = before + Decimal("0.042") - Decimal(bound)
    assert booked(ask, books, "design") == after
    assert balance(books, f"team:design|d|{DAY}") == after
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]

    again = say(*command)
    assert (again.exit_code, again.stdout) == (
        0,
        f"nothing to do: {lost} is posted at $0.042 already\n",
    )
    assert booked(ask, books, "design") == after

    shown = ask("ledger", "show", lost, "--json", "--config", books)
    assert [line["kind"] for line in shown["journal"]] == ["H", "X", "A"]
    assert shown["journal"][-1]["detail"]["actor"] == getpass.getuser()
    words = say("ledger", "show", lost, "--config", books).stdout
    assert f"{getpass.getuser()} adjusted it: the provider's log says so" in words
    left = ask("ledger", "unresolved", "--json", "--config", books)
    assert lost not in [each["rid"] for each in left]


def test_an_id_is_for_one_amount(say: Say, books: Path, lost: str) -> None:
    def adjust(cost: str) -> Any:
        return say(
            *("ledger", "adjust", lost, "--cost", cost, "--id", "one", "--actor", "ada"),
            *("--reason", "r", "--config", books),
        )

    assert adjust("0.01").exit_code == 0
    said = adjust("0.02")
    assert said.exit_code == 1
    assert "the id one was used before" in said.stderr
    assert "posted at $0.01" in said.stderr


def test_a_running_call_is_left_alone(say: Say, books: Path) -> None:
    lease_ends = datetime(2026, 11, 20, 12, 11, tzinfo=UTC)

    async def hold() -> None:
        store = SQLiteStore.open(books.parent / DATABASE)
        try:
            limit = Limit(Scope.TEAM, "design", Unit.MONEY, MONEY_WINDOWS[0], None)
            line = Line(limit, period(limit.window, NOON))
            await store.ledger.reserve(
                Claim(
                    "running-1",
                    "design",
                    "k",
                    MODEL,
                    Operation.GENERATION,
                    "openai",
                    1,
                    10**9,
                    (line,),
                    NOON,
                    lease_ends,
                )
            )
        finally:
            await store.aclose()

    asyncio.run(hold())
    said = say("ledger", "adjust", "running-1", "--cost", "1", "--reason", "r", "--config", books)
    assert said.exit_code == 1
    assert "running-1 still runs" in said.stderr
    assert "2026-11-20 12:11:00Z" in said.stderr


def test_an_adjustment_of_a_day(ask: Ask, say: Say, books: Path) -> None:
    command = (
        *("ledger", "adjust", "--team", "growth", "--model", ALIAS, "--day", DAY),
        *("--amount", "-0.0035", "--reason", "a credit", "--id", "credit-1", "--actor", "ada"),
        *("--config", books),
    )
    said = say(*command)
    assert said.exit_code == 0, said.output
    before, after = format_dollars(2 * ONE), format_dollars(2 * ONE - 3_500_000)
    assert said.stdout == (f"team growth, {ALIAS}, {DAY}: ${before} -> ${after}, as credit-1\n")
    again = say(*command)
    assert again.stdout.startswith("nothing to do: credit-1 was applied before")
    whole = Decimal(3 * ONE - 3_500_000) / 10**9
    assert booked(ask, books, "growth") == whole
    for account in (f"d|{DAY}", "w|2026-W47", "m|2026-11", "t|all"):
        assert balance(books, f"team:growth|{account}") == whole
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]
    assert "warning" not in said.stderr
    words = say("ledger", "show", "credit-1", "--config", books).stdout
    assert "ada adjusted it: a credit" in words


def test_a_team_that_has_spent_less_than_nothing(say: Say, books: Path) -> None:
    """Its hard budget lets more through than it says: that is hardly meant."""

    def adjust(amount: str) -> Any:
        return say(
            *("ledger", "adjust", "--team", "growth", "--model", ALIAS, "--day", DAY),
            *("--amount", amount, "--reason", "a credit", "--config", books),
        )

    said = adjust(f"-{format_dollars(3 * ONE + 500_000_000)}")
    assert said.exit_code == 0
    assert said.stderr == (
        f"warning: team growth has spent less than nothing now: -$0.5 on {DAY}, -$0.5 in 2026-W47, "
        "-$0.5 in 2026-11, -$0.5 in all. Its budgets, hard ones too, have that much more room than "
        "their amounts. If it was not meant, adjust it back.\n"
    )
    assert adjust("0.5").stderr == ""


def test_a_correction_that_leaves_less_than_nothing(
    ask: Ask, say: Say, books: Path, lost: str
) -> None:
    bound = Decimal(ask("ledger", "show", lost, "--json", "--config", books)["hold"]["bound_usd"])
    without = booked(ask, books, "design") - bound
    day = ("--team", "design", "--model", MODEL, "--day", DAY, "--amount", f"-{without}")
    common = ("--reason", "r", "--config", books)
    assert say("ledger", "adjust", *day, *common).stderr == ""
    assert say("ledger", "adjust", *day[:-1], "-0.001", *common).stderr == ""
    said = say("ledger", "adjust", lost, "--cost", "0", *common)
    assert said.exit_code == 0
    assert f"team design has spent less than nothing now: -$0.001 on {DAY}," in said.stderr


@pytest.mark.parametrize(
    "other",
    [
        ("--team", "design"),
        ("--model", MODEL),
        ("--day", "2026-11-19"),
        ("--amount", "-0.01"),
    ],
)
def test_an_id_is_for_one_adjustment(
    ask: Ask, say: Say, books: Path, other: tuple[str, str]
) -> None:
    meant = {"--team": "growth", "--model": ALIAS, "--day": DAY, "--amount": "-9"}

    def adjust(options: dict[str, str]) -> Any:
        given = [part for option in options.items() for part in option]
        return say("ledger", "adjust", *given, "--id", "x", "--reason", "r", "--config", books)

    said = adjust(meant)
    assert "-> -$8.98" in said.stdout
    spent = booked(ask, books, "growth"), booked(ask, books, "design")
    name, value = other
    said = adjust(meant | {name: value})
    assert (said.exit_code, said.stdout) == (1, "")
    assert f"the id x was used before, for team growth, {ALIAS}, {DAY}: -$9" in said.stderr
    assert (booked(ask, books, "growth"), booked(ask, books, "design")) == spent
    assert adjust(meant).exit_code == 0


def test_the_id_of_a_correction_is_taken(say: Say, books: Path, lost: str) -> None:
    common = ("--id", "x", "--reason", "r", "--config", books)
    assert say("ledger", "adjust", lost, "--cost", "0.01", *common).exit_code == 0
    day = ("--team", "growth", "--model", ALIAS, "--day", DAY, "--amount", "1")
    said = say("ledger", "adjust", *day, *common)
    assert said.exit_code == 1
    assert "the id x was used before, to correct a call" in said.stderr


@pytest.mark.parametrize(
    ("model", "day", "why"),
    [
        (MODEL, "2099-11-22", "2099-11-22 has not begun yet, where team growth is (UTC)"),
        ("gpt-imag-2", DAY, "there is no model 'gpt-imag-2'"),
        (MODEL + "x", DAY, f"did you mean {MODEL}?"),
    ],
)
def test_what_cannot_have_been_spent(say: Say, books: Path, model: str, day: str, why: str) -> None:
    document = yaml.safe_load(books.read_text())
    document["models"]["*"] = {"upstream": "openai"}
    books.write_text(yaml.safe_dump(document))
    said = say(
        *("ledger", "adjust", "--team", "growth", "--model", model, "--day", day),
        *("--amount", "-9", "--reason", "r", "--config", books),
    )
    assert said.exit_code == 1
    assert why in said.stderr


def test_a_model_that_is_gone_keeps_its_books(say: Say, books: Path) -> None:
    document = yaml.safe_load(books.read_text())
    del document["models"][ALIAS]
    books.write_text(yaml.safe_dump(document))
    day = ("--model", ALIAS, "--amount", "1", "--reason", "r", "--config", books)
    assert say("ledger", "adjust", "--team", "growth", "--day", DAY, *day).exit_code == 0
    said = say("ledger", "adjust", "--team", "growth", "--day", "2026-11-19", *day)
    assert said.exit_code == 1
    assert "nothing was booked for it on 2026-11-19" in said.stderr


def test_an_adjustment_is_in_the_team_s_own_day(ask: Ask, say: Say, books: Path) -> None:
    """The day is the usage's (UTC); its balances are those of noon where the team lives."""

    async def create() -> None:
        store = SQLiteStore.open(books.parent / DATABASE)
        try:
            await store.directory.create_team(Team("far", time_zone="Pacific/Kiritimati"))
        finally:
            await store.aclose()

    asyncio.run(create())
    said = say(
        *("ledger", "adjust", "--team", "far", "--model", MODEL, "--day", "2025-12-31"),
        *("--amount", "2", "--reason", "r", "--config", books),
    )
    assert said.exit_code == 0, said.output
    assert balance(books, "team:far|d|2025-12-31") == 2
    assert balance(books, "team:far|m|2025-12") == 2
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Pacific/Niue", "Africa/Cairo"])
def test_the_accounts_of_a_day(zone: str) -> None:
    day = datetime(2026, 4, 24, tzinfo=UTC).date()
    for offset in range(0, 400, 7):
        at = day + timedelta(days=offset)
        labels = [name.partition("|")[2] for name in team_accounts("t", at, ZoneInfo(zone))]
        year, week, _ = at.isocalendar()
        assert labels == [f"d|{at}", f"w|{year}-W{week:02}", f"m|{at:%Y-%m}", "t|all"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("rid",), "with RID, say --cost"),
        ((), "say RID and --cost, or also --team, --model, --day, --amount"),
        (("--team", "growth", "--amount", "1"), "--model, --day"),
        (("rid", "--cost", "1", "--team", "growth"), "--team cannot be said of one call"),
        (("--team", "t", "--model", "m", "--day", DAY, "--amount", "1", "--images", "2"), "RID"),
        (("rid", "--cost", "-1"), "must be zero or more"),
        (("rid", "--cost", "0.0000000001"), "finer than a nano-dollar"),
        (("--team", "t", "--model", "m", "--day", "soon", "--amount", "1"), "--day"),
        (("--team", "t", "--model", "m", "--day", DAY, "--amount", "--1"), "--amount"),
        (("rid", "--cost", "1", "--reason", "  "), "--reason is empty"),
    ],
)
def test_what_is_asked_wrongly(say: Say, books: Path, arguments: tuple[str, ...], why: str) -> None:
    said = say("ledger", "adjust", "--reason", "r", *arguments, "--config", books)
    assert said.exit_code == 2
    assert why in said.stderr


def test_a_reason_is_needed(say: Say, books: Path) -> None:
    said = say("ledger", "adjust", "rid", "--cost", "1", "--config", books)
    assert said.exit_code == 2
    assert "--reason" in said.stderr


def test_a_team_that_nobody_knows(say: Say, books: Path) -> None:
    said = say(
        *("ledger", "adjust", "--team", "nobody", "--model", MODEL, "--day", DAY),
        *("--amount", "1", "--reason", "r", "--config", books),
    )
    assert said.exit_code == 1
    assert said.stderr == "there is no team nobody; gateway team list shows all\n"


def test_a_team_that_is_gone_keeps_its_books(ask: Ask, say: Say, books: Path) -> None:
    books.write_text(books.read_text().replace("growth:", "renamed:"))
    said = say(
        *("ledger", "adjust", "--team", "growth", "--model", MODEL, "--day", DAY),
        *("--amount", "1", "--reason", "r", "--config", books),
    )
    assert said.exit_code == 0, said.output
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


def test_verify(say: Say, ask: Ask, books: Path) -> None:
    said = say("ledger", "verify", "--config", books)
    assert said.exit_code == 0
    assert said.stdout.startswith("the books add up: $0.0")
    assert "in 3 rows of daily usage, 0 calls running" in said.stdout

    with sqlite3.connect(books.parent / DATABASE) as database:
        database.execute(
            "UPDATE balance SET posted = posted + 7 WHERE account = ?", (f"team:growth|d|{DAY}",)
        )
    damaged = say("ledger", "verify", "--config", books)
    assert damaged.exit_code == 1
    assert f"posted of team:growth|d|{DAY}" in damaged.stdout
    told = say("ledger", "verify", "--json", "--config", books)
    assert told.exit_code == 1
    assert '"ok": false' in told.stdout


async def test_beside_a_running_gateway(say: Say, tmp_path: Path) -> None:
    """Its own balance is corrected, and what it spends next is on top of that."""
    clock = TestClock(NOON)
    with SandboxServer(clock) as sandbox:
        async with run_gateway(tmp_path, sandbox, {}, clock) as gateway, gateway.sdk() as sdk:

            async def draw() -> str:
                answer = await sdk.images.with_raw_response.generate(
                    model=MODEL,
                    prompt=PROMPT,
                    quality="low",
                    size="1024x1024",
                    extra_headers={"cache-control": "no-cache"},
                )
                return answer.headers["x-request-id"]

            rid = await draw()
            command = ("ledger", "adjust", rid, "--cost", "0.5", "--reason", "r", "--config")
            said = await asyncio.to_thread(say, *command, gateway.config)
            assert said.exit_code == 0, said.output
            await draw()
            [row] = await gateway.usage()
            assert row.cost == 500_000_000 + ONE
            said = await asyncio.to_thread(say, "ledger", "verify", "--config", gateway.config)
            assert said.exit_code == 0, said.output


def test_factors(say: Say, ask: Ask, books: Path) -> None:
    assert ask("ledger", "factors", "--json", "--config", books) == []

    async def surprise() -> None:
        store = SQLiteStore.open(books.parent / DATABASE)
        try:
            await store.upkeep.raise_factor("openai", "a/b", 1_250_000)
            await store.upkeep.raise_factor("openai", MODEL, 2_000_000)
        finally:
            await store.aclose()

    asyncio.run(surprise())
    lines = say("ledger", "factors", "--config", books).stdout.splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["openai/a/b", "x", "1.25"],
        [f"openai/{MODEL}", "x", "2"],
    ]
    reset = say("ledger", "factors", "--reset", "openai/a/b", "--config", books)
    assert reset.exit_code == 0
    assert "a running gateway follows within a minute" in reset.stdout
    assert [one["model"] for one in ask("ledger", "factors", "--json", "--config", books)] == [
        MODEL
    ]
    again = say("ledger", "factors", "--reset", "openai/a/b", "--config", books)
    assert again.exit_code == 1
    assert "the bounds of openai/a/b are not raised" in again.stderr
    assert say("ledger", "factors", "--reset", MODEL, "--config", books).exit_code == 2
