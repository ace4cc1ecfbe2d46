"""`gateway reconcile`: a real bill of the sandbox against real books (T19)."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import logging
import shlex
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.cli.common import with_store
from gateway.cli.reconcile import apply_all
from gateway.clock import SystemClock
from gateway.domain.bill import BilledItem
from gateway.domain.money import format_dollars
from gateway.domain.route import Target
from gateway.reports.reconcile import reconcile as compare
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import load
from tests.cli.conftest import Say
from tests.cli.spending import DAY, NOON, ONE, PROMPT, spend
from tests.inbox import SECRET, Inbox
from tests.inbox import inbox as open_inbox
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, TestClock, run_gateway

Ask = Callable[..., Any]
COSTS = "/organization/costs"


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(NOON)) as running:
        yield running


@pytest.fixture(autouse=True)
def _as_it_logged() -> Iterator[None]:
    """An alert configures the process's log, as each command does for itself."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def books(tmp_path: Path, sandbox: SandboxServer) -> Path:
    """Growth was booked three pictures, design one; all are on the sandbox's bill."""
    config, _ = asyncio.run(spend(tmp_path, sandbox, TestClock(NOON)))
    return config


def drift(sandbox: SandboxServer, percent: float) -> None:
    sandbox.rules.add(Rule(path=COSTS, drift_percent=percent))


def report(say: Say, books: Path, *options: str | Path, code: int = 0) -> Any:
    said = say("reconcile", "--json", "--day", DAY, "--config", books, *options)
    assert said.exit_code == code, said.output
    return json.loads(said.stdout)


def test_books_that_agree(say: Say, books: Path) -> None:
    found = report(say, books)
    four = f"{Decimal(4 * ONE) / 10**9}"
    assert found["models"] == [
        {
            "model": MODEL,
            "billed_usd": four,
            "booked_usd": four,
            "difference_usd": "0",
            "percent": "0.00",
        }
    ]
    assert found["drifts"] == found["proposals"] == found["suspects"] == found["other"] == []


TEXT = "gpt-5-mini"
TOOL: Any = {
    "type": "image_generation",
    "model": ALIAS,
    "quality": "low",
    "size": "1024x1024",
}


async def spend_on_both(folder: Path, sandbox: SandboxServer) -> Path:
    """Growth asks for responses that draw by the alias, and one that does not draw; design for
    pictures, and for a response that draws by the model's own name."""
    settings = {
        "upstreams": {"openai": {"admin_key": "sk-admin-1"}},
        "models": {TEXT: {"upstream": "openai"}},
        "responses": {"without_image_tool": "allow"},
    }
    async with run_gateway(folder, sandbox, settings, TestClock(NOON)) as gateway:
        async with gateway.sdk(KEY) as growth, gateway.sdk(OTHER_KEY) as design:
            for _ in range(3):
                await growth.responses.create(model=TEXT, input=PROMPT, tools=[TOOL])
            await growth.responses.create(model=TEXT, input=PROMPT)
            for _ in range(2):
                await design.images.generate(
                    model=MODEL,
                    prompt=PROMPT,
                    quality="low",
                    size="1024x1024",
                    extra_headers={"cache-control": "no-cache"},
                )
            tool: Any = {**TOOL, "model": MODEL}
            await design.responses.create(model=TEXT, input=PROMPT, tools=[tool])
        await gateway.told.until(7)
        return gateway.config


