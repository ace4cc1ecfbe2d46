"""What is measured: our gateway in its variants, nginx as the limit, and the peers.

A target stands before mock upstreams, which it knows by name (``bench``, ``warm``), and says how
each is asked for through it: where, with which headers, by which name of a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError

import yaml

from tests.bench import install
from tests.bench.bodies import REAL_MODEL
from tests.bench.processes import Process
from tests.valkey import free_port

START_SECONDS: Final = 90.0
KEY: Final = "bench-key-0123456789abcdef"
HUGE: Final = 1_000_000_000
NULL: Final = Path("/dev/null")
ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a target is set up: a ``folder`` of its own, its ``core``, the ``ports`` of the
    upstreams by name. With ``ca`` these speak TLS. ``answer`` is what the upstream would say. A
    gateway runs in ``workers`` processes, all on that core."""

    folder: Path
    core: int
    ports: Mapping[str, int]
    ca: Path | None = None
    answer: bytes = b""
    workers: int = 1

    @property
    def scheme(self) -> str:
        return "http" if self.ca is None else "https"


@dataclass(frozen=True, slots=True)
class Address:
    """How one upstream is asked for through a target."""

    port: int
    model: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Booked:
    """What the gateway's books say: calls in all, those answered by the cache, those of unknown
    outcome; dollars, exact."""

    requests: int
    cached: int
    unresolved: int
    cost: str


class StartError(Exception):
    """A target does not start; the text is what it said."""


class Target(ABC):
    """A running thing that answers. ``process`` is None where there is nothing to be measured but
    the answers."""

    process: Process | None = None
    keeps_books = False

    @abstractmethod
    def address(self, upstream: str) -> Address: ...

    @property
    def exact(self) -> bool:
        """Whether answers pass byte for byte."""
        return True

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()

    def books(self) -> Booked | None:
        """After the stop; None of those who keep none."""
        return None


class Direct(Target):
    """The mock alone: what the generator and it take of every latency."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def address(self, upstream: str) -> Address:
        return Address(self._site.ports[upstream], REAL_MODEL, {})


class Gateway(Target):
    """`gateway serve` with everything on: a key of the file, limits and budgets that are huge,
    the ledger, the cache, metrics, a log line for each request (to /dev/null). ``changes`` are
    laid over its settings, section by section."""

    process: Process
    keeps_books = True

    def __init__(
        self,
        site: Site,
        changes: Mapping[str, Mapping[str, object]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._port = free_port()
        self._headers = {"authorization": f"Bearer {KEY}", **(headers or {})}
        self._config = site.folder / "gateway.yaml"
        settings = gateway_settings(site, self._port)
        for section, said in (changes or {}).items():
            settings[section] = {**settings.get(section, {}), **said}
        self._config.write_text(yaml.safe_dump(settings))
        self.process = Process(
            [sys.executable, "-m", "gateway", "serve", "--config", self._config],
            site.core,
            NULL,
            folder=ROOT,
        )
        wait_answering(self.process, self._port, "/readyz", self._why)
        if (workers := settings["server"].get("workers", 1)) > 1:
            self._wait_workers(workers)

    def address(self, upstream: str) -> Address:
        return Address(self._port, upstream, self._headers)

    def books(self) -> Booked:
        total = json.loads(self._run("usage", "--json").stdout)["total"]
        return Booked(
            int(total["requests"]),
            int(total["cached_requests"]),
            int(total["unresolved"]),
            str(total["cost_usd"]),
        )

    def metrics(self) -> str:
        url = f"http://127.0.0.1:{self._port}/metrics"
        with urllib.request.urlopen(url, timeout=START_SECONDS) as answer:
            return str(answer.read(), "utf-8")

    def _wait_workers(self, workers: int) -> None:
        """Until all of them serve. Raises ``StartError``."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(HTTPError):  # a worker's file is just being made
                if f"gateway_workers {float(workers)}" in self.metrics().splitlines():
                    return
            time.sleep(0.1)
        self.process.stop()
        raise StartError(f"not all of {workers} workers serve")

    def _why(self) -> str:
        """Its log is not kept, but the check finds most of what it would have said."""
        done = self._run("check")
        return done.stdout + done.stderr

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gateway", *words, "--config", str(self._config)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )


