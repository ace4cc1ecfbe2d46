"""Nothing secret leaves: canaries in every place that holds a secret, driven through every path,
and looked for in everything that the gateway writes, answers or sends (reliability 88, T16).

None of them looks like a key, so no redactor helps: what is not there was never put there. Where
one may be is said in ``ALLOWED``, with the reason.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from gateway.cli import main
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.collector import Collector, run_collector
from tests.inbox import Inbox, inbox
from tests.processes import GatewayProcess, run, wait_until
from tests.running import MODEL, TestClock

TEAM_KEY = "canary1team1key1aaaaaaaaaaaa"
OTHER_KEY = "design9key9bbbbbbbbbbbbbbbbb"
WRONG_KEY = "canary2wrong2key2cccccccccc"
UPSTREAM_KEY = "canary3upstream3key3ddddddd"
SPARE_KEY = "canary4spare4key4eeeeeeeeee"
UPSTREAM_HEADER = "canary5header5ffffffffffff"
PROVIDER_ADMIN_KEY = "canary6admin6key6gggggggg"
PEPPER = "canary7pepper7hhhhhhhhhhhhhhhhhhhhhhhh"
REDIS_PASSWORD = "canary8redis8iiiiiiiiiiii"
POSTGRES_PASSWORD = "canary9postgres9jjjjjjjj"
PROXY_PASSWORD = "canary10proxy10kkkkkkkkkk"
COLLECTOR_TOKEN = "canary11collector11llllll"
WEBHOOK_TOKEN = "token-5f2c"
WEBHOOK_SECRET = f"whsec_{base64.b64encode(b'canary12webhook12mmmmmmmmmm').decode()}"
COOKIE = "canary13cookie13nnnnnnnnnn"
BAGGAGE = "canary14baggage14ooooooooo"
PROMPT = "canary15prompt15pppppppppp"
USER = "canary16user16qqqqqqqqqqqq"
SAFETY = "canary17safety17rrrrrrrrrr"
FILE_NAME = "canary18file18ssssssssssss"
IDEMPOTENCY_KEY = "canary19idempotency19ttt"
UNKNOWN_FIELD = "canary20field20uuuuuuuuuu"
CHAT_USER = "canary22chat22wwwwwwwwwwww"
CHAT_EMAIL = "canary23email23@xxxxxxxx.yyy"

PICTURE_OUT = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"canary21picture21" * 100).decode()


def _noise() -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(out, "PNG")
    return out.getvalue()


PICTURE_IN = _noise()
WORDS: Mapping[str, str | bytes] = {
    "team key": TEAM_KEY,
    "wrong key": WRONG_KEY,
    "upstream key": UPSTREAM_KEY,
    "spare upstream key": SPARE_KEY,
    "upstream header": UPSTREAM_HEADER,
    "provider's admin key": PROVIDER_ADMIN_KEY,
    "pepper": PEPPER,
    "redis password": REDIS_PASSWORD,
    "postgres password": POSTGRES_PASSWORD,
    "proxy password": PROXY_PASSWORD,
    "collector's token": COLLECTOR_TOKEN,
    "webhook's token": WEBHOOK_TOKEN,
    "webhook's secret": WEBHOOK_SECRET,
    "cookie": COOKIE,
    "baggage": BAGGAGE,
    "prompt": PROMPT,
    "user": USER,
    "safety identifier": SAFETY,
    "user of a chat": CHAT_USER,
    "email of a user": CHAT_EMAIL,
    "file name": FILE_NAME,
    "idempotency key": IDEMPOTENCY_KEY,
    "unknown field": UNKNOWN_FIELD,
    "input picture": PICTURE_IN[200:224],
    "input picture as base64": base64.b64encode(PICTURE_IN)[400:440],
    "output picture": base64.b64decode(PICTURE_OUT)[40:80],
    "output picture as base64": PICTURE_OUT[400:440],
}
SECRETS: Mapping[str, bytes] = {
    name: word.encode() if isinstance(word, str) else word for name, word in WORDS.items()
}

ALLOWED: Mapping[tuple[str, str], str] = {
    ("own answers", "prompt"): "a provider's refusal may repeat it to the team that sent it",
    ("own answers", "unknown field"): "the one who sent it is told its name",
    ("own answers", "user"): "as a size that is no size: the one who sent it is told so",
    ("own answers", "safety identifier"): "OpenAI repeats it in its answers",
    ("own answers", "output picture"): "it is what was bought",
    ("own answers", "output picture as base64"): "it is what was bought",
    ("results", "output picture"): "pictures are kept for those who come back",
    ("results", "output picture as base64"): "pictures are kept for those who come back",
    ("results", "prompt"): "a refusal is kept as it was answered, for who comes back for it",
    ("results", "user"): "as in the refusal of a size, above",
    ("results", "safety identifier"): "as in the answers, above",
    ("database", "idempotency key"): "the hold is its record",
}
"""(Where, what) -> why it may be there."""


@dataclass
class Sinks:
    """Everything that left the gateway, by where."""

    found: dict[str, bytearray] = field(default_factory=dict)

    def add(self, name: str, content: str | bytes) -> None:
        raw = content.encode() if isinstance(content, str) else content
        self.found.setdefault(name, bytearray()).extend(raw + b"\n")

    def leaks(self) -> list[tuple[str, str]]:
        return [
            (where, what)
            for where, content in self.found.items()
            for what, secret in SECRETS.items()
            if _has(content, secret)
        ]


def _has(content: bytes | bytearray, secret: bytes) -> bool:
    """As it is, in hexadecimal, and in base64 wherever it begins there."""
    ways = [secret, secret.hex().encode()]
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + secret)
        ways.append(coded[4 if before else 0 : -4])
    return any(way in content for way in ways)


@dataclass(frozen=True)
class Scene:
    """One request of the team with the canaries, and what the upstream does. ``path`` is below
    /v1/images; ``word`` in the prompt tells the upstream's rule."""

    word: str
    rule: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    edit: bool = False
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str = TEAM_KEY
    status: int | None = None


