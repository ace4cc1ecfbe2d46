"""The Dockerfile, built for real and run as an operator would run it (`make image`)."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.ops.containers import (
    BASE,
    CERTIFICATES,
    ROOT,
    STATE,
    Container,
    Store,
    absent,
    need_programs,
    pip_settings,
    run,
    volume,
)
from tests.processes import Books, wait_until
from tests.running import KEY, MODEL, TestClock
from tests.valkey import free_port, start_valkey

pytestmark = [pytest.mark.image, pytest.mark.timeout(600), pytest.mark.xdist_group("image")]

MAX_MB = 110
"""What the image may add to its base."""
PNG = "iVBORw0KGgo"
WRITABLE = """
import os, sys
found = []
for folder, inside, _ in os.walk("/"):
    if folder in ("/proc", "/sys", "/dev"):
        inside.clear()
        continue
    probe = os.path.join(folder, ".probe")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL))
        os.unlink(probe)
    except OSError:
        continue
    found.append(folder)
    inside.clear()
print(os.getuid(), os.getgid(), *found)
"""


@pytest.fixture(scope="module")
def store() -> Store:
    need_programs()
    folder = (ROOT / ".tools").resolve() / "image"
    folder.mkdir(parents=True, exist_ok=True)
    return Store(folder)


@pytest.fixture(scope="module")
def image(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    store.make_base()
    return store.build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock()) as running:
        yield running


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, upstream: SandboxServer) -> Path:
    """One model of a sandbox in the container, one of a sandbox out here that can be held."""
    path = tmp_path_factory.mktemp("config") / "gateway.yaml"
    document = {
        "upstreams": {
            "inside": {"kind": "sandbox"},
            "outside": {"kind": "openai", "base_url": upstream.base_url, "api_keys": ["sk-test"]},
        },
        "models": {
            MODEL: {"upstream": "inside"},
            "held": {"upstream": "outside", "model": MODEL},
        },
        "teams": {"growth": {"keys": [{"key": KEY, "name": "ci"}]}},
    }
    path.write_text(yaml.safe_dump(document))
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def kept(store: Store) -> Iterator[str]:
    with volume(store) as name:
        yield name


@pytest.fixture(scope="module")
def gateway(store: Store, image: str, config: Path, kept: str) -> Iterator[Container]:
    container = Container(store, image, port=free_port(), volume=kept, config=config)
    try:
        container.wait_ready()
        yield container
    finally:
        container.remove()


def sdk(gateway: Container) -> OpenAI:
    return OpenAI(base_url=f"{gateway.origin}/v1", api_key=KEY, max_retries=0, timeout=60)


def picture(gateway: Container, prompt: str, model: str = MODEL) -> str:
    with sdk(gateway) as client:
        made = client.images.generate(
            model=model, prompt=prompt, size="1024x1024", quality="low", output_format="png"
        )
    assert made.data
    assert made.data[0].b64_json is not None
    return made.data[0].b64_json


def test_hadolint_finds_nothing() -> None:
    hadolint = ROOT / ".tools" / "hadolint" / "bin" / "hadolint"
    if not hadolint.exists():
        absent("no hadolint: bash tests/ops/install.sh")
    said = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout) == (0, "")


def test_the_size_is_what_the_documents_say(store: Store, image: str) -> None:
    base, whole = (round(store.image_bytes(one) / 1e6) for one in (BASE, image))
    print(f"\nthe image: {whole} MB, of which {base} MB are its base")
    assert whole - base < MAX_MB
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(r"adds (\d+) MB to its base", readme)
    assert said is not None
    assert abs(int(said[1]) - (whole - base)) <= 5


def test_what_it_says_of_itself(store: Store, image: str) -> None:
    [told] = json.loads(store.podman("image", "inspect", image))
    config = told["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["gateway"]
    assert config["Cmd"] == ["serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8080/tcp"]
    assert list(config["Volumes"]) == [STATE]
    assert told["Healthcheck"]["Test"] == ["CMD", "python", "-m", "gateway.healthcheck"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]


def test_nothing_of_the_machine_that_built_it_is_inside(store: Store, image: str) -> None:
    told = store.podman("image", "inspect", image)
    told += store.podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    for word in ("index-url", "PIP_", "pypi", str(CERTIFICATES), *pip_settings().values()):
        assert word not in told
    inside = store.podman(
        *("run", "--rm", "--runtime", "runc", "--network", "none", "--read-only"),
        *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
        *("--health-interval", "disable", "--entrypoint", "python", image, "-c"),
        "import os, pathlib; print(*os.environ); "
        "print([p for p in ('/etc/pip.conf', '/build') if os.path.exists(p)]); "
        "print(*(p.name for p in pathlib.Path('/opt/gateway/lib').glob('*/site-packages/*-info')))",
    )
    names, left, packages = inside.splitlines()
    assert not re.search(r"PIP|INDEX|PROXY|CERT", names)
    assert left == "[]"
    assert "image_gateway-" in packages
    assert "opentelemetry_sdk-" in packages
    assert not re.search(r"\b(pip|hatchling|pytest|hypothesis)-", packages)


def test_it_is_well(gateway: Container) -> None:
    assert gateway.get("/readyz")[0] == 200
    assert gateway.healthy()
    said = gateway.say("gateway", "health", "--ready")
    assert said.startswith(f"{gateway.origin}/readyz: 200 ")


def test_it_is_nobody_and_writes_to_its_volume_and_tmp_alone(gateway: Container) -> None:
    who, group, *folders = gateway.say("python", "-c", WRITABLE).split()
    assert (who, group) == ("65532", "65532")
    assert sorted(folders) == ["/tmp", STATE]


def test_a_picture_comes_back_and_is_booked(gateway: Container) -> None:
    assert picture(gateway, "a lighthouse").startswith(PNG)
    usage = json.loads(gateway.say("gateway", "usage", "--json"))
    assert "growth" in json.dumps(usage)
    status, metrics = gateway.get("/metrics")
    assert status == 200
    [counted] = [
        line
        for line in metrics.splitlines()
        if line.startswith("gateway_requests_total{") and MODEL in line and 'team="growth"' in line
    ]
    assert counted.endswith(" 1.0")


def test_the_commands_are_inside(gateway: Container) -> None:
    assert "/etc/gateway/gateway.yaml: ok" in gateway.say("gateway", "check")
    made = gateway.say("gateway", "team", "create", "made-inside")
    assert "created in /etc/gateway/data/gateway.db" in made
    for command in ("health", "ledger"):
        assert "Usage: gateway" in gateway.say("gateway", command, "--help")


def test_a_stop_waits_for_the_picture_and_the_books_stay(
    gateway: Container, upstream: SandboxServer, store: Store, kept: str
) -> None:
    gate = Gate()
    upstream.rules.add(Rule(prompt="a slow lighthouse", wait_for=gate))
    came: list[str] = []
    asking = threading.Thread(
        target=lambda: came.append(picture(gateway, "a slow lighthouse", "held"))
    )
    asking.start()
    gate.wait_arrived()
    stopping = gateway.stopping()
    wait_until(lambda: "draining" in gateway.get("/readyz")[1], "it drains", 30)
    assert stopping.poll() is None
    gate.set()
    asking.join(60)
    assert came
    assert came[0].startswith(PNG)
    assert stopping.wait(60) == 0
    assert gateway.exit_code == 0

    folder = Path(store.podman("volume", "inspect", "--format", "{{.Mountpoint}}", kept).strip())
    books = Books.read(folder / "gateway.db")
    books.check()
    assert not books.open
    spent = books.spent
    assert spent > 0

    gateway.start()
    gateway.wait_ready()
    assert json.loads(gateway.say("gateway", "usage", "--json"))
    assert "made-inside" in gateway.say("gateway", "team", "list")
    with sdk(gateway) as client:
        again = client.images.with_raw_response.generate(
            model=MODEL, prompt="a lighthouse", size="1024x1024", quality="low", output_format="png"
        )
    assert again.headers["x-cache"] == "hit"
    assert Books.read(folder / "gateway.db").spent == spent


def started(stack: ExitStack, store: Store, image: str, *arguments: str, **more: Any) -> Container:
    container = Container(
        store,
        image,
        *arguments,
        port=free_port(),
        volume=stack.enter_context(volume(store)),
        **more,
    )
    stack.callback(container.remove)
    container.wait_ready()
    return container


def test_it_starts_with_nothing_set(store: Store, image: str) -> None:
    with ExitStack() as stack:
        bare = started(stack, store, image)
        assert bare.healthy()
        assert "nobody has a key yet" in bare.log
        bare.stop()
        assert bare.exit_code == 0


def test_a_platform_may_choose_the_user(store: Store, image: str, config: Path) -> None:
    """OpenShift gives each project a user of its own, in root's group."""
    with ExitStack() as stack:
        chosen = started(stack, store, image, config=config, options=["--user", "12345:0"])
        assert chosen.healthy()
        who, group, *folders = chosen.say("python", "-c", WRITABLE).split()
        assert (who, group) == ("12345", "0")
        assert sorted(folders) == ["/tmp", STATE]
        assert picture(chosen, "a lighthouse").startswith(PNG)


def test_several_workers_end_as_one(store: Store, image: str, config: Path) -> None:
    with ExitStack() as stack:
        redis = stack.enter_context(start_valkey())
        several = started(
            stack,
            store,
            image,
            *("serve", "--workers", "2"),
            config=config,
            environment={"GATEWAY_STORAGE__REDIS": redis},
        )
        assert picture(several, "a lighthouse").startswith(PNG)
        assert several.healthy()
        several.stop()
        assert several.exit_code == 0


def test_a_gateway_that_is_not_there_is_not_well(store: Store, image: str) -> None:
    with ExitStack() as stack:
        bare = started(stack, store, image)
        asked = ("env", "GATEWAY_SERVER__PORT=1", "python", "-m", "gateway.healthcheck")
        with pytest.raises(AssertionError, match="ended with 1"):
            bare.say(*asked)


def test_the_base_is_the_one_that_the_dockerfile_names() -> None:
    assert f"\nARG BASE={BASE}\n" in (ROOT / "Dockerfile").read_text()
    assert run("git", "check-ignore", ".tools").strip() == ".tools"
