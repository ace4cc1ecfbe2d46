"""The dashboards: what they are made of, and (`make dashboards`) every question of theirs asked of
a real Prometheus that scrapes a real gateway under a short load."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.clock import SystemClock
from gateway.domain.call import Json
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.ops.prometheus import DASHBOARDS, RULES, RUNBOOKS, Prometheus, run_prometheus, tool
from tests.ops.promql import mistakes, of_the_table
from tests.processes import GatewayProcess, run, wait_until
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, config_of
from tests.valkey import free_port, run_valkey

Panel = dict[str, Any]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GLOBALS = {"__rate_interval": "4s", "__interval": "1s", "__range": "60s"}
"""As Grafana fills them in for a data source that is scraped each second."""


def panels(board: str) -> list[Panel]:
    return [panel for panel in BOARDS[board]["panels"] if panel["type"] != "row"]


def questions(board: str) -> Iterator[tuple[Panel, dict[str, Any]]]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel, target


def variables(board: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in BOARDS[board]["templating"]["list"]}


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its variables, as Grafana fills them in."""
    return re.sub(
        r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))",
        lambda found: ({**GLOBALS, **values})[found[1] or found[2]],
        # In label_replace, $1 is Prometheus's own.
        text.replace('"$1"', '"\0"'),
    ).replace("\0", "$1")


def everything(board: str) -> dict[str, str]:
    """The values of the variables where All is chosen."""
    return {name: one.get("allValue", "") for name, one in variables(board).items()}


# What they are made of