ANSWER = {
    "created": 1,
    "data": [{"b64_json": PICTURE_OUT, "revised_prompt": f"{PROMPT} in oil"}],
    "usage": {
        "input_tokens": 3,
        "output_tokens": 196,
        "total_tokens": 199,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
    },
}
GOOD: Mapping[str, Any] = {"status": 200, "body": ANSWER}


def echoing(status: int, text: str) -> dict[str, Any]:
    """An error that repeats what it should not."""
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": text}
    return {"status": status, "body": {"error": error}}


EVERYTHING = f"{UPSTREAM_KEY} {UPSTREAM_HEADER} {PROMPT}"
JSON = {"content-type": "application/json"}
SCENES = (
    Scene("good", GOOD, status=200),
    Scene("good", GOOD, status=200),
    Scene("fresh", GOOD, headers={"cache-control": "no-cache"}, status=200),
    Scene("keyed", GOOD, headers={"idempotency-key": IDEMPOTENCY_KEY}, status=200),
    Scene("keyed", GOOD, headers={"idempotency-key": IDEMPOTENCY_KEY}, status=200),
    Scene("other", GOOD, headers={"idempotency-key": IDEMPOTENCY_KEY}, status=422),
    Scene("later", GOOD, headers={"prefer": "respond-async"}, status=202),
    Scene("streamed", {"payload_bytes": 400}, {"stream": True, "partial_images": 2}, status=200),
    Scene("edited", GOOD, edit=True, status=200),
    Scene("refused", echoing(400, EVERYTHING), status=400),
    Scene("edge", {"status": 502, "body": f"<html>{EVERYTHING}".encode()}),
    Scene("plain", {"status": 422, "body": {"detail": EVERYTHING}}),
    Scene("nested", {"status": 400, "body": {"detail": [{"input": EVERYTHING}]}}),
    Scene("error in success", echoing(200, EVERYTHING)),
    Scene("html in success", {"status": 200, "body": f"<html>{EVERYTHING}".encode()}),
    Scene("redirected", {"redirect": f"http://{UPSTREAM_HEADER}.example/{PROMPT}"}),
    Scene("cut", {"payload_bytes": 4000, "cut_after_bytes": 2000}),
    Scene("cut before", {"cut_before_headers": True}),
    Scene("slow", {"delay_seconds": 3}),
    Scene("no pictures", {"empty_data": True}),
    Scene("a stream's error", {"sse_error_after": 1}, {"stream": True, "partial_images": 1}),
    Scene("a stream's end", {"sse_cut_after": 1}, {"stream": True, "partial_images": 1}),
    Scene("garbage", {"sse_garbage": True}, {"stream": True, "partial_images": 1}),
    Scene("unknown key", key=WRONG_KEY, status=401),
    Scene("too many", changes={"n": PROMPT}, status=400),
    Scene("too large", changes={"size": USER}),
    Scene("unknown model", changes={"model": "no-such-model"}),
    Scene("unknown field", changes={UNKNOWN_FIELD: SAFETY}),
    Scene("broken", body=f'{{"prompt": "{PROMPT}", {SAFETY}'.encode(), headers=JSON, status=400),
    Scene("twice", body=f'{{"{PROMPT}":1,"{PROMPT}":2}}'.encode(), headers=JSON, status=400),
    Scene("no json", body=PROMPT.encode(), headers={"content-type": PROMPT}, status=415),
    Scene("bad form", body=f"--x\r\n{PROMPT}".encode(), edit=True,
          headers={"content-type": "multipart/form-data; boundary=x"}, status=400),
    Scene("bad key", headers={"idempotency-key": f"{IDEMPOTENCY_KEY}é"}),
    Scene("bad picture", {}, {"image": PROMPT.encode()}, edit=True, status=400),
    Scene("dead", GOOD, {"model": "by-proxy"}, status=503),
    # From here on the upstream is left alone, more and more.
    Scene("failed", echoing(500, EVERYTHING)),
    Scene("limited", echoing(429, EVERYTHING)),
    Scene("forbidden", echoing(403, EVERYTHING), status=503),
    Scene("refused as a key is", echoing(401, EVERYTHING)),
)  # fmt: skip