def gateway_settings(site: Site, port: int) -> dict[str, Any]:
    """The file of the gateway, as a tree."""
    upstream = {
        "kind": "openai",
        "api_keys": ["sk-bench-0123456789abcdef"],
        "max_connections": 20_000,
        **({} if site.ca is None else {"verify": str(site.ca)}),
    }
    return {
        "server": {"host": "127.0.0.1", "port": port},
        "upstreams": {
            name: {**upstream, "base_url": f"{site.scheme}://127.0.0.1:{upstream_port}/v1"}
            for name, upstream_port in site.ports.items()
        },
        "models": {name: {"upstream": name, "model": REAL_MODEL} for name in site.ports},
        "teams": {
            "bench": {
                "keys": [KEY],
                "limits": {
                    "requests_per_minute": HUGE,
                    "images_per_minute": HUGE,
                    "concurrent_requests": HUGE,
                },
                "budget": {"day": 1_000_000, "month": 1_000_000},
            }
        },
    }


class Nginx(Target):
    """``location`` are the directives of the one location, with PORT for the upstream's port."""

    def __init__(self, site: Site, location: str) -> None:
        command = install.nginx()
        self._ports = {name: free_port() for name in site.ports}
        config = site.folder / "nginx.conf"
        config.write_text(nginx_config(site, self._ports, location))
        self.process = Process(
            [command, "-p", site.folder, "-e", site.folder / "error.log", "-c", config],
            site.core,
            site.folder / "log",
        )
        for port in self._ports.values():
            wait_answering(self.process, port, None, lambda: self._said(site.folder))

    def address(self, upstream: str) -> Address:
        return Address(self._ports[upstream], REAL_MODEL, {})

    @staticmethod
    def _said(folder: Path) -> str:
        return "".join(
            (folder / name).read_text() for name in ("log", "error.log") if (folder / name).exists()
        )


UNBUFFERED: Final = """
proxy_buffering off;
proxy_request_buffering off;
"""
BUFFERED: Final = """
proxy_buffer_size 64k;
proxy_buffers 8 64k;
proxy_busy_buffers_size 128k;
proxy_max_temp_file_size 0;
"""
STATIC: Final = """
root ROOT;
error_page 405 =200 $uri;
"""
"""A POST of what is a file is 405: then its file is sent."""


