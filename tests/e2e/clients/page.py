"""What the clients did, as a table for a terminal and as a page of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.e2e.clients.matrix import CLIENTS, FEATURES
from tests.e2e.clients.run import Outcome

PAGE: Final = Path(__file__).parents[3] / "gateway" / "docs" / "clients.md"

HEAD: Final = """\
# Clients

Written by `make clients`, which installs each of these packages at the version that is here, runs
it against a real gateway with a sandbox behind it that refuses what OpenAI refuses, and compares
what the client got with what was bought: every picture is decoded, every attempt counted, and the
books must be the upstream's bill. What each client ran is one short script of
`tests/e2e/clients/scripts`, made to be copied.

- **generate**, **edit** (two pictures and a mask where the client takes them), **stream**: pictures
  come as the client expects them.
- **url**: the client asks for urls, or reads nothing else; what is behind them is a picture. Needs
  `server.public_url`.
- **files**: a picture uploaded to `/v1/files` and edited by its id. **responses**: the image tool
  of `/v1/responses`.
- **errors**: an unknown key, a spent budget and a bad parameter raise what the client's users
  catch, each after one attempt. **retry**: a 429 with `retry-after-ms`, and then the picture.

**mended** is what the gateway changed, or filled in, of all that the client sent, as it says itself
in `x-gateway-changed`. A dash is what the client cannot do, or what was not tried with it.

"""

TAIL: Final = """
The gateway of this table has the configuration
[`gateway.yaml`](../../tests/e2e/clients/gateway.yaml) there: retired names (`dall-e-2`, `dall-e-3`,
`gpt-image-1`) are aliases of a model that is served, and `server.public_url` is set.
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole of ``gateway/docs/clients.md``."""
    notes = {client.name: client.note for client in CLIENTS}
    head = ["client", "version", "runtime", *FEATURES, "mended", "note"]
    rows = [head, ["---"] * len(head)]
    for one in outcomes:
        marks = [_mark(one, feature) for feature in FEATURES]
        mended = ", ".join(f"`{name}`" for name in one.changed)
        rows.append([one.client, one.version, one.runtime, *marks, mended, notes[one.client]])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    failures = [
        f"- {one.client}, {result.feature}: {result.detail}"
        for one in outcomes
        for result in one.results
        if not result.ok
    ]
    failed = "\n## What fails\n\n" + "\n".join(failures) + "\n" if failures else ""
    return HEAD + "\n".join(lines) + "\n" + failed + TAIL


def _mark(outcome: Outcome, feature: str) -> str:
    result = outcome.of(feature)
    if result is None:
        return "–"
    return "yes" if result.ok else "**no**"


def table(outcomes: Sequence[Outcome]) -> str:
    """For a terminal."""
    columns = [*FEATURES, "books"]
    rows = [["client", "runtime", *columns]]
    rows += [
        [one.client, one.runtime, *(_mark(one, name).strip("*") for name in columns)]
        for one in outcomes
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
