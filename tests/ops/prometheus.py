"""A real Prometheus and its promtool, from Debian's package or wherever they are on the path."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.valkey import free_port

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "gateway" / "rules"
DASHBOARDS = ROOT / "helm" / "gateway" / "dashboards"
RUNBOOKS = ROOT / "gateway" / "docs" / "runbooks.md"
START_SECONDS = 30.0


def tool(name: str) -> str:
    """Where ``prometheus`` or ``promtool`` is. Without it the test is skipped; in CI it fails."""
    found = shutil.which(name)
    if found is None:
        why = f"no {name}: apt-get install --no-install-recommends prometheus"
        if os.environ.get("CI_TOOLS"):
            pytest.fail(why)
        pytest.skip(why)
    return found


class Prometheus:
    """A server on a loopback port. Times are Unix times in seconds."""

    def __init__(self, port: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def close(self) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **parameters: Any) -> Any:
        """The ``data`` of an answer of the API. Raises ``AssertionError`` with what it says."""
        answer = self._http.post(f"/api/v1/{path}", data=parameters)
        if answer.status_code == 405:
            answer = self._http.get(f"/api/v1/{path}", params=parameters)
        told = answer.json()
        assert told["status"] == "success", (parameters, told)
        return told["data"]

    def at(self, expression: str, when: float) -> list[float]:
        """Every sample of an instant query."""
        found = self.ask("query", query=expression, time=when)
        if found["resultType"] == "scalar":
            return [float(found["result"][1])]
        return [float(series["value"][1]) for series in found["result"]]

    def over(self, expression: str, start: float, end: float, step: float) -> list[float]:
        """Every sample of a range query."""
        found = self.ask("query_range", query=expression, start=start, end=end, step=step)
        return [float(value) for series in found["result"] for _, value in series["values"]]

    def values_of(self, label: str, selector: str) -> list[str]:
        found = self._http.get(f"/api/v1/label/{label}/values", params={"match[]": selector}).json()
        assert found["status"] == "success", (selector, found)
        values: list[str] = found["data"]
        return values


@contextlib.contextmanager
def run_prometheus(folder: Path, target: str, labels: Mapping[str, str]) -> Iterator[Prometheus]:
    """Scrapes ``target`` each second, under labels such as those of a ServiceMonitor, and evaluates
    the rules of the chart."""
    port, binary = free_port(), tool("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "*.yaml")],
        "scrape_configs": [
            {
                "job_name": "gateway",
                "honor_labels": True,
                "static_configs": [{"targets": [target], "labels": dict(labels)}],
            }
        ],
    }
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    server = Prometheus(port)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.is_ready():
            said = (folder / "log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        yield server
    finally:
        server.close()
        process.kill()
        process.wait()
