"""The alerts: promtool says that they are rules, fires each of them and keeps each of them quiet;
the rest is held against the table of metrics and the runbooks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command, Group

from gateway.cli import main
from gateway.domain import errors
from gateway.domain.errors import Fault
from gateway.relay.drain import shutting_down
from tests.ops.prometheus import DASHBOARDS, RULES, RUNBOOKS, tool
from tests.ops.promql import grouped_by, mistakes, of_the_table
from tests.reference.errors import cases as every_error

CASES = Path(__file__).parent / "rules"
CASE_FILES = sorted(CASES.glob("*.yaml"))
RULES_FILE = RULES / "alerts.yaml"
SEVERITIES = {"page", "ticket", "info"}


GROUPS = yaml.safe_load(RULES_FILE.read_text())["groups"]
EVERY_RULE: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
RECORDS = [rule for rule in EVERY_RULE if "record" in rule]
ALERTS = {rule["alert"]: rule for rule in EVERY_RULE if "alert" in rule}


def known() -> dict[str, frozenset[str]]:
    """The series that rules can name: the gateway's, and those that are recorded."""
    found = of_the_table()
    for rule in RECORDS:
        own = frozenset(rule.get("labels", {}))
        before = frozenset[str]().union(
            *(labels for name, labels in found.items() if name in rule["expr"] and ":" in name)
        )
        grouped = grouped_by(rule["expr"]) - {"le"}
        found[rule["record"]] = own | (grouped or before)
    return found


Told = list[tuple[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def told() -> Told:
    """Each alert that a case is about, and what it expects to fire."""
    return list(cases())


def cases() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for file in CASE_FILES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for one in test["alert_rule_test"]:
                assert test["name"].startswith(f"{one['alertname']}: "), test["name"]
                yield one["alertname"], one["exp_alerts"]


def sections() -> dict[str, str]:
    """The runbooks, by the name of their alert."""
    parts = re.split(r"^## (.+)$", RUNBOOKS.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def promtool(*arguments: str | Path) -> None:
    ended = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool("check", "rules", *sorted(RULES.glob("*.yaml")))


@pytest.mark.parametrize("file", CASE_FILES, ids=lambda file: file.stem)
def test_each_alert_fires_when_it_should_and_only_then(file: Path) -> None:
    promtool("test", "rules", file)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not(told: Told) -> None:
    assert {name for name, fired in told if fired} == set(ALERTS)
    assert {name for name, fired in told if not fired} == set(ALERTS)


def test_every_metric_and_label_of_the_rules_exists() -> None:
    series = known()
    for rule in EVERY_RULE:
        assert mistakes(rule["expr"], series) == [], rule.get("alert", rule.get("record"))


def test_every_failure_is_somebodys() -> None:
    """What is answered with a 5xx is the gateway's failure or an upstream's, but for what asks for
    patience; a 4xx, which is not in the sum, is neither."""
    sums = {rule["record"]: rule["expr"] for rule in RECORDS}
    for whose, fault in (("own", Fault.GATEWAY), ("upstream", Fault.UPSTREAM)):
        matchers = re.findall(
            r"rejected_total{(.+?)}", sums[f"gateway:{whose}_failures:ratio_rate5m"]
        )
        assert matchers == [f'fault="{fault}"']
    found = {(case.kind, status): case for case in every_error() for status in case.statuses}
    assert {kind for kind, _ in found} > {errors.LedgerUnavailable, errors.UpstreamUnknown}
    for (kind, status), case in found.items():
        failure = kind.fault in (Fault.GATEWAY, Fault.UPSTREAM)
        assert failure == (status >= 500 and kind is not errors.StillRunning), case
        if failure:
            assert kind.fault == (
                Fault.GATEWAY if issubclass(kind, errors.GatewayFault) else Fault.UPSTREAM
            )
    assert shutting_down().fault is Fault.NOBODY
    assert errors.StillRunning("").fault is Fault.NOBODY


@pytest.mark.parametrize(
    ("status", "fault"),
    [(400, Fault.CLIENT), (429, Fault.NOBODY), (500, Fault.UPSTREAM), (502, Fault.UPSTREAM)],
)
def test_what_a_provider_refuses_is_its_failure_where_it_says_so(status: int, fault: Fault) -> None:
    assert errors.UpstreamRefused(status, b"{}", code="no").fault is fault


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_saw_and_where_to_look(name: str, told: Told) -> None:
    alert = ALERTS[name]
    said = alert["annotations"]
    assert set(said) == {"summary", "description", "runbook_url", "dashboard"}
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in SEVERITIES
    assert said["runbook_url"] == f"gateway/docs/runbooks.md#{name.lower()}"
    assert (DASHBOARDS / f"{said['dashboard'].removeprefix('gateway-')}.json").is_file()
    assert "$value" in said["description"] or "{{ $labels" in said["description"]
    # A group by pod or instance would be another alert behind each deployment.
    for fired in (fired for one, fired in told if one == name):
        for labels in (one["exp_labels"] for one in fired):
            assert labels.keys() >= {"job", "namespace", "severity"}
            assert not labels.keys() & {"pod", "container", "endpoint"}


def test_the_names_of_a_description_are_labels_of_its_alert(told: Told) -> None:
    fired = {name: set(labels[0]["exp_labels"]) for name, labels in told if labels}
    for name, alert in ALERTS.items():
        text = alert["annotations"]["summary"] + alert["annotations"]["description"]
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= fired[name], name


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    found = sections()
    assert list(found) == list(ALERTS)
    for name, text in found.items():
        for part in ("**Means.**", "**Users notice.**", "**Look at.**", "**Do.**", "**Ends.**"):
            assert part in text, f"{name}: {part}"


def test_what_the_runbooks_name_is_there() -> None:
    text, series = RUNBOOKS.read_text(), known()
    for expression in re.findall(r"^```promql\n(.*?)^```", text, re.M | re.S):
        assert mistakes(expression, series) == [], expression
    bases = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series} | set(series)
    for name in re.findall(r"\bgateway_[a-z0-9_]+\b", text):
        assert name in bases, name
    for words in re.findall(r"`gateway ([a-z]+[^`\n]*)`", text):
        exists(words)
    for command in re.findall(r"^\$ gateway (.+)$", text, re.M):
        exists(command)
    boards = {board.stem.capitalize() for board in DASHBOARDS.glob("*.json")}
    assert set(re.findall(r"dashboard (\w+)", text)) <= boards


def exists(words: str) -> None:
    """A command of the runbooks, its options too."""
    command: Command = main
    for word in words.split():
        if isinstance(command, Group):
            assert word in command.commands, words
            command = command.commands[word]
        elif word.startswith("--"):
            options = {name for one in command.params for name in one.opts}
            assert word in options, words


def test_files_that_the_runbooks_link_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", RUNBOOKS.read_text()):
        assert (RUNBOOKS.parent / target).exists(), target
