"""`config/compose.yaml` and what it mounts: as it should be, and at work on real servers.

Without the containers: their images cannot be fetched everywhere."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml
from openai import OpenAI

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import Settings, load
from tests.ops.containers import ROOT, absent
from tests.postgres import Postgres, run_postgres
from tests.processes import GatewayProcess, run
from tests.running import MODEL, TestClock
from tests.valkey import free_port, start_valkey

CONFIG = ROOT / "config"
TEXT = (CONFIG / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TOOLS = ROOT / ".tools" / "compose" / "bin"
PEPPER = "pepper-0123456789abcdef-0123456789"
GROWTH_KEY = "growth-key-of-compose-0123456789"


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The gateway's configuration, with secrets where Compose puts them."""
    secrets = tmp_path_factory.mktemp("secrets")
    for name in COMPOSE["secrets"]:
        (secrets / name).write_text(f"{name}-0123456789abcdef-0123456789\n")
    path = secrets / "gateway.yaml"
    path.write_text(there(secrets))
    return load(path, {})


def there(secrets: Path) -> str:
    return (CONFIG / "compose.gateway.yaml").read_text().replace("/run/secrets", str(secrets))


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def tool(name: str) -> Path:
    program = TOOLS / name
    if not program.exists():
        absent(f"no {name} in {TOOLS}: bash tests/ops/install.sh")
    return program


CHECK = """
import sys
from compose_spec import PyCompose
PyCompose.from_yaml(sys.stdin.read()).validate()
"""