def nginx_config(site: Site, ports: Mapping[str, int], location: str) -> str:
    """One worker, kept-alive connections on both sides, a log to /dev/null."""
    temps = "".join(
        f"{kind}_temp_path {site.folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    static = "ROOT" in location
    servers = "".join(
        f"""
upstream {name} {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests {HUGE}; }}
server {{
listen 127.0.0.1:{ports[name]} backlog=4096;
location / {{
{location.replace("ROOT", str(site.folder / "files"))}
{"" if static else _proxying(site, name)}
}}
}}
"""
        for name, upstream in site.ports.items()
    )
    if static:
        for path in ("images/generations", "images/edits"):
            file = site.folder / "files" / "v1" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(site.answer)
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {site.folder}/pid;
error_log {site.folder}/error.log;
events {{ worker_connections 20000; }}
http {{
access_log /dev/null;
sendfile on;
tcp_nopush on;
client_max_body_size 0;
keepalive_requests {HUGE};
default_type application/json;
{temps}{servers}}}
"""


def _proxying(site: Site, name: str) -> str:
    tls = (
        f"""proxy_ssl_trusted_certificate {site.ca};
proxy_ssl_verify on;
proxy_ssl_name localhost;
"""
        if site.ca is not None
        else ""
    )
    return f"""proxy_pass {site.scheme}://{name};
proxy_http_version 1.1;
proxy_set_header Connection "";
proxy_read_timeout 700s;
{tls}"""


class TlsFront(Nginx):
    """Before the mock: it ends TLS, on the core of the mock. ``ports`` are where it listens."""

    def __init__(self, site: Site, certificate: Path) -> None:
        command = install.nginx()
        self.ports = {name: free_port() for name in site.ports}
        config = site.folder / "nginx.conf"
        text = nginx_config(site, self.ports, BUFFERED)
        for port in self.ports.values():
            text = text.replace(f"{port} backlog=4096;", f"{port} ssl backlog=4096;")
        keys = f"ssl_certificate {certificate};\nssl_certificate_key {certificate};\n"
        config.write_text(text.replace("sendfile on;\n", "sendfile on;\n" + keys))
        self.process = Process(
            [command, "-p", site.folder, "-e", site.folder / "error.log", "-c", config],
            site.core,
            site.folder / "log",
        )
        for port in self.ports.values():
            wait_answering(self.process, port, None, lambda: self._said(site.folder))


class LiteLLM(Target):
    """One worker, a master key, no database, no cache, nothing sent home."""

    def __init__(self, site: Site) -> None:
        command = install.litellm()
        self._port = free_port()
        config = site.folder / "litellm.yaml"
        models = [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{REAL_MODEL}",
                    "api_base": f"http://127.0.0.1:{port}/v1",
                    "api_key": "sk-bench-0123456789abcdef",
                },
                "model_info": {"mode": "image_generation"},
            }
            for name, port in site.ports.items()
        ]
        said = {
            "model_list": models,
            "general_settings": {"master_key": f"sk-{KEY}"},
            "litellm_settings": {"telemetry": False, "num_retries": 0, "request_timeout": 600},
        }
        config.write_text(yaml.safe_dump(said))
        self.process = Process(
            [
                *(command, "--config", config, "--host", "127.0.0.1"),
                *("--port", str(self._port), "--num_workers", "1", "--telemetry", "False"),
            ],
            site.core,
            site.folder / "log",
            environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
            folder=site.folder,
        )
        process = self.process
        wait_answering(process, self._port, "/health/liveliness", lambda: process.said)

    def address(self, upstream: str) -> Address:
        return Address(self._port, upstream, {"authorization": f"Bearer sk-{KEY}"})

    @property
    def exact(self) -> bool:
        return False


class Portkey(Target):
    """On the Node of this machine; it is told in each request where to go."""

    def __init__(self, site: Site) -> None:
        modules = install.portkey() / "node_modules"
        self._port, self._site = free_port(), site
        self.process = Process(
            [
                "node",
                modules / "@portkey-ai" / "gateway" / "build" / "start-server.js",
                "--headless",
                f"--port={self._port}",
            ],
            site.core,
            site.folder / "log",
            environment={"NODE_ENV": "production"},
            folder=site.folder,
        )
        process = self.process
        wait_answering(process, self._port, "/", lambda: process.said)

    def address(self, upstream: str) -> Address:
        headers = {
            "authorization": "Bearer sk-bench-0123456789abcdef",
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{self._site.ports[upstream]}/v1",
        }
        return Address(self._port, REAL_MODEL, headers)

    @property
    def exact(self) -> bool:
        return False


def wait_answering(process: Process, port: int, path: str | None, why: Callable[[], str]) -> None:
    """Until ``path`` is answered with 200, or for None until it takes connections. Raises
    ``StartError``."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port, path):
        if not process.running or time.monotonic() > deadline:
            process.stop()
            raise StartError(f"did not start: {' '.join(why().split())[-500:]}")
        time.sleep(0.05)


def _answers(port: int, path: str | None) -> bool:
    if path is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            return True
        return False
    url = f"http://127.0.0.1:{port}{path}"
    with (
        contextlib.suppress(URLError, ConnectionError, TimeoutError),
        urllib.request.urlopen(url, timeout=5) as said,
    ):
        return bool(said.status == 200)
    return False