def configuration(
    folder: Path, sandbox: SandboxServer, collector: Collector, box: Inbox
) -> dict[str, Any]:
    pepper = folder / "pepper"
    pepper.write_text(PEPPER)
    return {
        "server": {"port": 0, "watch_seconds": 0},
        "storage": {
            "database": "sqlite:///data/gateway.db",
            "blobs": "data/blobs",
            "pepper": f"${{file:{pepper}}}",
        },
        "ledger": {"spool": "data/settlements"},
        "upstreams": {
            "openai": {
                "kind": "openai",
                "base_url": sandbox.base_url,
                "api_keys": [UPSTREAM_KEY, {"key": SPARE_KEY, "order": 2}],
                "headers": {"x-secret": UPSTREAM_HEADER},
                "admin_key": PROVIDER_ADMIN_KEY,
                "timeouts": {"first_byte_seconds": 1, "total_seconds": 5},
            },
            "proxied": {
                "kind": "openai",
                "base_url": "https://images.example/v1",
                "api_keys": [SPARE_KEY],
                "proxy": f"http://u:{PROXY_PASSWORD}@127.0.0.1:9",
            },
        },
        "models": {
            MODEL: {"upstream": "openai", "unknown_parameters": "refuse"},
            "by-proxy": {"upstream": "proxied", "model": MODEL},
            "*": {"upstream": "openai"},
        },
        "teams": {
            "growth": {
                "keys": [TEAM_KEY],
                "budget": {"day": 500},
                "soft_budget": {"day": 0.001},
                "per_user": {"limits": {"images_per_minute": 500}, "budget": {"day": 400}},
            },
            "design": {"keys": [OTHER_KEY], "limits": {"images_per_minute": 1}},
        },
        "relay": {"attempts": 2},
        "users": {"sources": ["x-openwebui-user-email", "safety_identifier", "user"]},
        "notify": {"webhook": box.url, "secret": WEBHOOK_SECRET},
        "results": {"webhook": box.url, "secret": WEBHOOK_SECRET},
        "tracing": {
            "otlp": collector.url,
            "headers": {"authorization": f"Bearer {COLLECTOR_TOKEN}"},
            "cost": True,
        },
        "log": {"level": "debug"},
    }


async def play(http: httpx.AsyncClient, scene: Scene) -> httpx.Response:
    headers = {
        "authorization": f"Bearer {scene.key}",
        "cookie": f"session={COOKIE}",
        "baggage": f"id={BAGGAGE}",
        "x-openwebui-user-id": CHAT_USER,
        **({} if scene.edit else {"x-openwebui-user-email": CHAT_EMAIL}),
        **scene.headers,
    }
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": f"{PROMPT} {scene.word}",
        "size": "1024x1024",
        "quality": "low",
        "user": USER,
        **({} if scene.edit else {"safety_identifier": SAFETY}),
        **scene.changes,
    }
    path = "/v1/images/edits" if scene.edit else "/v1/images/generations"
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    if scene.body is not None:
        return await http.post(path, content=scene.body, headers=raw)
    if scene.edit:
        picture = asked.pop("image", PICTURE_IN)
        files = {"image": (f"{FILE_NAME}.png", picture, "image/png")}
        return await http.post(path, data=asked, files=files, headers=raw)
    return await http.post(path, json=asked, headers=raw)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with run_collector() as running:
        yield running


