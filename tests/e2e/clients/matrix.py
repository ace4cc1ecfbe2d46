"""The clients that are tried: which package, which runtime, which script, and what each can do.

A row is a program that a team might run. What it is pinned to stands in ``packages/NAME``
(``requirements.in`` or ``package.json``, with all that they bring in the lock file beside it);
what it does is one script of ``scripts/``, which somebody who starts with that client can copy.
This module needs nothing but the standard library: the installer runs before anything is there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
PACKAGES: Final = HERE / "packages"
SCRIPTS: Final = HERE / "scripts"
TOOLS: Final = HERE.parents[2] / ".tools" / "clients"

FEATURES: Final = (
    "generate", "edit", "stream", "url", "files", "responses", "errors", "retry",
)  # fmt: skip
"""The columns of the table. A script tells of each that its client has, and of no other."""

ERRORS: Final = ("AuthenticationError", "RateLimitError", "BadRequestError")
"""What OpenAI's SDKs raise for an unknown key, for a spent budget and for a bad parameter."""


@dataclass(frozen=True, slots=True)
class Client:
    """``package`` is a folder of ``packages/``; None needs no installing. ``node`` is the one that
    holds the runtime of a script in JavaScript. ``says`` are the features that the script must
    tell of. ``errors``: the classes of an unknown key, a spent budget, a bad parameter, each asked
    for once; but for the budget ``attempts`` times. ``split``: features whose pictures it asks for
    one by one, alike and at once. ``half``: of the representative half, which CI runs."""

    name: str
    script: str
    says: tuple[str, ...]
    package: str | None = None
    node: str | None = None
    errors: tuple[str, str, str] = ERRORS
    attempts: int = 1
    split: tuple[str, ...] = ()
    half: bool = False
    note: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The packages to install."""
        return tuple(name for name in (self.package, self.node) if name is not None)

    @property
    def version(self) -> str:
        """What it is pinned to, ``name version`` each."""
        if self.package is None:
            return ""
        return ", ".join(f"{name} {version}" for name, version in pins(self.package))


def pins(package: str) -> list[tuple[str, str]]:
    """What ``packages/NAME`` asks for itself: (name, version)."""
    folder = PACKAGES / package
    if (folder / "package.json").is_file():
        wanted = json.loads((folder / "package.json").read_text())["dependencies"]
        return [(str(name), str(version)) for name, version in wanted.items()]
    lines = (folder / "requirements.in").read_text().split()
    found = [re.fullmatch(r"([\w\-]+)(?:\[[\w,]+\])?==([\w.]+)", line) for line in lines]
    return [(one.group(1), one.group(2)) for one in found if one is not None]


SDK: Final = ("generate", "edit", "stream", "url", "files", "responses", "errors", "retry")

CLIENTS: Final = (
    Client(
        "openai-python 1", "openai_sync.py", SDK, "openai-python-1", half=True,
        note="Synchronous. An edit's pictures are given as raw bytes.",
    ),
    Client(
        "openai-python 2", "openai_sync.py", SDK, "openai-python-2",
        note="Synchronous. An edit's pictures are given as raw bytes.",
    ),
    Client(
        "openai-python 3", "openai_sync.py", SDK, "openai-python-3", half=True,
        note="Synchronous. An edit's pictures are given as raw bytes.",
    ),
    Client(
        "openai-python 3, async", "openai_async.py", SDK, "openai-python-3", half=True,
        note="A file's id in a JSON edit; a second turn by `previous_response_id`.",
    ),
    Client(
        "openai-python 3, aiohttp", "openai_aiohttp.py", SDK, "openai-python-3",
        note="`openai[aiohttp]`, `DefaultAioHttpClient`.",
    ),
    Client(
        "AzureOpenAI, Python", "azure_openai.py", ("generate", "edit", "stream", "errors", "retry"),
        "openai-python-3", half=True,
        note="The deployment in the path, `api-version`, the `api-key` header.",
    ),
    Client(
        "openai-node 6", "openai_node.mjs", SDK, "openai-node-6", "node-20", half=True,
        note="A file's id in a JSON edit; a second turn by `previous_response_id`.",
    ),
    Client(
        "openai-node 7", "openai_node.mjs", SDK, "openai-node-7", "node-22",
        note="A file's id in a JSON edit; a second turn by `previous_response_id`.",
    ),
    Client(
        "AzureOpenAI, Node", "azure_openai.mjs", ("generate", "edit", "stream", "errors", "retry"),
        "openai-node-6", "node-20",
        note="As in Python, but the path of an edit names no deployment: its `model` says which. A "
        "client made with `deployment` has that in every path, and there it wins over `model`.",
    ),
    Client(
        "Vercel AI SDK", "ai_sdk.mjs", ("generate", "edit", "responses", "errors", "retry"),
        "ai-sdk", "node-22", ("AI_APICallError", "AI_RetryError", "AI_APICallError"),
        attempts=3, split=("generate",), half=True,
        note="Of a name it does not know, n=2 is two calls of n=1, alike and at once: both are "
        "bought. It does not know `x-should-retry`: a spent budget is asked for three times.",
    ),
    Client(
        "TanStack AI", "tanstack_ai.mjs", ("generate", "edit", "url", "errors", "retry"),
        "tanstack-ai", "node-22",
        note="`openaiImage`: of a name that it does not know it takes no `size`.",
    ),
    Client(
        "LangChain, Python", "langchain_dalle.py",
        ("generate", "url", "responses", "errors", "retry"), "langchain-python", half=True,
        note="`DallEAPIWrapper` reads `data[].url` and sends no `response_format`; "
        "`ChatOpenAI` has the image tool.",
    ),
    Client(
        "LangChain, JavaScript", "langchain_dalle.mjs",
        ("generate", "url", "responses", "errors", "retry"), "langchain-js", "node-22",
        split=("url",),
        note="`DallEAPIWrapper` sends dall-e-3, `style`, `quality=standard` and "
        "`response_format=url`; n=2 is two calls of n=1, alike and at once.",
    ),
    Client(
        "LlamaIndex", "llama_index_tool.py", ("generate", "url", "errors", "retry"), "llama-index",
        half=True,
        note="`OpenAIImageGenerationToolSpec` sends dall-e-3, `style` and `quality=standard`. Its "
        "package does not bring openai with it.",
    ),
    Client(
        "Haystack", "haystack_generator.py", ("generate", "errors", "retry"), "haystack",
        note="`OpenAIImageGenerator`: 30 s time-out and 5 retries of its own.",
    ),
    Client(
        "Agno", "agno_tool.py", ("generate", "errors", "retry"), "agno",
        errors=("401", "429", "400"),
        note="`OpenAITools`: raises nothing, what went wrong is a text for its model.",
    ),
    Client(
        "pydantic-ai", "pydantic_ai_images.py",
        ("generate", "edit", "responses", "errors", "retry"), "pydantic-ai",
        errors=("ModelHTTPError", "ModelHTTPError", "ModelHTTPError"), half=True,
        note="`ImageGenerator`, and an agent with `ImageGenerationTool`.",
    ),
    Client(
        "Semantic Kernel", "semantic_kernel_service.py", ("generate", "edit", "errors", "retry"),
        "semantic-kernel",
        errors=("ServiceResponseException", "ServiceResponseException", "ServiceResponseException"),
        note="`OpenAITextToImage`: its settings know the sizes of dall-e alone.",
    ),
    Client(
        "openai-agents", "agents_tool.py", ("responses", "errors"), "openai-agents",
        note="An agent with `ImageGenerationTool`.",
    ),
    Client(
        "curl", "curl.sh", SDK,
        errors=("401", "429", "400"), half=True,
        note="`--fail --retry` waits by `retry-after`.",
    ),
    Client(
        "Open WebUI", "open_webui.py", ("generate", "edit", "url", "errors"), "openai-python-3",
        errors=("401", "429", "400"), half=True,
        note="Replayed, not run: its requests by aiohttp, with the user's headers.",
    ),
    Client(
        "n8n", "n8n.mjs", ("generate", "edit", "url", "errors"), node="node-20",
        errors=("401", "429", "400"),
        note="Replayed, not run: the requests of its OpenAI node.",
    ),
)  # fmt: skip


def chosen(names: list[str]) -> list[Client]:
    """``half``, or clients whose name begins so; none is all. Raises ``LookupError``."""
    if not names:
        return list(CLIENTS)
    if names == ["half"]:
        return [client for client in CLIENTS if client.half]
    found = [client for client in CLIENTS if client.name.startswith(tuple(names))]
    if not found:
        raise LookupError(f"no client begins with {names}; they are {[c.name for c in CLIENTS]}")
    return found
