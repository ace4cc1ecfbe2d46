"""What the Python scripts here share: features, told one by one as lines of JSON.

A feature is a function with its name. What it returns are the pictures that its user would now
have (bytes, base64, or the url that it was given), or what was raised. ``tell()`` runs them all;
a feature that fails is told with its error, and the others go on.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import traceback
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

MODEL = "gpt-image-2.5-flare"
UNKNOWN_KEY = "sk-of-nobody-0123456789abcdef"
POOR_KEY = os.environ["POOR_API_KEY"]  # of a team whose budget is spent
TEXT_MODEL = os.environ["TEXT_MODEL"]
INPUTS = Path(os.environ["INPUTS"])
OUTPUTS = Path(os.environ["OUTPUTS"])
FIRST, SECOND, MASK = (INPUTS / name for name in ("first.png", "second.png", "mask.png"))

Feature = Callable[[], Any]
_features: list[Feature] = []


def feature(function: Feature) -> Feature:
    _features.append(function)
    return function


def tell() -> None:
    """Every feature, in one loop: the clients of some frameworks live as long as it."""
    asyncio.run(_tell())


async def _tell() -> None:
    for function in _features:
        said: dict[str, Any] = {"feature": function.__name__, "ok": True}
        try:
            # In a thread, so that what is synchronous may run a loop of its own.
            made = await asyncio.to_thread(function)
            if inspect.isawaitable(made):
                made = await made
            if isinstance(made, dict):
                said["raised"] = made
            else:
                said["pictures"] = [
                    keep(f"{function.__name__}-{number}", picture)
                    for number, picture in enumerate(made)
                ]
        except Exception as error:  # noqa: BLE001 - whatever a client raises is what is told
            said |= {"ok": False, "detail": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        print(json.dumps(said), flush=True)


def keep(name: str, picture: bytes | str) -> str:
    """Writes a picture as its user would have it; a url is fetched as a browser would."""
    if isinstance(picture, str) and picture.startswith("http"):
        with urllib.request.urlopen(picture, timeout=30) as answer:
            picture = answer.read()
    elif isinstance(picture, str):
        picture = base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True)
    assert isinstance(picture, bytes)
    path = OUTPUTS / name
    path.write_bytes(picture)
    return path.name


def raised(call: Callable[[], object]) -> str:
    """The class of what is raised."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - as above
        return type(error).__name__
    return "nothing"


async def raised_by(awaited: Awaitable[object]) -> str:
    try:
        await awaited
    except Exception as error:  # noqa: BLE001 - as above
        return type(error).__name__
    return "nothing"
