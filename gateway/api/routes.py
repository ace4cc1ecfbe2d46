"""Which path is answered at which door: one table, read from top to bottom.

::

    what a client asks for                          what the table is asked for
    /v1/images/edits/                               /v1/images/edits
    /openai/v1/images/edits                         /v1/images/edits
    /openai/images/edits                            /v1/images/edits
    /openai/deployments/NAME/images/edits           /v1/images/edits, of the deployment NAME

The lower three are Azure's spellings (contract 6.2); their ``api-version`` says nothing here. A
door is one line in the list that ``Router`` gets; every path without one is FastAPI's, which
answers for the small routes and for all that is not served.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache, partial
from typing import TypeAlias

from gateway.api.door import ASKED_PATH, DEPLOYMENT, ASGIApp, Receive, Scope, Send
from gateway.api.relayed import RelayedRoutes
from gateway.domain.call import Inquiry, Operation

Matches: TypeAlias = Callable[[str], bool]
"""Whether a path is answered at a door. The path has no trailing slash, no query and OpenAI's
spelling."""


KEPT_PATHS, KEPT_CHARS = 256, 256
_DEPLOYED = re.compile(r"/openai/deployments/([^/]+)(/images/(?:generations|edits))")
_AZURE = re.compile(r"/openai(?:/v1)?+(?=/)(?!/deployments(?:/|$))")


def at(path: str) -> Matches:
    """This path alone."""
    return path.__eq__


def under(path: str) -> Matches:
    """This path and all below it; with a slash at its end, what is below it alone."""
    below = path if path.endswith("/") else f"{path}/"
    return lambda asked: asked == path or asked.startswith(below)


def relayed_doors(relayed: RelayedRoutes) -> list[tuple[Matches, ASGIApp]]:
    """A door for each operation and each question about one."""
    return [
        (at(f"/v1{endpoint.path}"), partial(relayed.handle, endpoint))
        for endpoint in (*Operation, *Inquiry)
    ]


def spelled(path: str) -> tuple[str, str | None]:
    """A path in OpenAI's spelling, and the deployment that it names, if it does."""
    path = path.rstrip("/") or "/"
    deployed = _DEPLOYED.fullmatch(path)
    if deployed is not None:
        return f"/v1{deployed[2]}", deployed[1]
    azure = _AZURE.match(path)
    return f"/v1{path[azure.end() :]}" if azure else path, None


class Router:
    """Sends each request to the first door that takes its path, or to ``rest``."""

    def __init__(self, doors: Iterable[tuple[Matches, ASGIApp]], rest: ASGIApp) -> None:
        self._doors = tuple(doors)
        self._rest = rest
        # Of the paths asked last: six patterns and comparisons a request less.
        self._look_up = lru_cache(maxsize=KEPT_PATHS)(self._find)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Hands the request on: there is nothing to wait for here."""
        if scope["type"] != "http":
            return self._rest(scope, receive, send)
        asked = scope["path"]
        # A stranger's path may have 64 KB, and none of ours has so many: it is not remembered.
        look_up = self._look_up if len(asked) <= KEPT_CHARS else self._find
        app, path, deployment = look_up(asked)
        if path != asked:
            scope = {**scope, "path": path, ASKED_PATH: asked, DEPLOYMENT: deployment}
        return app(scope, receive, send)

    def _find(self, asked: str) -> tuple[ASGIApp, str, str | None]:
        """The door of a path, and the path's spelling and deployment as ``spelled`` says them."""
        path, deployment = spelled(asked)
        app = next((app for matches, app in self._doors if matches(path)), self._rest)
        return app, path, deployment