def test_responses_and_pictures_of_two_teams_agree_with_the_bill(
    say: Say, ask: Ask, tmp_path: Path, sandbox: SandboxServer
) -> None:
    """Each model's line items are what both teams were booked for it, to the nano-dollar."""
    books = asyncio.run(spend_on_both(tmp_path, sandbox))
    billed: dict[str, int] = {}
    for _, item, nanos in sandbox.journal.costs:
        model = item.partition(",")[0]
        billed[model] = billed.get(model, 0) + nanos
    assert billed.keys() == {MODEL, TEXT}
    found = report(say, books)
    assert {one["model"]: one["booked_usd"] for one in found["models"]} == {
        model: format_dollars(nanos) for model, nanos in billed.items()
    }
    assert found["total"]["difference_usd"] == "0"
    assert found["drifts"] == found["proposals"] == found["suspects"] == []

    usage = ask("usage", "--since", DAY, "--until", DAY, "--json", "--config", books)["rows"]
    rows = {(row["team"], row["model"]): row for row in usage}
    assert {who: (row["requests"], row["images"]) for who, row in rows.items()} == {
        ("growth", TEXT): (4, 0),
        ("growth", ALIAS): (0, 3),
        ("design", TEXT): (1, 0),
        ("design", MODEL): (2, 3),
    }
    assert rows["growth", ALIAS]["tokens"]["image_out"] > 0
    assert Decimal(rows["growth", ALIAS]["cost_usd"]) > Decimal(rows["growth", TEXT]["cost_usd"])

    # What the provider bills beyond that is each team's share of the model that it is billed for.
    drift(sandbox, 2)
    found = report(say, books, "--apply", code=3)
    shares = {(one["team"], one["model"]): one["amount_usd"] for one in found["proposals"]}
    assert shares.keys() == rows.keys()
    for who, share in shares.items():
        exact = Decimal(rows[who]["cost_usd"]) / 50
        assert abs(Decimal(share) - exact) <= Decimal("1e-9")
    assert report(say, books)["total"]["difference_usd"] == "0"
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


def test_half_a_percent_is_silent(say: Say, books: Path, sandbox: SandboxServer) -> None:
    drift(sandbox, 0.5)
    said = say("reconcile", "--day", DAY, "--config", books)
    assert said.exit_code == 0
    assert "+0.50 %" in said.stdout
    assert "DRIFT" not in said.stdout
    assert said.stderr == ""


@pytest.mark.parametrize("percent", [2, -2])
def test_two_percent_is_an_alert(
    say: Say, books: Path, sandbox: SandboxServer, percent: int
) -> None:
    drift(sandbox, percent)
    said = say("reconcile", "--day", DAY, "--config", books)
    assert said.exit_code == 3
    assert said.stdout.count("DRIFT") == 2
    lines = [json.loads(line) for line in said.stderr.splitlines() if line.startswith("{")]
    assert [(line["level"], line["model"]) for line in lines] == [
        ("warning", MODEL),
        ("warning", "total"),
    ]
    assert {line["day"] for line in lines} == {DAY}


def test_the_threshold_is_a_setting(say: Say, books: Path, sandbox: SandboxServer) -> None:
    document = yaml.safe_load(books.read_text())
    books.write_text(yaml.safe_dump(document | {"notify": {"drift_percent": 0.4}}))
    drift(sandbox, 0.5)
    assert report(say, books, code=3)["drifts"] == [MODEL, "total"]


def test_applying_closes_the_difference_and_the_books_still_add_up(
    say: Say, ask: Ask, books: Path, sandbox: SandboxServer
) -> None:
    drift(sandbox, 2)
    found = report(say, books, "--apply", code=3)
    assert {(each["team"], each["model"]) for each in found["proposals"]} == {
        ("growth", MODEL),
        ("growth", ALIAS),
        ("design", MODEL),
    }
    assert all(each["applied"] for each in found["proposals"])
    total = sum(Decimal(each["amount_usd"]) for each in found["proposals"])
    assert total == Decimal(found["total"]["difference_usd"]) == Decimal(4 * ONE) / 10**9 / 50
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]

    again = report(say, books, "--apply")
    assert again["total"]["difference_usd"] == "0"
    assert again["proposals"] == []
    [shown] = {each["id"] for each in found["proposals"] if each["team"] == "design"}
    journal = ask("ledger", "show", shown, "--json", "--config", books)["journal"]
    assert [line["detail"]["actor"] for line in journal] == ["reconcile"]


