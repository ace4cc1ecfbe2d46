"""What a running gateway takes over from a file that was changed, and what waits for a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.reload import needs_restart, swapped
from gateway.settings import Settings, load

BASE: dict[str, Any] = {
    "server": {"port": 0},
    "storage": {"database": "sqlite:///data/gateway.db"},
    "upstreams": {
        "openai": {"kind": "openai", "base_url": "https://h/v1", "api_keys": ["sk-1"]},
        "free": {"kind": "sandbox"},
    },
    "models": {"art": {"upstream": "openai"}, "*": {"upstream": "openai"}},
    "prices": {"rows": [{"model": "a", "note": "one"}]},
    "teams": {"growth": {"keys": ["growth-key-0123456789abcdef"]}},
}
Edit = Callable[[dict[str, Any]], object]


def settings(folder: Path, edit: Edit = lambda document: None, *, head: str = "") -> Settings:
    document = yaml.safe_load(yaml.safe_dump(BASE))
    edit(document)
    path = folder / "gateway.yaml"
    path.write_text(head + yaml.safe_dump(document, sort_keys=False))
    return load(path, {})


SWAPPED: dict[str, Edit] = {
    "nothing": lambda one: None,
    "keys of an upstream": lambda one: one["upstreams"]["openai"].update(
        api_keys=["sk-2", "sk-3"], admin_key="sk-admin-1"
    ),
    "peppers": lambda one: one["storage"].update(pepper="b" * 40, old_peppers=["a" * 40]),
    "another team": lambda one: one["teams"].update(
        art={"keys": ["art-key-0123456789abcdef"], "time_zone": "Asia/Tokyo"}
    ),
    "no team": lambda one: one.pop("teams"),
    "a budget": lambda one: one["teams"]["growth"].update(budget={"day": 5}),
    "a deadline": lambda one: one["upstreams"]["openai"].update(timeouts={"total_seconds": 5}),
    "another upstream": lambda one: one["upstreams"].update(more={"kind": "sandbox"}),
    "an upstream less": lambda one: one["upstreams"].pop("free"),
    "a model": lambda one: one["models"].update(art={"upstream": "openai", "model": "b"}),
    "no wildcard": lambda one: one["models"].pop("*"),
    "a price": lambda one: one["prices"]["rows"].append({"model": "b", "note": "two"}),
    "the cache": lambda one: one.update(cache={"enabled": False, "ttl": "1h", "scope": "key"}),
    "relay": lambda one: one.update(
        relay={
            "log_prompts": True,
            "attempts": 3,
            "on_unknown": "repeat",
            "max_wait_seconds": 90,
            "keep_alive_seconds": 20,
        }
    ),
    "the webhook": lambda one: one.update(notify={"webhook": "https://h/x", "budget_percent": 70}),
}


@pytest.mark.parametrize("how", SWAPPED)
def test_what_changes_at_once(tmp_path: Path, how: str) -> None:
    running = settings(tmp_path)
    found = settings(tmp_path, SWAPPED[how])
    assert needs_restart(running, found) == []
    after = swapped(running, found)
    assert after.upstreams == found.upstreams
    assert (after.storage, after.teams) == (found.storage, found.teams)
    assert after.declared_keys == found.declared_keys
    assert (after.catalogue, after.prices, after.cache, after.relay, after.notify) == (
        *(found.catalogue, found.prices, found.cache, found.relay, found.notify),
    )


KEPT: dict[str, tuple[Edit, list[str]]] = {
    "a port": (lambda one: one["server"].update(port=1234), ["server.port"]),
    "the database": (
        lambda one: one["storage"].update(database="sqlite:///other.db"),
        ["storage.database"],
    ),
    "the room of the cache": (
        lambda one: one.update(cache={"max_bytes": 1000}),
        ["cache.max_bytes"],
    ),
    "results": (
        lambda one: one.update(
            results={"ttl": "1h", "enabled": False, "webhook": "https://h/token-5f2c"}
        ),
        ["results.enabled", "results.ttl", "results.webhook"],
    ),
    "a lease": (lambda one: one.update(ledger={"lease_seconds": 700}), ["ledger.lease_seconds"]),
    "traces": (
        lambda one: one.update(tracing={"otlp": "http://c:1/t", "sample": 0.5}),
        ["tracing.otlp", "tracing.sample"],
    ),
    "the log": (lambda one: one.update(log={"level": "debug"}), ["log.level"]),
}


@pytest.mark.parametrize("how", KEPT)
def test_what_waits_for_a_restart(tmp_path: Path, how: str) -> None:
    edit, names = KEPT[how]
    running = settings(tmp_path)

    def both(document: dict[str, Any]) -> None:
        edit(document)
        document["upstreams"]["openai"]["api_keys"] = ["sk-2"]

    found = settings(tmp_path, both)
    assert needs_restart(running, found) == names
    after = swapped(running, found)
    assert after.upstreams["openai"].api_keys == found.upstreams["openai"].api_keys
    assert needs_restart(running, after) == [], "nothing else was taken over"


def test_a_row_that_moved_is_the_same(tmp_path: Path) -> None:
    running = settings(tmp_path)
    assert needs_restart(running, settings(tmp_path, head="# a comment\n\n")) == []
