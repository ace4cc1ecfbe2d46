"""Runs one client against a real gateway, and looks at both ends of what it did.

A gateway of its own (`gateway serve`, a process) stands between the script, which is a process
too, and a sandbox that refuses what OpenAI refuses. What the script says it got is believed only
where the other side agrees: each picture is decoded, the upstream's journal has as many as the
client, attempts are counted in it and in the gateway's log, and the books are the upstream's bill.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from PIL import Image

from gateway.sandbox.journal import Journal, Record
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.e2e.clients.install import node_of, python_of
from tests.e2e.clients.matrix import HERE, SCRIPTS, TOOLS, Client
from tests.processes import Books, GatewayProcess
from tests.running import TestClock

KEY: Final = "growth-key-0123456789abcdef"
POOR_KEY: Final = "poor-key-0123456789abcdef"
TEXT_MODEL: Final = "gpt-4.1"
POOR: Final = (429, "poor")
SECONDS: Final = 120
RETRY: Final = Rule(
    prompt="retry:", times=1, status=429, headers={"retry-after": "1", "retry-after-ms": "50"}
)
"""What every client's retry meets once."""


@dataclass(frozen=True, slots=True)
class Result:
    feature: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a client: each of its features, and ``books``. ``changed`` are the names of
    what the gateway mended for it; ``seconds`` is the script."""

    client: str
    version: str
    runtime: str
    results: tuple[Result, ...]
    changed: tuple[str, ...]
    seconds: float
    complaints: str = ""

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results)

    def of(self, feature: str) -> Result | None:
        return next((result for result in self.results if result.feature == feature), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(client: Client, folder: Path) -> Outcome:
    """Everything that ``client`` can do, in an empty ``folder``."""
    inputs, outputs = folder / "inputs", folder / "outputs"
    outputs.mkdir(parents=True)
    draw(inputs)
    with SandboxServer(TestClock(), journal=Journal(records=1000)) as sandbox:
        sandbox.rules.add(RETRY)
        config = configured(folder, sandbox)
        with GatewayProcess(config).wait_ready() as gateway:
            began = time.monotonic()
            said, complaints = _script(client, gateway, inputs, outputs)
            seconds = time.monotonic() - began
            gateway.terminate()
            gateway.wait()
            seen = Seen(client, outputs, list(sandbox.journal), gateway.log, said)
        results = [seen.check(one) for one in said]
        told = {result.feature for result in results}
        results += [
            Result(name, False, "the script did not tell of it")
            for name in client.says
            if name not in told
        ]
        results.append(_books(config, sandbox.journal))
    return Outcome(
        client.name,
        client.version,
        runtime_of(client),
        tuple(results),
        seen.changed,
        seconds,
        complaints,
    )


def configured(folder: Path, sandbox: SandboxServer) -> Path:
    """The shipped configuration, with the addresses of this run."""
    document = yaml.safe_load((HERE / "gateway.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    document["server"] |= {"port": port, "public_url": f"http://127.0.0.1:{port}"}
    document["upstreams"]["openai"]["base_url"] = sandbox.base_url
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def draw(folder: Path) -> None:
    """Two pictures to edit, and a mask that opens the middle of the first."""
    folder.mkdir(parents=True)
    for name, mix in (("first", 40), ("second", 90)):
        picture = Image.effect_noise((256, 256), mix).convert("RGB")
        picture.save(folder / f"{name}.png")
    mask = Image.new("RGBA", (256, 256), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (64, 64, 192, 192))
    mask.save(folder / "mask.png")


def command(client: Client) -> list[str]:
    script = SCRIPTS / client.script
    if client.node is not None:
        return [str(node_of(client.node)), str(script)]
    if client.package is not None:
        return [str(python_of(client.package)), str(script)]
    return ["bash", str(script)]


def runtime_of(client: Client) -> str:
    program = command(client)[0] if client.needs else "curl"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    words = said.stdout.split()
    return f"Node {words[0].removeprefix('v')}" if client.node else " ".join(words[:2])


def _script(
    client: Client, gateway: GatewayProcess, inputs: Path, outputs: Path
) -> tuple[list[dict[str, Any]], str]:
    """The lines that it told, and what it wrote beside them."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(outputs.parent),
        "OPENAI_BASE_URL": gateway.base_url,
        "OPENAI_API_BASE": gateway.base_url,  # the older name, which LangChain reads
        "OPENAI_API_KEY": KEY,
        "POOR_API_KEY": POOR_KEY,
        "GATEWAY_ORIGIN": gateway.base_url.removesuffix("/v1"),
        "TEXT_MODEL": TEXT_MODEL,
        "INPUTS": str(inputs),
        "OUTPUTS": str(outputs),
        "PACKAGE": str(TOOLS / client.package) if client.package else "",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    try:
        ended = subprocess.run(
            command(client), env=environment, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
        stdout, stderr = ended.stdout, ended.stderr
    except subprocess.TimeoutExpired as error:
        stdout = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
        stderr = f"not within {SECONDS} s"
    lines = [line for line in stdout.splitlines() if line.startswith('{"feature"')]
    return [json.loads(line) for line in lines], stderr


class Seen:
    """What the gateway and the upstream saw of a script, and whether it agrees with it."""

    def __init__(
        self,
        client: Client,
        outputs: Path,
        journal: Sequence[Record],
        log: Sequence[Mapping[str, Any]],
        said: Sequence[Mapping[str, Any]],
    ) -> None:
        self._client = client
        self._outputs = outputs
        self._journal = journal
        self._log = log
        self._all_ok = all(one["ok"] for one in said)

    def check(self, said: Mapping[str, Any]) -> Result:
        feature = str(said["feature"])
        if not said["ok"]:
            return Result(feature, False, str(said.get("detail", "")))
        try:
            if "raised" in said:
                return Result(feature, True, self._errors(said["raised"]))
            detail = self._pictures(feature, said["pictures"])
            if feature == "retry":
                detail = self._retry()
            return Result(feature, True, detail)
        except AssertionError as error:
            return Result(feature, False, str(error))

    @property
    def changed(self) -> tuple[str, ...]:
        """What the log says was mended, each name once."""
        said = (str(line.get("changed") or "").split(",") for line in self._log)
        return tuple(sorted({name for names in said for name in names if name}))

    def _records(self, feature: str) -> list[Record]:
        """The requests of a feature, as they arrived upstream: each prompt begins with its name."""
        return [one for one in self._journal if f'"{feature}: ' in json.dumps(dict(one.fields))]

    def _pictures(self, feature: str, names: Sequence[str]) -> str:
        assert names, "no picture came"
        kinds = []
        for name in names:
            with Image.open(io.BytesIO((self._outputs / name).read_bytes())) as picture:
                picture.load()
                kinds.append(f"{picture.width}x{picture.height}")
        records = [one for one in self._records(feature) if one.billed_at is not None]
        bought = sum(record.images for record in records)
        assert bought == len(names), f"{len(names)} pictures came, {bought} were bought"
        calls = len(names) if feature in self._client.split else None
        assert calls in (None, len(records)), f"{len(records)} calls, not {calls}"
        count = f"{len(names)} picture{'s' * (len(names) > 1)}"
        several = f", {len(records)} calls" if len(records) > 1 else ""
        return f"{count}, {kinds[0]}{several}"

    def _retry(self) -> str:
        statuses = [record.status for record in self._records("retry")]
        assert statuses == [429, 200], f"attempts upstream were answered {statuses}"
        return "429, then 200"

    def _errors(self, raised: Mapping[str, str]) -> str:
        """The classes, and how often each was asked for: none of the three is worth a retry."""
        names = tuple(raised[kind] for kind in ("unknown_key", "over_budget", "bad_parameter"))
        assert names == self._client.errors, f"raised {names}, not {self._client.errors}"
        refused = [
            line["status"]
            for line in self._log
            if line.get("status") in (400, 401) or (line.get("status"), line.get("team")) == POOR
        ]
        expected = [401] + [429] * self._client.attempts + [400]
        if not self._all_ok:  # then some of the 400 are what another feature met
            refused = [status for status in refused if status != 400] + [400]
        assert refused == expected, f"refused were {refused}, not {expected}"
        attempts = "one attempt each" if len(expected) == 3 else f"attempts: {expected}"
        return f"{', '.join(dict.fromkeys(names))}; {attempts}"


def _books(config: Path, journal: Journal) -> Result:
    """The ledger against the upstream's own bill."""
    books = Books.read(config.parent / "data" / "gateway.db")
    billed = sum(nanos for _, _, nanos in journal.costs)
    try:
        books.check()
        assert not books.open, f"{len(books.open)} reservations are still open"
        assert books.spent == billed, f"booked {books.spent}, billed {billed} nano-dollars"
        assert books.usage["images"] == journal.billed_images, (
            f"booked {books.usage['images']} pictures, billed {journal.billed_images}"
        )
    except AssertionError as error:
        return Result("books", False, str(error) or "the ledger's sums differ")
    made = journal.billed_images
    return Result("books", True, f"{made} picture{'s' * (made != 1)}, ${billed / 10**9:.4f}")