def complaint(document: object) -> str:
    """What the Compose specification has against it; empty: nothing."""
    ended = subprocess.run(
        [tool("python"), "-c", CHECK],
        input=yaml.safe_dump(document),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ended.stderr.strip().rpartition("\n")[2]


@pytest.mark.image
def test_it_is_as_the_specification_wants_it() -> None:
    assert complaint(COMPOSE) == ""
    misspelt = yaml.safe_load(TEXT.replace("stop_grace_period: 650s", "stop_grace: 650s"))
    assert "stop_grace" in complaint(misspelt)
    unknown = yaml.safe_load(TEXT.replace("networks: [stores]", "networks: [shops]"))
    assert "shops" in complaint(unknown)


@pytest.mark.image
def test_podman_reads_it_too() -> None:
    read = subprocess.run(
        [tool("podman-compose"), "--file", "compose.yaml", "config", "--services"],
        cwd=CONFIG,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert read.returncode == 0, read.stderr
    assert set(read.stdout.split()) == set(SERVICES)


def test_every_image_has_a_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert re.match(r"v?\d+", tag), name
        if name in ("gateway", "migrate"):
            assert (image, tag) == ("image-gateway", version)
        else:
            assert image.startswith("docker.io/"), "podman asks which registry is meant"


def test_each_file_that_is_mounted_is_there() -> None:
    for one in COMPOSE["configs"].values():
        assert (CONFIG / one["file"]).is_file()
    assert SERVICES["gateway"]["build"] == {"context": ".."}
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("secrets/")
    # Nobody commits one by mistake, and none gets into the image.
    ignored = subprocess.run(
        ["git", "check-ignore", "config/secrets/pepper"], cwd=ROOT, capture_output=True, check=False
    )
    assert ignored.returncode == 0
    assert "!config/secrets" not in (ROOT / ".dockerignore").read_text()


def test_nothing_in_it_has_more_rights_than_it_needs() -> None:
    for name in ("gateway", "migrate"):
        service = SERVICES[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["tmpfs"] == ["/tmp"]
    for service in SERVICES.values():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "environment" not in service or not any(
            "PASSWORD" in name and not name.endswith("_FILE") for name in service["environment"]
        )
    for name in ("postgres", "limits", "pictures"):
        assert SERVICES[name]["networks"] == ["stores"]
        assert "ports" not in SERVICES[name]
    assert COMPOSE["networks"]["stores"] == {"internal": True}


def test_a_stop_gives_the_drain_its_time(valid: Settings) -> None:
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= valid.server.drain_seconds + 30


def test_what_it_depends_on_can_say_that_it_is_there() -> None:
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert SERVICES[other]["healthcheck"]["test"][0] == "CMD"
            else:
                assert SERVICES[other]["restart"] == "no"


def test_each_name_leads_to_its_service(valid: Settings) -> None:
    """Hosts, ports and secrets of the configuration are those of the services."""
    text = (CONFIG / "compose.gateway.yaml").read_text()
    hosts = set(re.findall(r"(?:@|redis://)(\w+)", text))
    assert hosts == {"postgres", "limits", "pictures"} <= set(SERVICES)
    assert set(re.findall(r"/run/secrets/(\w+)", text)) == set(SERVICES["gateway"]["secrets"])
    assert SERVICES["gateway"]["ports"] == [f"8080:{valid.server.port}"]
    prometheus = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    [looked_at] = prometheus["scrape_configs"][0]["dns_sd_configs"]
    assert looked_at["names"] == ["gateway"]
    assert looked_at["port"] == valid.server.metrics_port
    assert not valid.warnings


def test_prometheus_takes_its_file(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        absent("no promtool: apt-get install --no-install-recommends prometheus")
    rules = CONFIG / "../helm/gateway/rules"
    assert "../helm/gateway/rules:/etc/prometheus/rules:ro" in TEXT
    path = tmp_path / "prometheus.yml"
    text = (CONFIG / "prometheus.yml").read_text()
    path.write_text(replaced(text, {"/etc/prometheus/rules": str(rules.resolve())}))
    checked = subprocess.run(
        [promtool, "check", "config", path], capture_output=True, text=True, timeout=30, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert re.search(r"SUCCESS: \d+ rules found", checked.stdout), checked.stdout


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        yield server


def options(service: str) -> tuple[str, ...]:
    """How Compose starts a Valkey, for one of the tests."""
    program, *rest = SERVICES[service]["command"]
    assert program == "valkey-server"
    return tuple(rest)


def test_its_gateway_serves_on_real_servers(postgres: Postgres, tmp_path: Path) -> None:
    """The very file, but for where its servers are: the schema, a picture, the metrics, the
    health check, and a stop."""
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    url = postgres.empty_database()
    user, _, rest = url.removeprefix("postgresql://").partition(":")
    password, _, place = rest.partition("@")
    values = {
        "postgres_password": password,
        "pepper": PEPPER,
        "growth_key": GROWTH_KEY,
        "openai_api_key": "sk-test-0123456789",
    }
    for name, value in values.items():
        (secrets / name).write_text(f"{value}\n")
    config = tmp_path / "gateway.yaml"
    metrics_port = free_port()
    with (
        start_valkey(*options("limits")) as limits,
        start_valkey(*options("pictures")) as pictures,
        SandboxServer(TestClock()) as upstream,
    ):
        upstream.rules.add(Rule(payload_bytes=400))
        changes = {
            "gateway:${file": f"{user}:${{file",
            "@postgres/gateway": f"@{place}",
            "redis://limits:6379/0": limits,
            "redis://pictures:6379/0": pictures,
            "https://api.openai.com/v1": upstream.base_url,
            "metrics_port: 9091": f"host: 127.0.0.1\n  metrics_port: {metrics_port}",
        }
        config.write_text(replaced(there(secrets), changes))
        upgraded = run(*SERVICES["migrate"]["command"], "--config", str(config))
        assert upgraded.returncode == 0, upgraded.stderr
        with GatewayProcess(config, "--port", str(free_port())) as gateway:
            gateway.wait_ready()
            with OpenAI(base_url=gateway.base_url, api_key=GROWTH_KEY, max_retries=0) as client:
                made = client.images.generate(
                    model=MODEL, prompt="a lighthouse", size="1024x1024", quality="low"
                )
            assert made.data
            assert made.data[0].b64_json
            metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
            assert "gateway_requests_total" in metrics
            assert run("health", "--config", str(config)).returncode == 0
            with redis.Redis.from_url(pictures) as cache, redis.Redis.from_url(limits) as gate:
                assert cache.dbsize() > 0, "the picture is kept"
                assert gate.dbsize() > 0, "the limits are shared"
                assert cache.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"
                assert gate.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            gateway.terminate()
            assert gateway.wait() == 0


def test_the_commands_of_its_head_make_what_it_needs(tmp_path: Path) -> None:
    """Word for word, but for a provider's key; whatever the umask."""
    head = TEXT.partition("\nname:")[0]
    lines = re.findall(r"^#   (mkdir .*|for .*|echo .*|chmod .*)$", head, re.M)
    assert len(lines) == 4
    subprocess.run(
        ["bash", "-euc", "umask 077\n" + "\n".join(lines)], cwd=tmp_path, check=True, timeout=30
    )
    assert {path.name for path in (tmp_path / "secrets").iterdir()} == set(COMPOSE["secrets"])
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    for path in (tmp_path / "secrets").iterdir():
        assert path.stat().st_mode & stat.S_IROTH, "user 65532 can read it"
    config = tmp_path / "gateway.yaml"
    config.write_text(there(tmp_path / "secrets"))
    assert run("check", "--config", str(config)).returncode == 0