def told(process: GatewayProcess) -> int:
    return sum(line["event"] == "request" for line in process.log)


async def test_no_secret_reaches_any_sink(
    tmp_path: Path, collector: Collector, clock: TestClock
) -> None:
    sinks = Sinks()
    with SandboxServer(clock) as sandbox:
        for word, rule in {scene.word: scene.rule for scene in SCENES if scene.rule}.items():
            sandbox.rules.add(Rule(prompt=f"{PROMPT} {word}", **rule))
        async with inbox() as box:
            document = configuration(tmp_path, sandbox, collector, box)
            config = tmp_path / "gateway.yaml"
            config.write_text(yaml.safe_dump(document))
            with GatewayProcess(config) as process:
                await asyncio.to_thread(process.wait_listening)
                await _traffic(process, sinks)
                await asyncio.to_thread(_reload_wrongly, process, config, document)
                await box.until(1)
                process.terminate()
                assert await asyncio.to_thread(process.wait) == 0
                sinks.add("output", process.stderr)
            away = config.with_name("away.yaml")
            away.write_text(yaml.safe_dump(_without_redis(document)))
            with GatewayProcess(away) as second:
                await asyncio.to_thread(second.wait_listening)
                await _a_little(second, sinks)
                second.terminate()
                assert await asyncio.to_thread(second.wait) == 0
                sinks.add("output", second.stderr)
            for post in box.posts:
                sinks.add("webhooks", json.dumps(post.headers) + post.body.decode())
    for body in collector.bodies:
        sinks.add("traces", body)
    await asyncio.to_thread(_commands, config, sinks)
    _files(tmp_path / "data", sinks)
    missing = {"output", "webhooks", "traces", "metrics", "database", "commands"} - set(sinks.found)
    assert not missing
    for where in ("output", "database", "commands"):
        assert re.search(rb"u_[0-9a-f]{20}", sinks.found[where]), f"{where}: no user was there"
    for where in ("output", "webhooks", "traces", "metrics", "database", "commands"):
        assert b"growth" in sinks.found[where], f"{where}: the search would not find anything"
    leaks = set(sinks.leaks())
    assert leaks - set(ALLOWED) == set()
    # What is allowed does happen, or its reason is of no use.
    assert set(ALLOWED) - leaks == set()


async def _traffic(process: GatewayProcess, sinks: Sinks) -> None:
    origin = f"http://127.0.0.1:{process.port}"
    async with httpx.AsyncClient(base_url=origin, timeout=30, verify=False) as http:
        for scene in SCENES:
            answer = await play(http, scene)
            assert scene.status in (None, answer.status_code), (scene.word, answer.text)
            sinks.add("own answers", str(answer.headers.raw) + answer.text)
        nowhere = await http.get(f"/{PROMPT}")
        sinks.add("own answers", str(nowhere.headers.raw) + nowhere.text)
        design = {"authorization": f"Bearer {OTHER_KEY}"}
        asked = {"model": MODEL, "prompt": "A lighthouse", "n": 2}
        rids = [line["request_id"] for line in process.log if line["event"] == "request"]
        answers = [
            await http.post("/v1/images/generations", json=asked, headers=design),
            await http.post("/v1/images/estimate", json=asked, headers=design),
            await http.get("/v1/models", headers=design),
            *[await http.get(f"/v1/images/results/{rid}", headers=design) for rid in rids],
        ]
        for answer in answers:
            sinks.add("answers to others", str(answer.headers.raw) + answer.text)
        for path in ("/metrics", "/readyz", "/healthz"):
            sinks.add(path[1:], (await http.get(path)).text)
        await asyncio.to_thread(
            wait_until, lambda: told(process) >= len(SCENES) + 2, "each request has its line"
        )


