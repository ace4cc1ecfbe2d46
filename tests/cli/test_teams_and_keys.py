"""`gateway team` and `gateway key`: made, listed and revoked while a gateway serves."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Say
from tests.cli.test_demo import status
from tests.processes import GatewayProcess, wait_until

Ask = Callable[..., Any]
UNLIMITED = {
    "requests_per_minute": None,
    "images_per_minute": None,
    "concurrent_requests": None,
    "budget_day_usd": None,
    "budget_week_usd": None,
    "budget_month_usd": None,
    "budget_total_usd": None,
    "soft_budget_day_usd": None,
    "soft_budget_week_usd": None,
    "soft_budget_month_usd": None,
    "soft_budget_total_usd": None,
    "max_cost_per_request_usd": None,
}


def test_a_running_gateway_hears_of_it(say: Say, ask: Ask, config: Path) -> None:
    with GatewayProcess(config) as serving:
        serving.wait_ready()
        assert say("team", "create", "design", "--config", config).exit_code == 0
        made = ask("key", "create", "--team", "design", "--json", "--config", config)
        assert status(serving.base_url, made["secret"]) == 200

        revoked = say("key", "revoke", made["id"], "--config", config)
        assert revoked.stdout == f"key {made['id']} of team design is revoked\n"
        wait_until(lambda: status(serving.base_url, made["secret"]) == 401, "revoked", 5.5)

        second = ask("key", "create", "--team", "design", "--json", "--config", config)
        assert status(serving.base_url, second["secret"]) == 200
        assert say("team", "revoke", "design", "--config", config).exit_code == 0
        wait_until(lambda: status(serving.base_url, second["secret"]) == 401, "disabled", 5.5)
        assert status(serving.base_url, "growth-key-0123456789abcdef") == 200


def test_a_team_with_everything(say: Say, ask: Ask, config: Path) -> None:
    said = say(
        "team", "create", "design", "--models", "gpt-image-2, gpt-image-2.5-flare", "--no-cache",
        "--requests-per-minute", "60", "--images-per-minute", "20", "--concurrent-requests", "3",
        "--budget-day", "5.00", "--budget-month", "50.000000001", "--max-cost-per-request", "0.25",
        "--budget-week", "20", "--budget-total", "900", "--soft-budget-day", "4",
        "--soft-budget-week", "15", "--soft-budget-month", "40", "--soft-budget-total", "800",
        "--time-zone", "Europe/Berlin", "--config", config,
    )  # fmt: skip
    assert said.exit_code == 0
    assert said.stdout.splitlines() == [
        f"team design created in {config.parent / 'data' / 'gateway.db'}",
        f"now: gateway key create --team design --config {config}",
    ]
    growth, design = sorted(
        ask("team", "list", "--json", "--config", config), key=lambda team: not team["declared"]
    )
    assert design == {
        "id": "design",
        "declared": False,
        "disabled": False,
        "models": ["gpt-image-2", "gpt-image-2.5-flare"],
        "cache": False,
        "time_zone": "Europe/Berlin",
        "limits": {
            "requests_per_minute": 60,
            "images_per_minute": 20,
            "concurrent_requests": 3,
            "budget_day_usd": "5",
            "budget_week_usd": "20",
            "budget_month_usd": "50.000000001",
            "budget_total_usd": "900",
            "soft_budget_day_usd": "4",
            "soft_budget_week_usd": "15",
            "soft_budget_month_usd": "40",
            "soft_budget_total_usd": "800",
            "max_cost_per_request_usd": "0.25",
        },
        "per_user": None,
    }
    assert growth == {
        "id": "growth",
        "declared": True,
        "disabled": False,
        "models": ["*"],
        "cache": True,
        "time_zone": "UTC",
        "limits": UNLIMITED,
        "per_user": None,
    }


def test_teams_as_a_table(say: Say, config: Path) -> None:
    say(
        "team", "create", "design", "--budget-day", "5", "--soft-budget-total", "900",
        "--time-zone", "Asia/Tokyo", "--config", config,
    )  # fmt: skip
    say("team", "revoke", "design", "--config", config)
    said = say("team", "list", "--config", config)
    assert said.stdout.splitlines() == [
        "TEAM    FROM       STATE     MODELS  ZONE        LIMITS",
        "design  directory  disabled  *       Asia/Tokyo  $5 a day, $900 in all (soft)",
        "growth  file       active    *       UTC         none",
    ]


def test_a_disabled_team_gets_no_key(say: Say, ask: Ask, config: Path) -> None:
    """It would be shown as made, and refused by every gateway."""
    say("team", "create", "design", "--config", config)
    say("team", "revoke", "design", "--config", config)
    said = say("key", "create", "--team", "design", "--config", config)
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == "team design is disabled: no key of it works\n"
    assert ask("key", "list", "--team", "design", "--json", "--config", config) == []


def test_a_team_is_changed_in_what_is_named_alone(say: Say, ask: Ask, config: Path) -> None:
    def change(*options: str) -> dict[str, Any]:
        said = say("team", "update", "design", *options, "--config", config)
        assert (said.exit_code, said.stderr) == (0, "")
        assert said.stdout.startswith("team design is changed; its limits: ")
        teams = ask("team", "list", "--json", "--config", config)
        [team] = [one for one in teams if one["id"] == "design"]
        flat = team.pop("limits")
        team |= flat
        return dict(team)

    say(
        "team", "create", "design", "--models", "gpt-image-2", "--budget-week", "5",
        "--requests-per-minute", "60", "--config", config,
    )  # fmt: skip
    made = change("--time-zone", "Pacific/Kiritimati")
    assert (made["time_zone"], made["models"]) == ("Pacific/Kiritimati", ["gpt-image-2"])
    assert (made["budget_week_usd"], made["requests_per_minute"]) == ("5", 60)
    steps: dict[tuple[str, ...], dict[str, object]] = {
        ("--budget-week", "7.50", "--soft-budget-month", "20"): {
            "budget_week_usd": "7.5",
            "soft_budget_month_usd": "20",
        },
        ("--budget-week", "none", "--requests-per-minute", "none"): {
            "budget_week_usd": None,
            "requests_per_minute": None,
        },
        ("--budget-day", "0"): {"budget_day_usd": "0"},
        ("--no-cache",): {"cache": False},
        ("--cache", "--models", "none"): {"cache": True, "models": ["*"]},
    }
    before = made
    for options, changes in steps.items():
        after = change(*options)
        assert after == before | changes
        before = after


def test_what_a_change_says(say: Say, config: Path) -> None:
    config.write_text(
        config.read_text().replace("models:\n", 'models:\n  "*": {upstream: sandbox}\n')
    )
    assert say("team", "create", "design", "--config", config).stderr == ""
    said = say(
        "team", "update", "design", "--models", "gpt-imag-2,gpt-image-2", "--time-zone",
        "Asia/Tokyo", "--budget-day", "5", "--soft-budget-day", "6", "--config", config,
    )  # fmt: skip
    assert said.exit_code == 0
    assert said.stdout.splitlines() == [
        "team design is changed; its limits: $5 a day, $6 a day (soft)",
        "models: gpt-imag-2, gpt-image-2; time zone: Asia/Tokyo",
    ]
    assert said.stderr.splitlines() == [
        "warning: the soft budget of day is over the hard one, so that it is never reached",
        "warning: no price is known for gpt-imag-2; did you mean gpt-image-2?",
    ]
    said = say(
        "team", "create", "sales", "--models", "nova", "--budget-week", "5", "--soft-budget-week",
        "6", "--config", config,
    )  # fmt: skip
    assert said.stderr.count("warning: ") == 2


@pytest.mark.parametrize("none", ["none", "NONE", "None"])
def test_none_in_any_case(say: Say, config: Path, none: str) -> None:
    """The help shows it in capitals."""
    assert say("team", "create", "design", "--budget-day", "5", "--config", config).exit_code == 0
    said = say(
        "team", "update", "design", "--budget-day", none, "--requests-per-minute", none,
        "--models", none, "--config", config,
    )  # fmt: skip
    assert said.exit_code == 0, said.stderr
    assert said.stdout.splitlines() == [
        "team design is changed; its limits: none",
        "models: *; time zone: UTC",
    ]


@pytest.mark.parametrize(
    "rate", ["requests-per-minute", "images-per-minute", "concurrent-requests"]
)
@pytest.mark.parametrize("value", ["0", "nothing"])
def test_a_rate_is_at_least_one_as_in_the_file(
    say: Say, config: Path, rate: str, value: str
) -> None:
    assert say("team", "create", "sales", f"--{rate}", value, "--config", config).exit_code == 2
    said = say("team", "update", "sales", f"--{rate}", value, "--config", config)
    assert said.exit_code == 2
    assert "; or say none" in said.stderr


def test_keys_as_a_table(say: Say, ask: Ask, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    made = ask(
        "key", "create", "--team", "design", "--name", "ci", "--expires", "2199-01-01",
        "--json", "--config", config,
    )  # fmt: skip
    lines = say("key", "list", "--config", config).stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["KEY", "TEAM", "NAME", "FROM", "STATE", "EXPIRES"],
        [made["id"], "design", "ci", "directory", "active", "2199-01-01", "00:00"],
    ]
    assert lines[2].split()[1:] == ["growth", "ci", "file", "active", "never"]
    only = say("key", "list", "--team", "growth", "--config", config).stdout.splitlines()
    assert len(only) == 2


def test_a_secret_is_shown_once_and_kept_nowhere(say: Say, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    said = say("key", "create", "--team", "design", "--config", config)
    [secret] = said.stdout.splitlines()  # nothing else, so that a script can take it
    assert re.fullmatch(r"igw_live_[0-9a-z]{10}_\w{32}_\w{6}", secret)
    assert "shown this once" in said.stderr
    listed = say("key", "list", "--config", config).stdout
    listed += say("key", "list", "--json", "--config", config).stdout
    assert secret not in listed
    assert "growth-key" not in listed
    for path in (config.parent / "data").iterdir():
        assert secret.encode() not in path.read_bytes()


def test_a_key_as_json(ask: Ask, say: Say, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    made = ask(
        "key", "create", "--team", "design", "--name", "ci", "--models", "gpt-image-2",
        "--expires", "2199-01-01T12:30:00Z", "--budget-day", "1", "--json", "--config", config,
    )  # fmt: skip
    assert made.pop("secret").startswith("igw_live_" + made["id"])
    assert datetime.fromisoformat(made.pop("created")).tzinfo is UTC
    [listed] = ask("key", "list", "--team", "design", "--json", "--config", config)
    listed.pop("created")
    assert listed.pop("pepper") == "current"
    assert made == listed
    assert made == {
        "id": made["id"],
        "team": "design",
        "name": "ci",
        "declared": False,
        "state": "active",
        "models": ["gpt-image-2"],
        "expires": "2199-01-01T12:30:00+00:00",
        "limits": {**UNLIMITED, "budget_day_usd": "1"},
    }


def test_what_was_meant_by_a_key_that_is_not_there(ask: Ask, say: Say, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    made = ask("key", "create", "--team", "design", "--name", "web", "--json", "--config", config)
    slip = made["id"][:-1] + "-"
    for asked in ("web", slip):
        said = say("key", "revoke", asked, "--config", config)
        assert said.exit_code == 1
        assert said.stderr == (
            f"there is no key {asked}; did you mean {made['id']}? gateway key list shows all\n"
        )
    said = say("key", "revoke", made["secret"], "--config", config)
    assert said.exit_code == 1
    assert said.stderr == (
        "that is a key's secret, and its id is needed; "
        f"did you mean {made['id']}? gateway key list shows all\n"
    )
    [listed] = ask("key", "list", "--team", "design", "--json", "--config", config)
    assert listed["state"] == "active"


def test_revoking_twice_is_harmless(ask: Ask, say: Say, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    made = ask("key", "create", "--team", "design", "--json", "--config", config)
    for _ in range(2):
        assert say("key", "revoke", made["id"], "--config", config).exit_code == 0
    [listed] = ask("key", "list", "--team", "design", "--json", "--config", config)
    assert listed["state"] == "revoked"


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("team create growth", 1, "team growth is declared in {config}; change it there"),
        ("team revoke growth", 1, "team growth is declared in {config}; disable it there"),
        ("key create --team growth", 1, "team growth is declared in {config}; add its key there"),
        ("team create design", 1, "there is a team design already"),
        ("team create Design!", 1, "'Design!' is not a team's name: use a-z, 0-9, - and _"),
        ("team revoke nobody", 1, "there is no team nobody; gateway team list shows all"),
        ("team update desing --cache", 1, "there is no team desing; did you mean design?"),
        ("team update growth --cache", 1, "team growth is declared in {config}; change it there"),
        (
            "team update design",
            1,
            "nothing to change is named; see gateway team update --help",
        ),
        (
            "team update design --budget-day never",
            2,
            "'never' is not an amount of dollars, like 1.50",
        ),
        ("team update design --images-per-minute -1", 2, "-1 is not in the range"),
        (
            "team create other --time-zone Europe/Berlinn",
            2,
            "'Europe/Berlinn' is not a time zone's name, like Europe/Berlin; did you mean "
            "Europe/Berlin?",
        ),
        ("key create --team desing", 1, "there is no team desing; did you mean design?"),
        ("key revoke nothing", 1, "there is no key nothing; gateway key list shows all"),
        ("key list --team desing", 1, "there is no team desing; did you mean design?"),
        (
            "team create other --models gpt-image-2,gpt-image-2.5-flair",
            1,
            "there is no model 'gpt-image-2.5-flair' in {config}; "
            "did you mean gpt-image-2.5-flare?",
        ),
        ("key create --team design --models ,", 1, "there is no model '' in {config}"),
        (
            "key create --team design --expires 2020-01-01",
            1,
            "--expires 2020-01-01 00:00 UTC is over already",
        ),
        ("team create other --budget-day -1", 2, "'-1' is not an amount of dollars"),
        ("team create other --budget-day 0.0000000001", 2, "finer than a nano-dollar"),
        ("team create other --budget-day much", 2, "'much' is not an amount of dollars"),
        ("team create other --requests-per-minute -1", 2, "-1 is not in the range"),
        ("key create", 2, "Missing option '--team'"),
        ("key create --team design --expires soon", 2, "'soon' is not a day like 2026-11-20"),
    ],
)
def test_refusals(say: Say, config: Path, command: str, code: int, reason: str) -> None:
    say("team", "create", "design", "--config", config)
    said = say(*command.split(), "--config", config)
    assert said.exit_code == code
    assert said.stdout == ""
    assert reason.format(config=config) in said.stderr
    assert "Traceback" not in said.stderr
    if code == 1:
        assert said.stderr == reason.format(config=config) + "\n"


def test_a_key_of_the_file_is_revoked_in_the_file(ask: Ask, say: Say, config: Path) -> None:
    [declared] = ask("key", "list", "--json", "--config", config)
    said = say("key", "revoke", declared["id"], "--config", config)
    assert said.exit_code == 1
    assert said.stderr == f"key {declared['id']} is declared in {config}; remove it there\n"


def test_a_broken_configuration_is_named_first(say: Say, config: Path) -> None:
    config.write_text("server: {port: eighty}\n")
    for command in ("team list", "key list", "usage", "team create a", "key create --team a"):
        said = say(*command.split(), "--config", config)
        assert said.exit_code == 2
        assert f"{config}:1:" in said.stderr


def test_a_pepper_that_is_lost(say: Say, config: Path) -> None:
    """A new one would make every key unknown, without a word."""
    named = ("--config", str(config))
    assert say("team", "create", "design", *named).exit_code == 0
    assert say("key", "create", "--team", "design", *named).exit_code == 0
    pepper = config.parent / "data" / "gateway.pepper"
    kept = pepper.read_bytes()
    pepper.unlink()
    for command in (("key", "create", "--team", "design"), ("serve",)):
        said = say(*command, *named)
        assert said.exit_code == 1
        assert said.stderr.startswith(f"{pepper} is missing, and 1 keys in ")
    pepper.write_bytes(kept)
    assert say("key", "list", *named).exit_code == 0


def test_a_pepper_that_is_lost_where_the_file_declares_all_keys(say: Say, config: Path) -> None:
    """As behind a restore: the ids of declared keys hang on it."""
    named = ("--config", str(config))
    before = say("key", "list", "--json", *named)
    assert before.exit_code == 0
    pepper = config.parent / "data" / "gateway.pepper"
    kept = pepper.read_bytes()
    pepper.unlink()
    said = say("key", "list", *named)
    assert said.exit_code == 1
    assert said.stderr.startswith(f"{pepper} is missing, and 1 keys in ")
    assert not pepper.exists()
    pepper.write_bytes(kept)
    assert say("key", "list", "--json", *named).stdout == before.stdout


def test_a_file_of_the_first_release_without_keys_gets_a_pepper(say: Say, config: Path) -> None:
    """It has no table of declared keys before it is brought up to date."""
    folder = config.parent / "data"
    folder.mkdir()
    first = resources.files("gateway.stores").joinpath("migrations", "sqlite", "0001_initial.sql")
    with closing(sqlite3.connect(folder / "gateway.db")) as db:
        db.executescript(first.read_text(encoding="utf-8") + "PRAGMA user_version = 1;")
    assert say("key", "list", "--config", config).exit_code == 0
    assert (folder / "gateway.pepper").exists()


def test_a_pepper_that_is_none(say: Say, config: Path) -> None:
    data = config.parent / "data"
    data.mkdir()
    (data / "gateway.pepper").write_text("short")
    for command in ("key list", "usage", "key create --team a"):
        said = say(*command.split(), "--config", config)
        assert said.exit_code == 1
        assert said.stderr.startswith(f"{data / 'gateway.pepper'} is not a pepper of this gateway")


def test_what_each_user_of_a_team_may(say: Say, ask: Ask, config: Path) -> None:
    def team() -> dict[str, Any]:
        teams = ask("team", "list", "--json", "--config", config)
        return dict(next(one for one in teams if one["id"] == "design"))

    say(
        "team", "create", "design", "--requests-per-minute", "60", "--user-images-per-minute", "5",
        "--user-budget-day", "0.50", "--user-required", "--config", config,
    )  # fmt: skip
    before = team()
    limits = {**UNLIMITED, "images_per_minute": 5, "budget_day_usd": "0.5"}
    assert before["per_user"] == {"limits": limits, "required": True}
    assert before["limits"] == {**UNLIMITED, "requests_per_minute": 60}
    said = say("team", "list", "--config", config).stdout.splitlines()[1]
    assert said.endswith("60 requests/min; each user 5 images/min, $0.5 a day, has to be named")

    changed = say(
        "team", "update", "design", "--user-concurrent-requests", "2", "--user-budget-day", "none",
        "--config", config,
    )  # fmt: skip
    assert changed.stdout.splitlines()[1] == (
        "of each user: 5 images/min, 2 at once, has to be named"
    )
    limits = {**UNLIMITED, "images_per_minute": 5, "concurrent_requests": 2}
    assert team() == {**before, "per_user": {"limits": limits, "required": True}}
    # Nothing that is said of the team touches its users, nor the other way round.
    say("team", "update", "design", "--requests-per-minute", "9", "--config", config)
    assert team()["per_user"] == {"limits": limits, "required": True}
    say(
        "team", "update", "design", "--user-optional", "--user-images-per-minute", "none",
        "--user-concurrent-requests", "none", "--config", config,
    )  # fmt: skip
    assert team()["per_user"] is None
    assert team()["limits"] == {**UNLIMITED, "requests_per_minute": 9}


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_key_whose_secret_nobody_has_seen_does_not_work(
    say: Say, ask: Ask, config: Path, more: tuple[str, ...]
) -> None:
    say("team", "create", "design", "--config", config)
    with Path("/dev/full").open("w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "gateway", "key", "create", "--team", "design",
             "--config", config, *more],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert said.returncode == 1
    [made] = ask("key", "list", "--team", "design", "--json", "--config", config)
    assert made["state"] == "revoked"
    assert f"key {made['id']} is revoked again: its secret could not be shown\n" in said.stderr
    assert "cannot be written: No space left on device" in said.stderr


def test_no_key_is_made_where_nobody_would_see_its_secret(say: Say, ask: Ask, config: Path) -> None:
    say("team", "create", "design", "--config", config)
    said = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "gateway", "key", "create",
         "--team", "design", "--config", config],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 1
    assert said.stderr == "standard output is closed: nobody would see the key's secret\n"
    assert ask("key", "list", "--team", "design", "--json", "--config", config) == []
