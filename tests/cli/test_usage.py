"""`gateway usage`: what the books say, exactly."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.cli.usage import key_names
from gateway.domain.ledger import UsageRow
from gateway.domain.money import format_dollars
from gateway.sandbox.server import SandboxServer
from tests.cli.conftest import Say
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, TestClock, run_gateway

Ask = Callable[..., Any]
PROMPT = "A red circle on a white ground"
ONE = 8 * 5_000 + 196 * 30_000
"""Nano-dollars of one low picture of 1024x1024 with this prompt."""


async def _buy(folder: Path) -> Path:
    clock = TestClock()
    with SandboxServer(clock) as sandbox:
        teams = {"growth": {"keys": [{"key": KEY, "name": "ci"}]}}
        async with run_gateway(folder, sandbox, {"teams": teams}, clock) as gateway:

            async def draw(key: str, model: str = MODEL, n: int = 1, user: str = "") -> None:
                async with gateway.sdk(key) as sdk:
                    await sdk.images.generate(
                        model=model,
                        prompt=PROMPT,
                        quality="low",
                        size="1024x1024",
                        n=n,
                        extra_headers={"x-openwebui-user-id": user} if user else {},
                    )

            await draw(KEY)
            await draw(KEY)  # from the cache
            await draw(OTHER_KEY, ALIAS, n=2, user="ann")
            clock.advance(days=1)
            await draw(OTHER_KEY)
            return gateway.config


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a gateway that has ended: two teams, two days, one cached answer."""
    return asyncio.run(_buy(tmp_path_factory.mktemp("books")))


def rows(report: Any) -> list[tuple[str, str, str, str, int, int, str]]:
    return [
        (
            row["day"],
            row["team"],
            row["key_name"],
            row["model"],
            row["requests"],
            row["images"],
            row["cost_usd"],
        )
        for row in report["rows"]
    ]


def test_by_day_team_key_and_model(ask: Ask, books: Path) -> None:
    report = ask("usage", "--json", "--config", books)
    one, two = format_dollars(ONE), format_dollars(8 * 5_000 + 2 * 196 * 30_000)
    assert one == "0.00592"
    assert sorted(rows(report)) == [
        ("2026-11-22", "design", "", ALIAS, 1, 2, two),
        ("2026-11-22", "growth", "ci", MODEL, 2, 2, one),
        ("2026-11-23", "design", "", MODEL, 1, 1, one),
    ]
    [growth] = [row for row in report["rows"] if row["team"] == "growth"]
    assert len(growth.pop("key_id")) == 10
    assert growth == {
        "day": "2026-11-22",
        "team": "growth",
        "key_name": "ci",
        "model": MODEL,
        "requests": 2,
        "cached_requests": 1,
        "images": 2,
        "tokens": {"text_in": 8, "image_in": 0, "text_out": 0, "image_out": 196},
        "cost_usd": one,
        "avoided_usd": one,
        "unresolved": 0,
        "unresolved_usd": "0",
        "flagged": 0,
    }


def test_the_total_is_the_sum(ask: Ask, books: Path) -> None:
    report = ask("usage", "--json", "--config", books)
    total = report["total"]
    for name in ("requests", "cached_requests", "images", "unresolved", "flagged"):
        assert total[name] == sum(row[name] for row in report["rows"])
    for name in ("cost_usd", "avoided_usd", "unresolved_usd"):
        assert Decimal(total[name]) == sum(Decimal(row[name]) for row in report["rows"])
    assert total["cost_usd"] == "0.02364"
    assert total["tokens"]["image_out"] == 4 * 196


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--since", "2026-11-23"), {("2026-11-23", "design")}),
        (("--until", "2026-11-22"), {("2026-11-22", "design"), ("2026-11-22", "growth")}),
        (("--since", "2026-11-23", "--until", "2026-11-23"), {("2026-11-23", "design")}),
        (("--team", "growth"), {("2026-11-22", "growth")}),
        (("--team", "growth", "--since", "2026-11-23"), set()),
        (("--since", "2027-01-01"), set()),
    ],
)
def test_a_part_of_it(
    ask: Ask, books: Path, options: tuple[str, ...], found: set[tuple[str, str]]
) -> None:
    report = ask("usage", "--json", "--config", books, *options)
    assert {(row["day"], row["team"]) for row in report["rows"]} == found
    assert report["total"]["requests"] == sum(row["requests"] for row in report["rows"])


def test_as_a_table(say: Say, books: Path) -> None:
    head, *lines, total = say("usage", "--config", books).stdout.splitlines()
    assert head.split() == [
        "DAY", "TEAM", "KEY", "MODEL", "REQUESTS", "CACHED", "IMAGES", "COST", "AVOIDED",
        "UNRESOLVED",
    ]  # fmt: skip
    assert ["2026-11-22", "growth", "ci", MODEL, "2", "1", "2", "$0.00592", "$0.00592", "0"] in [
        line.split() for line in lines
    ]
    assert len(lines) == 3
    assert total.split() == ["total", "4", "1", "5", "$0.02364", "$0.00592", "0"]


