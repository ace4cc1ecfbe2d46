"""`gateway health` and the HEALTHCHECK of the image: what they ask, and what they say of it."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.healthcheck import own_url
from gateway.settings import Server, listening
from tests.cli.conftest import Say
from tests.processes import ENVIRONMENT, GatewayProcess
from tests.valkey import free_port

CPU_SECONDS = 1.0
"""Of one check; 0.2 were measured on an idle machine."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of a gateway that runs, with its metrics on a port of their own."""
    path = tmp_path_factory.mktemp("served") / "gateway.yaml"
    path.write_text(
        f"server: {{host: 127.0.0.1, port: {free_port()}, metrics_port: {free_port()}}}\n"
        "upstreams: {sandbox: {kind: sandbox}}\n"
        "models: {gpt-image-2: {upstream: sandbox}}\n"
    )
    with GatewayProcess(path) as gateway:
        gateway.wait_ready()
        yield path


def written(folder: Path, text: str) -> Path:
    path = folder / "gateway.yaml"
    path.write_text(text)
    return path


def check(config: Path) -> subprocess.CompletedProcess[str]:
    """As HEALTHCHECK does it."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.healthcheck"],
        capture_output=True,
        text=True,
        timeout=30,
        env={**ENVIRONMENT, "GATEWAY_CONFIG": str(config)},
        check=False,
    )


def test_a_gateway_that_runs_is_well(say: Say, served: Path) -> None:
    port = listening(served, {}).metrics_port
    lives = say("health", "--config", served)
    assert lives.exit_code == 0, lives.output
    assert lives.stdout == f'http://127.0.0.1:{port}/healthz: 200 {{"status":"ok"}}\n'
    ready = say("health", "--ready", "--config", served)
    assert ready.exit_code == 0
    assert ready.stdout.startswith(f'http://127.0.0.1:{port}/readyz: 200 {{"status":"ready"')
    elsewhere = say("health", "--url", f"http://localhost:{listening(served, {}).port}/")
    assert elsewhere.exit_code == 0, elsewhere.output


def test_the_check_of_the_image_is_cheap(served: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    checked = check(served)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("\n") == 1
    assert checked.stdout.endswith('/healthz: 200 {"status":"ok"}\n')
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < CPU_SECONDS


def test_the_check_of_the_image_loads_no_framework() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, gateway.healthcheck; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=30,
        env=ENVIRONMENT,
        check=True,
    ).stdout.split()
    assert "gateway.settings" in loaded
    assert not {"click", "fastapi", "httpx", "redis", "psycopg", "structlog"} & set(loaded)


def test_where_nobody_listens_it_is_not(say: Say, tmp_path: Path) -> None:
    port = free_port()
    config = written(tmp_path, f"server: {{port: {port}}}\n")
    dead = say("health", "--config", config)
    assert dead.exit_code == 1
    assert dead.stdout == ""
    assert dead.stderr.startswith(f"http://127.0.0.1:{port}/healthz: no answer (")
    named = say("health", "--url", f"http://somebody:hush@127.0.0.1:{port}")
    assert (named.exit_code, named.stderr) == (1, dead.stderr)
    assert "refused" in dead.stderr
    checked = check(config)
    assert (checked.returncode, checked.stdout) == (1, dead.stderr)


def test_one_that_does_not_answer_is_given_up(say: Say) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hung = say("health", "--url", url, "--timeout", "0.2")
    assert hung.exit_code == 1
    assert hung.stderr == f"{url}/healthz: no answer (timed out)\n"


@pytest.mark.parametrize(
    ("answer", "lives", "ready"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull", 0, 1),
        (b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n", 1, 1),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", 1, 1),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 1, 1),
        (b"", 1, 1),
    ],
    ids=["no room", "broken", "another server", "not http", "closed"],
)
def test_what_is_said_decides(say: Say, answer: bytes, lives: int, ready: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        codes = say("health", "--url", url).exit_code, say("health", "--ready", "--url", url)
        thread.join()
    assert (codes[0], codes[1].exit_code) == (lives, ready)
    assert len(codes[1].output.splitlines()) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "unix:///run/gateway", "http://", ""])
def test_what_is_no_url_is_refused(say: Say, url: str) -> None:
    refused = say("health", "--url", url or " ")
    assert refused.exit_code == 2
    assert "is not a url like http://127.0.0.1:8080" in refused.stderr


@pytest.mark.parametrize(
    ("server", "environ", "url"),
    [
        ("{}", {}, "http://127.0.0.1:8080"),
        ("{port: 9000}", {}, "http://127.0.0.1:9000"),
        ("{port: 9000, metrics_port: 9001}", {}, "http://127.0.0.1:9001"),
        ("{port: 9000}", {"GATEWAY_SERVER__PORT": "9002"}, "http://127.0.0.1:9002"),
        ("{port: 9000}", {"GATEWAY_SERVER__METRICS_PORT": "9003"}, "http://127.0.0.1:9003"),
        ("{port: '${PORT:-9004}'}", {}, "http://127.0.0.1:9004"),
        ("{host: 10.1.2.3}", {}, "http://10.1.2.3:8080"),
        ("{host: localhost}", {}, "http://localhost:8080"),
        ("{host: '::'}", {}, "http://[::1]:8080"),
        ("{host: '::1', port: 9000}", {}, "http://[::1]:9000"),
    ],
)
def test_it_asks_where_the_gateway_listens(
    tmp_path: Path, server: str, environ: dict[str, str], url: str
) -> None:
    assert own_url(written(tmp_path, f"server: {server}\n"), environ) == url


@pytest.mark.parametrize(
    "rest",
    [
        "teams: {growth: {keys: ['${NOT_SET}']}}\n",
        "storage: {pepper: '${file:/gone}'}\n",
        "no_such_section: 1\n",
        "server: {port: 9000, workers: many, no_such_setting: 1}\n",
    ],
)
def test_what_is_wrong_elsewhere_does_not_matter(tmp_path: Path, rest: str) -> None:
    """A gateway that runs goes on with what it read before, so it must not be called dead."""
    server = "" if rest.startswith("server") else "server: {port: 9000}\n"
    assert listening(written(tmp_path, server + rest), {}).port == 9000


@pytest.mark.parametrize("text", ["server: [", "server: 9000\n", "[]\n", "server: {port: much}\n"])
def test_what_cannot_be_read_has_its_default(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert listening(path, {}) == Server()
    assert listening(tmp_path / "gone.yaml", {}) == Server()
    if "port" in text or text == "server: [":
        assert listening(path, {"GATEWAY_SERVER__PORT": "9000"}).port == 9000