def test_books_that_changed_meanwhile_are_not_adjusted(
    say: Say, ask: Ask, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nightly job and a person have read the same books, and one has applied its part."""
    settings = load(books, {})
    rows = with_store(settings, lambda store: store.ledger.usage(DAY, DAY))
    bill = [BilledItem(MODEL, 5 * ONE)]
    target = Target("openai", MODEL)
    found = compare(("openai",), DAY, bill, rows, lambda model: (target,))
    assert found.seen == ((MODEL, 2 * ONE), (ALIAS, 2 * ONE))
    say(*shlex.split(found.proposals[0].command)[1:], "--config", books)
    with pytest.raises(SystemExit) as ended:
        with_store(settings, lambda store: apply_all(store, settings, found))
    assert ended.value.code == 1
    assert "the books changed meanwhile" in capsys.readouterr().err
    amounts = [one.amount for one in found.proposals]
    rows = with_store(settings, lambda store: store.ledger.usage(DAY, DAY))
    assert sum(row.cost for row in rows) == 4 * ONE + amounts[0]
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


def test_the_commands_it_prints_do_the_same_and_only_once(
    say: Say, ask: Ask, books: Path, sandbox: SandboxServer
) -> None:
    drift(sandbox, -3)
    said = say("reconcile", "--day", DAY, "--config", books)
    commands = [line.strip() for line in said.stdout.splitlines() if "ledger adjust --team" in line]
    assert len(commands) == 3
    for _ in range(2):
        for command in commands:
            done = say(*shlex.split(command)[1:], "--config", books)
            assert done.exit_code == 0, done.output
    assert report(say, books)["total"]["difference_usd"] == "0"
    assert ask("ledger", "verify", "--json", "--config", books)["ok"]


def test_calls_of_unknown_outcome_are_the_first_suspects(
    say: Say, ask: Ask, tmp_path: Path, sandbox: SandboxServer
) -> None:
    """One answer was lost and one came without usage: both are booked too high, and corrected."""
    made = asyncio.run(spend(tmp_path, sandbox, TestClock(NOON), lost=1, no_usage=1))
    config, rids = made
    found = report(say, config, code=3)
    assert {each["rid"] for each in found["suspects"]} == set(rids)
    assert Decimal(found["total"]["difference_usd"]) < 0
    applied = say("reconcile", "--day", DAY, "--apply", "--config", config)
    assert "3 of 3 adjustments were booked" in applied.stdout
    assert "compare this day once more" in applied.stdout
    for rid in rids:
        cost = str(Decimal(ONE) / 10**9)
        said = say(
            "ledger", "adjust", rid, "--cost", cost, "--reason", "on the bill", "--config", config
        )
        assert said.exit_code == 0, said.output
    clean = report(say, config, "--apply", code=3)
    assert clean["suspects"] == []
    assert Decimal(clean["total"]["difference_usd"]) == -Decimal(found["total"]["difference_usd"])
    assert report(say, config)["total"]["difference_usd"] == "0"
    assert ask("ledger", "verify", "--json", "--config", config)["ok"]


def test_a_bill_as_a_file(say: Say, books: Path, tmp_path: Path) -> None:
    bill = tmp_path / "costs.csv"
    four = Decimal(4 * ONE) / 10**9
    bill.write_text(
        "start_time_iso,amount_value,amount_currency,line_item\n"
        f'{DAY}T00:00:00+00:00,{four},usd,"{MODEL}, image output"\n'
        f'{DAY}T00:00:00+00:00,1.25,usd,"gpt-6-astra, input_tokens"\n'
    )
    out = tmp_path / "report.csv"
    said = say("reconcile", "--day", DAY, "--csv", bill, "--out", out, "--config", books)
    assert said.exit_code == 0, said.output
    assert "gpt-6-astra, input_tokens  $1.25" in said.stdout
    lines = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(line["model"], line["billed_usd"]) for line in lines] == [
        (MODEL, str(four)),
        ("total", str(four)),
        ("other: gpt-6-astra, input_tokens", "1.25"),
    ]
    as_json = tmp_path / "report.json"
    assert report(say, books, "--csv", bill, "--out", as_json) == json.loads(as_json.read_text())


def test_what_nobody_asked_for(say: Say, books: Path, tmp_path: Path) -> None:
    bill = tmp_path / "costs.csv"
    bill.write_text(f"date,model,cost\n{DAY},gpt-image-2,3\n")
    said = say("reconcile", "--day", DAY, "--csv", bill, "--config", books, "--apply")
    assert said.exit_code == 3
    assert "gpt-image-2: no team asked for it that day" in said.stdout


def test_two_upstreams_on_one_bill(say: Say, books: Path) -> None:
    """The alias goes by another key of the same organization: only together they are the bill."""
    document = yaml.safe_load(books.read_text())
    upstream = document["upstreams"]["openai"]
    document["upstreams"]["second"] = {**upstream, "admin_key": None}
    document["models"][ALIAS]["upstream"] = "second"
    books.write_text(yaml.safe_dump(document))
    assert report(say, books, code=3)["total"]["percent"] == "+50.00"
    both = report(say, books, "--upstream", "second", "--upstream", "openai")
    assert both["total"]["difference_usd"] == "0"
    assert both["upstream"] == "second+openai"


def test_which_bill_has_to_be_said(say: Say, books: Path) -> None:
    document = yaml.safe_load(books.read_text())
    document["upstreams"]["second"] = document["upstreams"]["openai"]
    books.write_text(yaml.safe_dump(document))
    said = say("reconcile", "--day", DAY, "--config", books)
    assert said.exit_code == 1
    assert "--upstream NAME (openai, second)" in said.stderr


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (("--upstream", "azure"), 1, "there is no upstream azure"),
        (("--csv", "missing.csv"), 1, "missing.csv: No such file"),
        (("--csv", "gateway.yaml"), 1, "gateway.yaml: it has no column for the day"),
        (("--day", "2099-01-01"), 1, "2099-01-01 has not begun yet in UTC"),
        (("--out", "report.xml"), 2, "--out ends in .csv or .json"),
        (("--out", "no/report.csv"), 1, "there is no folder no; make it (mkdir -p no)"),
    ],
)
def test_what_it_refuses(
    say: Say, books: Path, options: tuple[str, ...], code: int, why: str
) -> None:
    said = say("reconcile", "--day", DAY, "--config", books, *options)
    assert said.exit_code == code
    assert why in said.stderr


def test_a_day_that_is_not_over_is_compared_and_never_adjusted(say: Say, books: Path) -> None:
    """What its bill does not have yet would be spent twice."""
    today = SystemClock().now().date().isoformat()
    said = say("reconcile", "--day", today, "--apply", "--config", books)
    assert said.exit_code == 1
    assert said.stderr == f"{today} is not over in UTC: without --apply it can be compared\n"
    said = say("reconcile", "--day", today, "--config", books)
    assert said.exit_code == 0, said.output
    assert f"warning: {today} is not over in UTC" in said.stderr


@pytest.mark.parametrize(
    ("upstream", "code", "why"),
    [
        ({"admin_key": None}, 2, "upstreams.openai.admin_key is not set"),
        ({"admin_key": "sk-proj-x"}, 1, "upstreams.openai.admin_key may not read costs"),
    ],
)
def test_keys_that_cannot(
    say: Say, books: Path, upstream: dict[str, Any], code: int, why: str
) -> None:
    document = yaml.safe_load(books.read_text())
    document["upstreams"]["openai"] |= upstream
    books.write_text(yaml.safe_dump(document))
    said = say("reconcile", "--day", DAY, "--config", books)
    assert said.exit_code == code
    assert why in said.stderr
    assert "sk-proj-x" not in said.output


def test_a_sandbox_inside_the_gateway_has_no_bill(say: Say, config: Path) -> None:
    said = say("reconcile", "--config", config)
    assert said.exit_code == 1
    assert "point an upstream of kind openai at it" in said.stderr


def test_a_webhook_hears_of_it_once_signed(say: Say, books: Path, sandbox: SandboxServer) -> None:
    with inbox() as box:
        document = yaml.safe_load(books.read_text())
        document["notify"] = {"webhook": box.url, "secret": SECRET}
        books.write_text(yaml.safe_dump(document))
        drift(sandbox, 0.5)
        report(say, books)
        assert box.posts == []
        sandbox.rules.clear()
        drift(sandbox, 2)
        report(say, books, code=3)
        report(say, books, code=3)
    first, second = box.posts
    assert first.is_signed
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.json["type"] == "reconciliation.drift"
    assert first.json["data"]["drifts"] == [MODEL, "total"]
    assert first.json["data"]["day"] == DAY


@contextlib.contextmanager
def inbox() -> Iterator[Inbox]:
    """A receiver of webhooks in a thread, because a command has a loop of its own."""
    ready, done = threading.Event(), threading.Event()
    opened: list[Inbox] = []

    async def receive() -> None:
        async with open_inbox() as box:
            opened.append(box)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(receive()))
    thread.start()
    try:
        assert ready.wait(10)
        yield opened[0]
    finally:
        done.set()
        thread.join()