def test_there_are_four_and_each_leads_to_the_others_and_to_the_runbooks() -> None:
    assert set(BOARDS) == {"overview", "spend", "upstreams", "ledger"}
    assert {board["uid"] for board in BOARDS.values()} == {f"gateway-{name}" for name in BOARDS}
    for name, board in BOARDS.items():
        others = {f"/d/gateway-{other}" for other in BOARDS if other != name}
        links = {link["url"]: link for link in board["links"]}
        assert set(links) == others | {"gateway/docs/runbooks.md"}
        assert all(links[other]["includeVars"] and links[other]["keepTime"] for other in others)


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_can_be_imported_anywhere(name: str) -> None:
    board = BOARDS[name]
    assert board["id"] is None, "an id belongs to one Grafana"
    assert "__inputs" not in board
    assert board["schemaVersion"] == 39
    assert board["title"] == f"Gateway / {name.capitalize()}"
    assert variables(name)["datasource"]["type"] == "datasource"
    for panel in panels(name):
        assert panel["datasource"] == DATASOURCE
    for _, target in questions(name):
        assert target["datasource"] == DATASOURCE
    for one in variables(name).values():
        assert one["type"] == "datasource" or one["datasource"] == DATASOURCE


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_side_by_side(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert len(ids) == len(set(ids))
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["x"] + place["w"] <= 24
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies on {taken.get(cell)}"
            taken[cell] = panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows_in_which_unit_and_where_help_is(name: str) -> None:
    text = RUNBOOKS.read_text()
    runbooks = {
        f"gateway/docs/runbooks.md#{one.lower()}" for one in re.findall(r"^## (.+)$", text, re.M)
    }
    seen: set[tuple[str, str]] = set()
    for panel in panels(name):
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
        assert panel["targets"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        assert (panel["title"], panel["type"]) not in seen, panel["title"]
        seen.add((panel["title"], panel["type"]))
        for link in panel.get("links", ()):
            assert link["url"] in runbooks, panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_every_metric_and_label_exists_and_every_choice_counts(name: str) -> None:
    known = of_the_table()
    chosen = set(variables(name)) - {"datasource"}
    used: set[str] = set()
    for panel, target in questions(name):
        said = target["expr"]
        assert mistakes(filled(said, everything(name)), known) == [], panel["title"]
        assert target["instant"] != target["range"]
        # Whoever picks one deployment sees that one in every panel.
        here = set(re.findall(r'=~"\$(\w+)"', said))
        assert here >= {"job", "namespace", "instance"}, panel["title"]
        used |= here
        assert target["format"] in ("time_series", "table", "heatmap")
        assert (
            target["instant"] == (panel["type"] in ("table", "bargauge")) or panel["type"] == "stat"
        )
    assert used == chosen
    for one in variables(name).values():
        if one["type"] == "query":
            asked = one["definition"]
            assert one["query"]["query"] == asked
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
            assert mistakes(filled(selector, everything(name)), known) == []
            assert label == one["name"]
            assert (one["includeAll"], one["allValue"], one["multi"]) == (True, ".*", True)


def test_the_faults_of_the_dashboard_are_those_of_the_alerts() -> None:
    alerts = (RULES / "alerts.yaml").read_text()
    faults = set(re.findall(r'fault="([^"]+)"', alerts))
    assert faults == {"gateway", "upstream"}
    [panel] = [panel for panel in panels("overview") if panel["title"] == "Failed by fault"]
    for target, fault in zip(panel["targets"], ("gateway", "upstream"), strict=True):
        assert re.findall(r'fault="([^"]+)"', target["expr"]) == [fault]
        # The failures have neither team nor model: what they are a share of may not either.
        assert "$team" not in target["expr"]
        assert "$model" not in target["expr"]
        assert target["expr"].count('status!="4xx"') == 1


# What they show

JOB = {
    "namespace": "images",
    "pod": "gateway-0",
    "container": "gateway",
    "service": "gateway",
    # A ServiceMonitor adds the name of its port: without honor_labels it would push ours aside.
    "endpoint": "metrics",
}
TEAMS: dict[str, str] = {
    "growth": KEY,
    "design": OTHER_KEY,
    "art": "art-key-0123456789abcdef",
    "lab": "lab-key-0123456789abcdef",
    "rush": "rush-key-0123456789abcdef",
}
ASKED: dict[str, Any] = {"model": MODEL, "size": "1024x1024", "quality": "low"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ZERO_IS_RIGHT = {
    # Nothing of this happens to a gateway that is well; the panels say so with a zero.
    "Connections refused",
    "Calls with a soft bound",
    "Operations of the cache and the results that failed",
    "Webhooks",
    "Commands that Redis did not serve",
    "Takeovers and lost flights",
    "Settlements that wait",
    "Shared gate",
    "Waiting for a connection",
    "Clock skew",
}
FIRES = {
    # At the first event, which is how these counters are born.
    "GatewayUnpricedRequests",
    "GatewayCostNotSaid",
    "GatewayBoundTooLow",
    "GatewayUnresolvedCalls",
    "GatewayBudgetExhausted",
    "GatewaySoftBudgetPassed",
}


def configured(folder: Path, sandbox: SandboxServer, redis: str) -> Path:
    upstream = {"kind": "openai", "base_url": sandbox.base_url}
    two = {"upstream": "openai", "model": "gpt-image-2"}
    return config_of(
        folder,
        sandbox.base_url,
        {
            "server": {"host": "127.0.0.1", "workers": 2, "watch_seconds": 0},
            "storage": {"redis": redis},
            "upstreams": {
                "openai": {"api_keys": ["sk-one", "sk-revoked"]},
                "azure": {**upstream, "api_keys": ["sk-azure"], "prices": "openai"},
                "away": {
                    **upstream,
                    "base_url": f"http://127.0.0.1:{free_port()}/v1",
                    "api_keys": ["sk-away"],
                    "prices": "openai",
                },
            },
            "models": {
                "both": {
                    "upstreams": [
                        {"upstream": "openai", "model": MODEL, "order": 1},
                        {"upstream": "azure", "model": MODEL, "order": 1},
                    ]
                },
                "far": {
                    "upstreams": [{"upstream": "away", "model": "gpt-image-2"}],
                    "fallback": ["gpt-image-2"],
                },
                "busy": two,
                "shaky": {"upstream": "azure", "model": "gpt-image-2"},
                "gpt-image-1.5": {"upstream": "openai"},
                "house": {"upstream": "openai", "unpriced": "allow"},
            },
            "teams": {
                "growth": {"budget": {"day": 500, "month": 5000}, "soft_budget": {"day": 0.01}},
                "design": {"budget": {"week": 900, "total": 9000}},
                "art": {"keys": [TEAMS["art"]], "budget": {"day": 0.02}},
                "lab": {"keys": [TEAMS["lab"]]},
                "rush": {"keys": [TEAMS["rush"]], "limits": {"requests_per_minute": 2}},
            },
        },
    )


def faults(sandbox: SandboxServer) -> None:
    """What goes wrong upstream, by the words of a prompt or by the key."""
    dear: Json = {"input_tokens": 4_000, "output_tokens": 1}
    house: Json = {"created": 1, "data": [{"b64_json": "iVBORw0KGgoA"}]}
    for rule in (
        Rule(key="sk-revoked", status=401),
        Rule(prompt="limited", status=429, headers={"retry-after-ms": "300"}),
        Rule(prompt="fails", status=500),
        Rule(prompt="edge", status=504),
        Rule(prompt="cut", cut_before_headers=True),
        Rule(prompt="house", status=200, body=house),
        Rule(prompt="silent", no_usage=True, payload_bytes=400),
        Rule(prompt="dear", usage=dear, payload_bytes=400),
        Rule(prompt="slow", delay_seconds=0.6, payload_bytes=400),
        Rule(prompt="stream"),
        Rule(payload_bytes=400, delay_seconds=0.05),
    ):
        sandbox.rules.add(rule)


class Load:
    """A few of each thing that callers do, for as long as the block lasts."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.rounds = 0
        self.statuses: dict[int, int] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._for_ever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _for_ever(self) -> None:
        while True:
            async with asyncio.TaskGroup() as group:
                for errand in self._errands(self.rounds):
                    group.create_task(errand)
                # So much a second, whatever the machine: it is a load, not a test of one.
                group.create_task(asyncio.sleep(0.5))
            self.rounds += 1

    def _errands(self, turn: int) -> Iterator[Any]:
        yield self._ask("growth", f"a lighthouse {turn}")
        yield self._ask("design", f"a harbour {turn}", model="both")
        yield self._ask("growth", "the same again")
        yield self._ask("lab", f"a stream {turn}", stream=True, partial_images=1)
        yield self._edit(f"an edit {turn}")
        yield self._ask("rush", f"a crowd {turn}")
        yield self._ask("art", f"a painting {turn}")
        yield self._ask("growth", f"from far {turn}", model="far")
        yield self._ask("growth", f"estimate {turn}", path="estimate")
        yield self._joined(f"slow {turn}")
        yield self._gone(f"slow and left {turn}")
        yield self._results(f"to be fetched {turn}")
        # Rarer, so that they do not close the upstreams for the others.
        if turn % 3 == 0:
            yield self._ask("lab", f"limited {turn}", model="busy")
            yield self._ask("lab", f"house {turn}", model="house")
            yield self._ask("lab", f"silent {turn}")
            yield self._ask("lab", f"dear {turn}", model=ALIAS)
        if turn % 4 == 1:
            yield self._ask("design", f"cut {turn}", model="shaky")
            yield self._ask("design", f"fails {turn}", model="shaky")
            yield self._ask("design", f"edge {turn}", model="shaky")

    async def _ask(
        self,
        team: str,
        prompt: str,
        path: str = "generations",
        headers: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> httpx.Response:
        answer = await self._http.post(
            f"/images/{path}",
            json={**ASKED, "prompt": prompt, **changes},
            headers={"authorization": f"Bearer {TEAMS[team]}", **(headers or {})},
        )
        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
        return answer

    async def _edit(self, prompt: str) -> None:
        await self._http.post(
            "/images/edits",
            data={**ASKED, "prompt": prompt},
            files={"image": ("a.png", PIXEL, "image/png")},
            headers={"authorization": f"Bearer {TEAMS['lab']}"},
        )

    async def _joined(self, prompt: str) -> None:
        """The retry of an SDK, while the first attempt still runs."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask("design", prompt))
            await asyncio.sleep(0.2)
            group.create_task(self._ask("design", prompt, headers={"x-stainless-retry-count": "1"}))

    async def _gone(self, prompt: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self._ask("lab", prompt)

    async def _results(self, prompt: str) -> None:
        answer = await self._ask("lab", prompt, headers={"prefer": "respond-async"})
        where = answer.headers["location"].removeprefix("/v1")
        key = {"authorization": f"Bearer {TEAMS['lab']}", "prefer": "wait=5"}
        await self._http.get(where, headers=key)


def numbers(
    prometheus: Prometheus, target: Mapping[str, Any], asked: str, start: float
) -> list[float]:
    """What Grafana would be given for a target: a picture of the time so far, or of this moment."""
    now = time.time()
    if target["instant"]:
        found = prometheus.at(asked, now)
    else:
        found = prometheus.over(asked, start, now, 1)
    return [value for value in found if math.isfinite(value)]


def selections(prometheus: Prometheus, board: str) -> dict[str, str]:
    """Something that can be chosen for each variable but All, from where Grafana takes it."""
    found = everything(board)
    for name, one in variables(board).items():
        if one["type"] == "query":
            asked = filled(one["definition"], found)
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
            values = prometheus.values_of(label, selector)
            assert values, f"there is nothing to choose for {name} of {board}"
            if name in ("job", "namespace", "instance"):
                assert len(values) == 1
                # Grafana escapes it for the expression, and again for the string that it stands in.
                found[name] = re.escape(values[0]).replace("\\", "\\\\")
    return found


@pytest.mark.dashboards
async def test_every_panel_shows_something_of_a_gateway_under_load(tmp_path: Path) -> None:
    tool("prometheus")
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(SandboxServer(SystemClock()))
        faults(sandbox)
        redis = stack.enter_context(run_valkey()).url
        config = configured(tmp_path, sandbox, redis)
        # Somebody's budget was used up before: its mark is seen at the first look.
        ended = run("ledger", "adjust", "--team", "art", "--model", MODEL, "--amount", "0.019",
                    "--day", time.strftime("%Y-%m-%d", time.gmtime()), "--reason", "a test",
                    "--config", str(config))  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        gateway = stack.enter_context(GatewayProcess(config))
        await asyncio.to_thread(gateway.wait_ready)
        started = time.time()
        prometheus = stack.enter_context(
            run_prometheus(tmp_path / "prometheus", f"127.0.0.1:{gateway.port}", JOB)
        )
        # What has happened before the first scrape is old news, and no alert.
        await another_scrape(prometheus)
        async with (
            httpx.AsyncClient(base_url=gateway.base_url, timeout=60, verify=False) as http,
            Load(http).running(),
        ):
            empty = await until_every_panel_has_data(prometheus, started)
            assert empty == []
            await asyncio.to_thread(report, prometheus, started)
            fired = await until_they_fire(prometheus)
            assert fired >= FIRES
        sick = [
            (rule["name"], rule["lastError"])
            for group in prometheus.ask("rules")["groups"]
            for rule in group["rules"]
            if rule["health"] != "ok"
        ]
        assert sick == []


async def until_every_panel_has_data(prometheus: Prometheus, started: float) -> list[str]:
    """Asks what has not been answered well again, after each scrape, for a minute. What is left
    after that: queries without a number, and panels with nothing but zeros that may not be."""
    left = [(board, panel) for board in BOARDS for panel in panels(board)]
    while left and time.time() - started < 60:
        await another_scrape(prometheus)
        left = await asyncio.to_thread(_lacking, prometheus, started, left)
    return [f"{board}: {panel['title']}" for board, panel in left]


def _lacking(
    prometheus: Prometheus, started: float, asked: list[tuple[str, Panel]]
) -> list[tuple[str, Panel]]:
    found = []
    for board, panel in asked:
        answers = [
            numbers(prometheus, target, filled(target["expr"], everything(board)), started)
            for target in panel["targets"]
        ]
        moves = any(map(any, answers)) or panel["title"] in ZERO_IS_RIGHT
        if not (all(answers) and moves):
            found.append((board, panel))
    return found


async def another_scrape(prometheus: Prometheus) -> None:
    """Waits until the gateway has been scraped once more."""

    def scrapes() -> float:
        return sum(prometheus.at("count_over_time(gateway_build_info[10m])", time.time()))

    before = await asyncio.to_thread(scrapes)
    await asyncio.to_thread(wait_until, lambda: scrapes() > before, "another scrape")


async def until_they_fire(prometheus: Prometheus) -> set[str]:
    """The alerts that fire, once those that have to are among them; or after half a minute."""
    ends, fired = time.monotonic() + 30, set[str]()
    while not fired >= FIRES and time.monotonic() < ends:
        await another_scrape(prometheus)
        found = (await asyncio.to_thread(prometheus.ask, "alerts"))["alerts"]
        fired = {one["labels"]["alertname"] for one in found if one["state"] == "firing"}
    return fired


def report(prometheus: Prometheus, started: float) -> None:
    """Prints what each panel shows of one deployment that was chosen, and which have only zeros."""
    zero = []
    for board in BOARDS:
        chosen = selections(prometheus, board)
        for panel in panels(board):
            found = [
                value
                for target in panel["targets"]
                for value in numbers(prometheus, target, filled(target["expr"], chosen), started)
            ]
            assert found, panel["title"]
            print(
                f"{board:10}{panel['title']:55}{len(found):7} {min(found):12.5g} {max(found):12.5g}"
            )
            if not any(found):
                zero.append(panel["title"])
    print("nothing but zeros, as it should be:", *zero, sep="\n  ")
    assert set(zero) <= ZERO_IS_RIGHT


def test_the_panels_that_may_be_zero_are_there() -> None:
    titles = {panel["title"] for board in BOARDS for panel in panels(board)}
    assert titles >= ZERO_IS_RIGHT
    alerts = yaml.safe_load((RULES / "alerts.yaml").read_text())
    names = {rule.get("alert") for group in alerts["groups"] for rule in group["rules"]}
    assert names >= FIRES