def _without_redis(document: Mapping[str, Any]) -> dict[str, Any]:
    """With servers of Redis where nobody is: each look at them fails, and is told."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    changed["storage"]["redis"] = f"redis://:{REDIS_PASSWORD}@127.0.0.1:9/0"
    changed["cache"] = {"redis": f"redis://user:{REDIS_PASSWORD}@127.0.0.1:9/1"}
    return changed


async def _a_little(process: GatewayProcess, sinks: Sinks) -> None:
    origin = f"http://127.0.0.1:{process.port}"
    async with httpx.AsyncClient(base_url=origin, timeout=30, verify=False) as http:
        answer = await play(http, SCENES[0])
        assert answer.status_code == 200
        sinks.add("own answers", str(answer.headers.raw) + answer.text)
        for path in ("/metrics", "/readyz"):
            sinks.add(path[1:], (await http.get(path)).text)


def _reload_wrongly(process: GatewayProcess, config: Path, document: dict[str, Any]) -> None:
    """Wrong settings beside secrets, and secrets where they do not belong; the gateway goes on."""
    mistakes: Sequence[Callable[[dict[str, Any]], object]] = (
        lambda one: one["upstreams"]["openai"].update(api_key=UPSTREAM_KEY),
        lambda one: one["storage"].update(redis=f"redis://:{REDIS_PASSWORD}@h/{REDIS_PASSWORD}"),
        lambda one: one["teams"]["growth"]["keys"].append(UPSTREAM_KEY),
        lambda one: one["notify"].update(secret=WEBHOOK_SECRET[:20]),
        lambda one: one["tracing"].update(otlp=f"http://u:{COLLECTOR_TOKEN}@c/v1/traces"),
        lambda one: one.update({TEAM_KEY: 1}),
    )
    for count, mistake in enumerate(mistakes, 1):
        changed = json.loads(json.dumps(document))
        mistake(changed)
        config.write_text(yaml.safe_dump(changed))
        os.kill(process.pid, signal.SIGHUP)
        refused = "the configuration is not read again"

        def has_refused(
            times: int = count, said: str = refused, process: GatewayProcess = process
        ) -> bool:
            return [line["event"] for line in process.log].count(said) >= times

        wait_until(has_refused, "the configuration was refused")
    config.write_text(yaml.safe_dump(document))


def _commands(config: Path, sinks: Sinks) -> None:
    """What commands print, also where they fail."""
    commands = (
        ("check",),
        ("usage", "--json"),
        ("usage", "--by", "user"),
        ("export",),
        ("key", "list"),
        ("ledger", "unresolved", "--json"),
    )
    for command in commands:
        sinks.add("commands", CliRunner().invoke(main, [*command, "--config", str(config)]).output)
    document = yaml.safe_load(config.read_text())
    away = f"postgresql://gateway:{POSTGRES_PASSWORD}@127.0.0.1:9/gateway"
    wrong: Sequence[tuple[str, str, Any]] = (
        ("storage", "database", away),
        ("storage", "database", f"postgresql://{POSTGRES_PASSWORD}"),
        ("notify", "webhook", f"https://h:99999/{WEBHOOK_TOKEN}"),
        ("log", "level", TEAM_KEY),
        ("tracing", "headers", {"host": COLLECTOR_TOKEN}),
    )
    for section, name, value in wrong:
        changed = json.loads(json.dumps(document))
        changed[section][name] = value
        broken = config.with_name("broken.yaml")
        broken.write_text(yaml.safe_dump(changed))
        failed = CliRunner().invoke(main, ["check", "--config", str(broken)])
        sinks.add("commands", failed.output)
        if failed.exit_code == 0:
            # It is right as it is written, and of no use.
            done = run("serve", "--config", str(broken))
            assert done.returncode == 1, done.stderr
            sinks.add("commands", done.stdout + done.stderr)
    broken.write_text(f"teams: {{growth: {{keys: [{TEAM_KEY}]}}\nstorage: '{PEPPER}")
    failed = CliRunner().invoke(main, ["check", "--config", str(broken)])
    assert failed.exit_code == 2
    sinks.add("commands", failed.output)


def _files(data: Path, sinks: Sinks) -> None:
    """Everything that stays on the disk."""
    for path in sorted(data.rglob("*")):
        if path.is_file():
            kept = data / "blobs" in path.parents
            where = (
                "results" if kept else "settlements" if "settlements" in str(path) else "database"
            )
            sinks.add(where, str(path).encode() + path.read_bytes())


def test_a_canary_that_is_there_is_found() -> None:
    """The search finds each, as it is and in what it may be wrapped in."""
    for name, secret in SECRETS.items():
        for content in (
            b"x" + secret + b"y",
            base64.b64encode(b"..." + secret + b"..."),
            base64.b64encode(b"." + secret + b"..."),
            secret.hex().encode(),
        ):
            assert _has(content, secret), name
    assert not _has(b"growth", SECRETS["team key"])
