"""Every check, at the same time, each with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path
from traceback import extract_tb

from gateway.doctor.database import postgres, sqlite
from gateway.doctor.disks import disks
from gateway.doctor.doors import doors, timeouts
from gateway.doctor.files import (
    configuration,
    keys_of_upstreams,
    pepper,
    readers,
    secrets_of,
    without_secrets,
)
from gateway.doctor.finding import Check, Finding, State, Topic
from gateway.doctor.machine import machine, versions
from gateway.doctor.prices import prices
from gateway.doctor.redis_servers import limits, pictures
from gateway.doctor.threads import AbandonableThreads
from gateway.doctor.upstreams import reachable, upstream
from gateway.ports import Clock
from gateway.settings import Settings

DEADLINE_SECONDS = 12.0
ORDER = (
    "versions", "config", "secrets", "database", "redis", "disk", "machine", "clock", "upstream",
    "models", "prices", "time-outs", "doors", "webhook", "tracing", "keys", "teams",
)  # fmt: skip
"""Of the checks, as a person reads them."""


async def examine(
    settings: Settings,
    clock: Clock,
    *,
    offline: bool = False,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> list[Finding]:
    """What every check says, in ``ORDER``, after ``deadline_seconds`` at the latest. No secret of
    the settings is in it."""
    asyncio.get_running_loop().set_default_executor(AbandonableThreads())
    checks = [*_here(settings, clock), *_elsewhere(settings, clock, offline)]
    found = await asyncio.gather(*(_ended(topic, one, deadline_seconds) for topic, one in checks))
    secrets = secrets_of(settings)
    findings = [without_secrets(finding, secrets) for several in found for finding in several]
    if not any(finding.check == "clock" for finding in findings):
        findings.append(Topic("clock").skipped("nobody was reached to compare it with"))
    # One that both the prices and the provider know of is said once.
    return sorted(dict.fromkeys(findings), key=lambda finding: ORDER.index(finding.check))


def _here(settings: Settings, clock: Clock) -> Iterable[tuple[Topic, Check]]:
    database = settings.storage.database
    yield Topic("versions"), versions()
    yield Topic("config"), configuration(settings)
    yield Topic("secrets"), readers(settings)
    yield Topic("secrets", "pepper"), pepper(settings)
    yield Topic("secrets", "upstreams"), keys_of_upstreams(settings)
    if isinstance(database, Path):
        yield Topic("database"), sqlite(settings, database, clock)
    yield Topic("disk"), disks(settings, clock)
    yield Topic("machine"), machine(settings)
    yield Topic("prices"), prices(settings, clock.now().date())
    yield Topic("time-outs"), timeouts(settings)
    yield Topic("doors"), doors(settings)


def _elsewhere(settings: Settings, clock: Clock, offline: bool) -> Iterable[tuple[Topic, Check]]:
    """What needs a network."""
    database = settings.storage.database
    if not isinstance(database, Path):
        topic = Topic("database")
        yield topic, _skipped(topic) if offline else postgres(settings, database.reveal(), clock)
    for setting, url, check in (
        ("storage.redis", settings.storage.redis, limits),
        ("cache.redis", settings.cache.redis, pictures),
    ):
        topic = Topic("redis", setting)
        yield topic, _skipped(topic) if offline and url is not None else check(settings, clock)
    for name, one in settings.upstreams.items():
        topic = Topic("upstream", name)
        yield topic, _skipped(topic) if offline else upstream(settings, one, clock)
    for setting, url in (
        ("notify.webhook", settings.notify.webhook),
        ("results.webhook", settings.results.webhook),
    ):
        if url is not None:
            topic = Topic("webhook", setting)
            yield topic, _skipped(topic) if offline else reachable(topic, url.reveal(), clock.now())
    if settings.tracing.otlp is not None:
        topic = Topic("tracing", "tracing.otlp")
        yield (
            topic,
            _skipped(topic) if offline else reachable(topic, settings.tracing.otlp, clock.now()),
        )


async def _skipped(topic: Topic) -> Check:
    yield topic.skipped("not asked (--offline)")


async def _ended(topic: Topic, check: Check, seconds: float) -> list[Finding]:
    """What a check says until it ends, fails or is late: all that it said before that counts."""
    found: list[Finding] = []
    try:
        async with asyncio.timeout(seconds), aclosing(check):
            async for finding in check:
                found.append(finding)
    except TimeoutError:
        found.append(
            topic.fail(
                f"was not looked at to its end within {seconds:g} s",
                "look for what hangs: a disk, a name server, a machine that does not answer",
            )
        )
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
        last = extract_tb(error.__traceback__)[-1]
        found.append(
            topic.fail(
                f"the check itself failed: {type(error).__name__} in "
                f"{Path(last.filename).name}, line {last.lineno}",
                "a mistake of this program: please report this line; all the others hold",
            )
        )
    return found


def ended_badly(findings: Iterable[Finding], *, strict: bool) -> bool:
    bad = (State.FAIL, State.WARN) if strict else (State.FAIL,)
    return any(finding.state in bad for finding in findings)