def test_before_anything_was_bought(ask: Ask, say: Say, config: Path) -> None:
    report = ask("usage", "--json", "--config", config)
    assert report["rows"] == []
    assert report["total"]["cost_usd"] == "0"
    assert say("usage", "--config", config).stdout.splitlines()[1].split()[:2] == ["total", "0"]


def test_days_in_the_wrong_order(say: Say, books: Path) -> None:
    said = say("usage", "--since", "2026-11-23", "--until", "2026-11-22", "--config", books)
    assert said.exit_code == 2
    assert "--until is before --since" in said.stderr


def test_by_user(ask: Ask, books: Path) -> None:
    """The answer from the cache is not in it."""
    report = ask("usage", "--by", "user", "--json", "--config", books)
    one, two = format_dollars(ONE), format_dollars(8 * 5_000 + 2 * 196 * 30_000)
    ann = next(row["user"] for row in report["rows"] if row["user"] is not None)
    assert re.fullmatch("u_[0-9a-f]{20}", ann)

    def row(team: str, user: str | None, images: int, cost: str) -> dict[str, object]:
        figures = {"requests": 1, "images": images, "cost_usd": cost, "unresolved": 0}
        return {"team": team, "user": user} | figures

    assert report["rows"] == [
        row("design", None, 1, one),
        row("design", ann, 2, two),
        row("growth", None, 1, one),
    ]
    assert report["total"] == {
        "requests": 3, "images": 4, "cost_usd": "0.02364", "unresolved": 0,
    }  # fmt: skip
    options = ("--team", "design", "--until", "2026-11-22")
    part = ask("usage", "--by", "user", "--json", "--config", books, *options)
    assert part["rows"] == [row("design", ann, 2, two)]


@pytest.mark.parametrize("by", ["rows", "team", "user"])
def test_a_team_that_is_none(say: Say, books: Path, by: str) -> None:
    """A misspelt name is not a team that has bought nothing."""
    said = say("usage", "--by", by, "--team", "grwoth", "--config", books)
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == ("there is no team grwoth, and no usage of one; did you mean growth?\n")
    assert say("usage", "--by", by, "--team", "growth", "--config", books).exit_code == 0


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_day_that_is_none(say: Say, books: Path, option: str) -> None:
    said = say("usage", option, "yesterday", "--config", books)
    assert said.exit_code == 2
    assert f"'{option}': 'yesterday' is not a day like 2026-11-20" in said.stderr


def test_keys_of_one_name_are_told_apart() -> None:
    def row(team: str, key_id: str) -> UsageRow:
        return UsageRow("2026-11-22", team, key_id, MODEL)

    rows = [row("a", "1"), row("a", "2"), row("a", "1"), row("b", "3"), row("b", "4")]
    names = {"1": "ci", "2": "ci", "3": "ci", "4": ""}
    assert key_names(rows, names) == ["ci (1)", "ci (2)", "ci (1)", "ci", "4"]


def test_by_user_as_a_table(say: Say, books: Path) -> None:
    *lines, below = say("usage", "--by", "user", "--config", books).output.splitlines()
    assert lines[0].split() == ["TEAM", "USER", "REQUESTS", "IMAGES", "COST", "UNRESOLVED"]
    assert lines[1].split()[:4] == ["design", "(nobody", "named)", "1"]
    assert re.match(r"design +u_[0-9a-f]{20} +1 +2 +\$0\.0118", lines[2])
    assert lines[-1].split() == ["total", "3", "4", "$0.02364", "0"]
    # One less than by team, and why.
    assert below.startswith("Not counted by user: answers from the cache, ")


@pytest.mark.parametrize("by", ["day", "month", "team", "key", "model"])
def test_by_one_thing(ask: Ask, say: Say, books: Path, by: str) -> None:
    """The same sums, in fewer rows; each is named by what was asked for."""
    all_rows = ask("usage", "--json", "--config", books)
    report = ask("usage", "--by", by, "--json", "--config", books)
    assert report["total"] == all_rows["total"]
    names = {"month": ["day"], "key": ["team", "key_id"]}.get(by, [by])
    whole = [tuple(row[name] for name in names) for row in all_rows["rows"]]
    if by == "month":
        whole = [(day[:7],) for (day,) in whole]
    assert [tuple(row[name] for name in names) for row in report["rows"]] == sorted(set(whole))
    for row in report["rows"]:
        assert not any(row[name] for name in {"day", "team", "key_id", "model"} - set(names))
    head, *_, total = say("usage", "--by", by, "--config", books).output.splitlines()
    assert head.split()[: len(names)] == {"key": ["TEAM", "KEY"]}.get(by, [by.upper()])
    assert total.split()[:2] == ["total", str(report["total"]["requests"])]


def test_a_team_that_is_gone_from_the_file_may_have_bought_nothing_in_these_days(
    ask: Ask, books: Path
) -> None:
    config = yaml.safe_load(books.read_text())
    del config["teams"]["design"]
    without = books.with_name("without-design.yaml")
    without.write_text(yaml.safe_dump(config))
    options = ("--team", "design", "--since", "2027-01-01")
    assert ask("usage", "--json", "--config", without, *options)["rows"] == []
