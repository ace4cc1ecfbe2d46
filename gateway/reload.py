"""A configuration that is read again while the gateway runs: what changes, and what cannot."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

from gateway.domain.route import WILDCARD, Model
from gateway.filewatch import FileWatch, look
from gateway.settings import Settings
from gateway.yamlfile import plain

PEPPERS = ("pepper", "old_peppers")
CACHE_POLICY = ("enabled", "ttl", "scope")

PAUSE_SECONDS, MAX_PAUSE_SECONDS = 5.0, 60.0
"""Before a reading that was postponed is tried again, the first time where the files are not
watched, and at the most."""


class Reloaded(StrEnum):
    """How a reading ended. REFUSED: the files are wrong, and only another change of them helps.
    POSTPONED: something else was in the way, a database that is away for example, and passes."""

    APPLIED = "applied"
    REFUSED = "refused"
    POSTPONED = "postponed"


def swapped(running: Settings, found: Settings) -> Settings:
    """The running settings with all of the found ones that may change: upstreams, models, compat,
    prices, the policy of the cache, files, checks, responses, relay, notify, peppers, users, and
    teams with their keys and limits."""
    return replace(
        running,
        upstreams=found.upstreams,
        catalogue=found.catalogue,
        compat=found.compat,
        prices=found.prices,
        cache=_with(running.cache, found.cache, CACHE_POLICY),
        files=found.files,
        responses=found.responses,
        moderations=found.moderations,
        provenance=found.provenance,
        relay=found.relay,
        notify=found.notify,
        storage=_with(running.storage, found.storage, PEPPERS),
        users=found.users,
        teams=found.teams,
        declared_keys=found.declared_keys,
        sources=found.sources,
    )


def needs_restart(running: Settings, found: Settings) -> list[str]:
    """The names of all other settings that differ, as the file writes them; never a value."""
    return sorted(_differences("", _sections(swapped(running, found)), _sections(found)))


def _sections(settings: Settings) -> dict[str, Any]:
    """The settings as the file has them."""
    sections = {field.name: getattr(settings, field.name) for field in fields(settings)}
    catalogue = sections.pop("catalogue")
    sections["models"] = {**catalogue.models, WILDCARD: catalogue.wildcard}
    # A row that was only moved to another line is the same.
    sections["prices"] = {
        "file": settings.prices.file,
        "rows": [plain(row) for row in settings.prices.rows],
    }
    del sections["warnings"], sections["sources"]
    return sections


def _with(running: Any, found: Any, names: tuple[str, ...]) -> Any:
    return replace(running, **{name: getattr(found, name) for name in names})


def _differences(path: str, running: Any, found: Any) -> list[str]:
    if isinstance(running, Mapping) and isinstance(found, Mapping):
        names = [*running, *(name for name in found if name not in running)]
        pairs = [(str(name), running.get(name), found.get(name)) for name in names]
    elif is_dataclass(running) and type(running) is type(found) and not isinstance(running, Model):
        pairs = [
            (field.name, getattr(running, field.name), getattr(found, field.name))
            for field in fields(running)
        ]
    else:
        return [] if running == found else [path]
    return [
        name
        for below, one, other in pairs
        for name in _differences(f"{path}.{below}" if path else below, one, other)
    ]


async def reload_when(
    told: asyncio.Event,
    reload: Callable[[], Awaitable[Reloaded]],
    watch: FileWatch,
    watch_seconds: float,
) -> None:
    """Reads the configuration again after each SIGHUP, and when one of its files has changed;
    what comes meanwhile is one. What something else than the files kept from being taken over is
    tried again by itself. ``watch_seconds`` 0: the files are not looked at."""
    loop = asyncio.get_running_loop()
    pause, due = 0.0, math.inf
    while True:
        until = min(loop.time() + (watch_seconds or math.inf), due)
        try:
            async with asyncio.timeout_at(until if until < math.inf else None):
                await told.wait()
        except TimeoutError:
            news = watch_seconds > 0 and watch.changed(await asyncio.to_thread(look, watch.paths))
            if not news and loop.time() < due:
                continue
        told.clear()
        if await reload() is Reloaded.POSTPONED:
            pause = min(MAX_PAUSE_SECONDS, 2 * pause or watch_seconds or PAUSE_SECONDS)
            due = loop.time() + pause
        else:
            pause, due = 0.0, math.inf
