"""`gateway doctor`: is everything right, here and around here?"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click

from gateway.cli.common import EXIT_FAILED, config_option, json_option, load_settings, print_json
from gateway.clock import SystemClock
from gateway.doctor.examine import ended_badly, examine
from gateway.doctor.finding import Finding, State, counted

COLOURS = {
    State.OK: "green",
    State.WARN: "yellow",
    State.FAIL: "red",
    State.SKIPPED: "bright_black",
}
WIDTH = max(map(len, State))


@click.command(short_help="Look at everything that the gateway needs.")
@click.option("--offline", is_flag=True, help="Leave out what needs a network.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@json_option
@config_option
def doctor(offline: bool, strict: bool, as_json: bool, config: Path | None) -> None:
    """Look at everything that the gateway needs; each line is ok, or says the fix.

    Configuration, secrets, database, Redis, disks, the machine, clocks, and for each upstream its
    name, certificate, keys and models, by calls that cost nothing. Nothing is changed (in Redis
    a key of its own is written and deleted), so that it may run beside a gateway; run it as the
    same user, with the same environment.

    Ends with 0 when nothing fails, with 1 when something does, with 2 when the configuration
    cannot be loaded.
    """
    settings = load_settings(config)
    # What is not reached is said below, and not in the words of a log.
    logging.getLogger().addHandler(logging.NullHandler())
    findings = asyncio.run(examine(settings, SystemClock(), offline=offline))
    if as_json:
        print_json(
            {
                "version": version("image-gateway"),
                "config": str(settings.file),
                "summary": _summary(findings),
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        for finding in findings:
            _say(finding)
        click.echo(_conclusion(findings))
    if ended_badly(findings, strict=strict):
        sys.exit(EXIT_FAILED)


def _say(finding: Finding) -> None:
    name = f"{finding.check} {finding.subject}".rstrip()
    word = click.style(finding.state.ljust(WIDTH), fg=COLOURS[finding.state])
    click.echo(f"{word}  {name}: {finding.says}")
    if finding.fix:
        click.echo(f"{' ' * WIDTH}  fix: {finding.fix}")


def _summary(findings: Sequence[Finding]) -> dict[str, int]:
    found = Counter(finding.state for finding in findings)
    return {state.value: found[state] for state in State}


def _conclusion(findings: Sequence[Finding]) -> str:
    found = _summary(findings)
    skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
    if not found["fail"] and not found["warn"]:
        return f"All is well: {found['ok']} ok{skipped}."
    bad = "nothing fails" if not found["fail"] else f"{found['fail']} to mend"
    return f"{bad}, {counted(found['warn'], 'warning')}, {found['ok']} ok{skipped}.".capitalize()
