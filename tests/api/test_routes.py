"""Which door a path leads to."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.door import ASKED_PATH, DEPLOYMENT, ASGIApp, Receive, Scope, Send
from gateway.api.routes import Matches, Router, at, spelled, under

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.mark.parametrize(
    ("written", "path", "deployment"),
    [
        (GENERATIONS, GENERATIONS, None),
        (f"{GENERATIONS}/", GENERATIONS, None),
        (f"{GENERATIONS}///", GENERATIONS, None),
        ("/", "/", None),
        ("///", "/", None),
        ("/healthz/", "/healthz", None),
        ("/openai/v1/images/edits", EDITS, None),
        ("/openai/images/edits/", EDITS, None),
        ("/openai/v1/models/a/b", "/v1/models/a/b", None),
        ("/openai/files/file-1/content", "/v1/files/file-1/content", None),
        ("/openai/v1/openai/v1/models", "/v1/openai/v1/models", None),
        ("/openai/deployments/team-art/images/generations", GENERATIONS, "team-art"),
        ("/openai/deployments/team-art/images/edits/", EDITS, "team-art"),
        ("/openai/deployments/a model\n/images/edits", EDITS, "a model\n"),
        ("/openai/deployments/deployments/images/edits", EDITS, "deployments"),
        # None of these is a spelling of anything.
        *(
            (path, path, None)
            for path in (
                "/openai",
                "/openai/v1",
                "/openai/deployments",
                "/openai/deployments/m/models",
                "/openai/deployments/m/images/variations",
                "/openai/deployments/m/images/estimate",
                "/openai/deployments//images/edits",
                "/openai/deployments/a/b/images/edits",
                "/OpenAI/v1/models",
                "/openai.com/models",
                "/v1/openai/models",
                "//openai/v1/models",
            )
        ),
    ],
)
def test_a_path_has_one_spelling(written: str, path: str, deployment: str | None) -> None:
    assert spelled(written) == (path, deployment)


@pytest.mark.parametrize(
    ("matches", "path", "is_there"),
    [
        (at("/v1/files"), "/v1/files", True),
        (at("/v1/files"), "/v1/files/a", False),
        (under("/v1/files"), "/v1/files", True),
        (under("/v1/files"), "/v1/files/a/b", True),
        (under("/v1/files"), "/v1/filesystem", False),
        (under("/v1/files/"), "/v1/files", False),
        (under("/v1/files/"), "/v1/files/a", True),
    ],
)
def test_where_a_door_is(matches: Matches, path: str, is_there: bool) -> None:
    assert matches(path) is is_there


async def test_the_first_door_of_a_path_has_it() -> None:
    seen: list[tuple[str, Scope]] = []

    def door(name: str) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append((name, scope))

        return answer

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nobody reads or answers here")

    doors = [(at(EDITS), door("one")), (under("/v1/images"), door("two"))]
    router = Router(doors, door("rest"))
    written = "/openai/deployments/team-art/images/edits"
    for path in (EDITS, GENERATIONS, "/v1/models", written):
        await router({"type": "http", "path": path}, nothing, nothing)
    await router({"type": "lifespan"}, nothing, nothing)
    assert [name for name, _ in seen] == ["one", "two", "rest", "one", "rest"]
    assert seen[0][1] == {"type": "http", "path": EDITS}
    assert seen[3][1] == {
        "type": "http",
        "path": EDITS,
        ASKED_PATH: written,
        DEPLOYMENT: "team-art",
    }


async def test_a_strangers_long_path_is_not_remembered() -> None:
    async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
        return None

    async def receive() -> Any:
        return {}

    async def send(message: Any) -> None:
        return None

    router = Router([], nowhere)
    for path in ("/v1/models", "/" + "x" * 60_000):
        await router({"type": "http", "path": path}, receive, send)
    assert router._look_up.cache_info().currsize == 1
