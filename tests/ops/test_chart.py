"""The chart: what it renders is what the gateway needs, and mixes that cannot work are refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import yaml

from gateway.assembly import price_book
from gateway.cli import main
from gateway.doctor.machine import EACH_WORKER_BYTES
from gateway.domain.price import BySize
from gateway.domain.price_images import ImagePrice
from gateway.pricefile import ALWAYS
from gateway.reload import needs_restart
from gateway.secret import Secret
from gateway.settings import Settings, _Document, load
from tests.postgres import run_postgres
from tests.processes import GatewayProcess
from tests.processes import run as run_gateway
from tests.valkey import start_valkey

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "gateway"
TOOLS = ROOT / ".tools"
SETS = ("embedded", "distributed", "everything")
KUBERNETES = tuple(f"1.{minor}" for minor in range(30, 38))
RELEASE = "pictures"
NAME = f"{RELEASE}-gateway"
SECRETS = "/run/secrets/gateway"

CONTENTS = {
    "database": "postgresql://gateway:secret@postgres/gateway",
    "redis": "redis://redis:6379/0",
    "cache-redis": "rediss://cache:6379/0",
    "pepper": "0123456789abcdef" * 4,
    "old-pepper": "fedcba9876543210" * 4,
    "webhook-secret": "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
}
"""What is in the files of secrets; any other one is a key."""

Document = dict[str, Any]


def missing(what: str, remedy: str = "bash tests/ops/install.sh") -> NoReturn:
    """Loud on a machine of one's own, and a failure where CI has installed everything."""
    reason = f"{what} is missing: {remedy}"
    if os.environ.get("CI_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)


def helm_of(major: int) -> Path:
    path = TOOLS / "helm" / str(major) / "helm"
    return path if path.is_file() else missing(f"helm {major}")


def a_helm() -> Path:
    """The newest that is there."""
    for path in (TOOLS / "helm" / "4" / "helm", TOOLS / "helm" / "3" / "helm"):
        if path.is_file():
            return path
    found = shutil.which("helm")
    return Path(found) if found else missing("helm")


def run(helm: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [helm, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def template(
    helm: Path, *arguments: str | Path, chart: Path = CHART
) -> subprocess.CompletedProcess[str]:
    return run(helm, "template", RELEASE, chart, "--namespace", "prod", *arguments)


def values_of(values: str) -> Path:
    return CHART / "ci" / f"{values}-values.yaml"


def documents(helm: Path, *arguments: str | Path, chart: Path = CHART) -> list[Document]:
    done = template(helm, *arguments, chart=chart)
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def parsed(text: str) -> list[Document]:
    """In C, because dashboards are long."""
    return [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]


@cache
def rendered(values: str, *arguments: str) -> tuple[Document, ...]:
    return tuple(documents(a_helm(), "--values", values_of(values), *arguments))


def of_kind(found: tuple[Document, ...] | list[Document], kind: str) -> list[Document]:
    return [document for document in found if document["kind"] == kind]


def the(found: tuple[Document, ...] | list[Document], kind: str, name: str = NAME) -> Document:
    (document,) = (one for one in of_kind(found, kind) if one["metadata"]["name"] == name)
    return document


def is_hook(document: Document) -> bool:
    return "helm.sh/hook" in document["metadata"].get("annotations", {})


def pods(found: tuple[Document, ...]) -> Iterator[Document]:
    """Every pod, or the template of it."""
    for kind in ("Deployment", "Job"):
        for document in of_kind(found, kind):
            yield document["spec"]["template"]
    yield from of_kind(found, "Pod")


def gateways(found: tuple[Document, ...]) -> Iterator[Document]:
    """Those with a configuration: all but the one that only looks whether a gateway is there."""
    for pod in pods(found):
        if the_container(pod)["args"][0] != "health":
            yield pod


def the_container(pod: Document) -> Document:
    (container,) = pod["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def every_container(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), the_container(pod)]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


# What is refused


REFUSED = {
    "several gateways on SQLite": (["replicas=3"], "replicas", "SQLite"),
    "a scaled SQLite": (["autoscaling.enabled=true"], "autoscaling.enabled", "one gateway"),
    "a budget for the only gateway": (
        ["podDisruptionBudget.enabled=true"], "podDisruptionBudget.enabled", "only gateway"),
    "PostgreSQL for one": (["secrets.database.name=pg"], "secrets.database.name", "SQLite"),
    "workers without Redis": (["workers=2"], "secrets.redis.name", "limits through Redis"),
    "no database": (["mode=distributed", "secrets.database.name="],
        "secrets.database.name", "postgresql://"),
    "no Redis": (["mode=distributed", "secrets.redis.name="], "secrets.redis.name", "redis://"),
    "no pepper": (["mode=distributed", "secrets.pepper.name="],
        "secrets.pepper.name", "openssl rand"),
    "SQLite for several": (["mode=distributed", "config.storage.database=sqlite:///data/x.db"],
        "config.storage.database", "secrets.database"),
    "a claim for PostgreSQL": (["mode=distributed", "persistence.existingClaim=books"],
        "persistence.existingClaim", "of mode embedded"),
    "a Redis in the configuration": (["config.storage.redis=redis://h"],
        "config.storage.redis", "secrets.redis"),
    "a pepper in the configuration": (["config.storage.pepper=x"],
        "config.storage.pepper", "secrets.pepper"),
    "a cache in the configuration": (["config.cache.redis=redis://h"],
        "config.cache.redis", "secrets.cacheRedis"),
    "a port of one's own": (["config.server.port=80"], "config.server.port", "service.port"),
    "a drain in the configuration": (["config.server.drain_seconds=9"],
        "config.server.drain_seconds", "drainSeconds"),
    "prices in the configuration": (["config.prices.file=p.yaml"],
        "config.prices.file", "prices.list"),
    "no time to drain": (["terminationGracePeriodSeconds=690"],
        "terminationGracePeriodSeconds is 690", "are 710"),
    "a drain shorter than a call": (["drainSeconds=600", "config.upstreams.openai.timeouts."
        "total_seconds=630"], "drainSeconds is 600", "upstreams.openai.timeouts.total_seconds"),
    "a drain shorter than any call": (["drainSeconds=300"], "drainSeconds is 300", "600"),
    "a file that is not there": (
        ["config.upstreams.openai.api_keys[0]=${file:/run/secrets/gateway/nope}"],
        "/run/secrets/gateway/nope", "secrets.files"),
    "a variable that is not there": (["config.upstreams.openai.api_keys[0]=${OPENAI_API_KEY}"],
        "OPENAI_API_KEY", "better a file"),
    "a setting as a variable": (["extraEnv[0].name=GATEWAY_LOG__LEVEL"],
        "GATEWAY_LOG__LEVEL", "config"),
    "one file of two secrets": (
        ["secrets.pepper.name=p", "secrets.files[0].name=p", "secrets.files[0].key=k",
         "secrets.files[0].file=pepper"], "secrets.files", "pepper"),
    "an ingress for nobody": (["ingress.enabled=true"], "ingress", "hosts"),
    "a route for nobody": (["httpRoute.enabled=true"], "httpRoute", "hostnames"),
    "a route from nowhere": (["httpRoute.enabled=true", "httpRoute.hostnames[0]=a.example"],
        "httpRoute", "parentRefs"),
    "an account without a name": (["serviceAccount.create=false"], "serviceAccount", "named"),
    "replicas beside an autoscaler": (["mode=distributed", "autoscaling.enabled=true",
        "replicas=3"], "replicas", "autoscaling"),
    "more at least than at most": (["mode=distributed", "autoscaling.enabled=true",
        "autoscaling.minReplicas=20"], "autoscaling.minReplicas", "autoscaling.maxReplicas"),
    "a budget that stops every drain": (["mode=distributed", "podDisruptionBudget.minAvailable=2"],
        "podDisruptionBudget.minAvailable", "2 of 2"),
    "an unknown value": (["replicaCount=2"], "replicaCount", "not allowed"),
    "an unknown value inside": (["service.prot=80"], "prot", "not allowed"),
    "an unknown section": (["config.upstream.x=1"], "upstream", "not allowed"),
    "an unknown mode": (["mode=cluster"], "mode", "distributed"),
    "no bound of memory": (["resources.limits=null"], "resources", "limits"),
    "a shared volume for SQLite": (["persistence.accessMode=ReadWriteMany"],
        "accessMode", "ReadWriteOncePod"),
    "a liveness that kills too soon": (["probes.livenessSeconds=10"], "livenessSeconds", "30"),
    "a percentage that stops every drain": (["mode=distributed",
        "podDisruptionBudget.minAvailable=100%"], "podDisruptionBudget.minAvailable", "of 2"),
    "a percentage that is rounded up to all": (["mode=distributed",
        "podDisruptionBudget.minAvailable=51%"], "podDisruptionBudget.minAvailable", "of 2"),
    "nobody may go": (["mode=distributed", "podDisruptionBudget.maxUnavailable=0"],
        "podDisruptionBudget.maxUnavailable is 0", "drained"),
    "no share may go": (["mode=distributed", "podDisruptionBudget.maxUnavailable=0%"],
        "podDisruptionBudget.maxUnavailable is 0%", "drained"),
    "a budget that is no number": (["mode=distributed", "podDisruptionBudget.maxUnavailable=half"],
        "podDisruptionBudget.maxUnavailable", "pattern"),
    "a volume smaller than what is put on it": (["persistence.size=1Gi"],
        "persistence.size is 1Gi", "24576 MiB"),
    "a cache larger than its volume": (["config.cache.max_bytes=30GiB", "spool.size=512Mi"],
        "persistence.size is 32Gi", "config.cache.max_bytes 30720 MiB"),
    "results larger than their volume": (["config.cache.enabled=false",
        "config.results.max_bytes=107374182400"], "persistence.size", "102400 MiB"),
    "workers without memory": (["workers=8", "secrets.redis.name=r"],
        "resources.limits.memory is 1Gi", "1920 MiB"),
    "buffers without memory": (["config.server.buffer_bytes=8GiB"],
        "resources.limits.memory", "config.server.buffer_bytes 8192 MiB"),
    "no memory": (["resources.limits.memory=64Mi"], "resources.limits.memory is 64Mi", "352 MiB"),
    "an upstream behind a closed port": (["config.upstreams.mine.base_url=https://h.example:8443/v1"],
        "config.upstreams.mine.base_url", "8443"),
    "an upstream without TLS": (["config.upstreams.mine.base_url=http://h/v1"],
        "config.upstreams.mine.base_url", "port 80"),
    "a proxy behind a closed port": (["config.upstreams.mine.proxy=http://u:p@proxy:3128"],
        "config.upstreams.mine.proxy", "3128"),
    "a proxy of a variable": (["config.upstreams.mine.proxy=${HTTPS_PROXY}",
        "extraEnv[0].name=HTTPS_PROXY", "extraEnv[0].value=http://proxy:3128"],
        "config.upstreams.mine.proxy", "networkPolicy.upstreamPorts"),
    "a collector behind a closed port": (["config.tracing.otlp=http://otel:4318/v1/traces"],
        "config.tracing.otlp", "4318"),
    "a webhook behind a closed port": (["config.notify.webhook=https://hooks.example:9443/x"],
        "config.notify.webhook", "9443"),
    "a webhook of results behind a closed port": (["config.results.webhook=http://[::1]:81/x"],
        "config.results.webhook", "81"),
    "a scrape longer than its interval": (["serviceMonitor.scrapeTimeout=1m"],
        "serviceMonitor.scrapeTimeout (1m)", "serviceMonitor.interval (30s)"),
    "an alert that is not there": (["prometheusRule.disabled={GatewayDwon}"],
        "prometheusRule.disabled", "GatewayDwon"),
    "a label of the chart's": (["podLabels.app\\.kubernetes\\.io/component=web"],
        "podLabels", "app.kubernetes.io/component"),
    "an image with its tag": (["image.repository=registry.example.com/gateway:1.0"],
        "image.repository", "pattern"),
    "an image of capitals": (["image.repository=registry.example.com/Gateway"],
        "image.repository", "pattern"),
    "a name that no service can have": (["fullnameOverride=1e5"], "fullnameOverride", "pattern"),
    "time-outs that are none": (["config.upstreams.openai.timeouts=[]"], "timeouts", "object"),
    "an upstream that is a list": (["config.upstreams.openai[0]=x"],
        "config.upstreams.openai", "object"),
    "a time-out that is a table": (["config.upstreams.openai.timeouts.total_seconds.a=1"],
        "total_seconds", "number"),
    "a size that is a list": (["config.cache.max_bytes[0]=1"], "config.cache.max_bytes", "string"),
    "a variable without a name": (["extraEnv[0].value=x"], "extraEnv", "name"),
    "root": (["runAsUser=0"], "runAsUser", " 1\n"),
}  # fmt: skip
"""What is set beside what a distributed gateway needs (or not), and what the refusal names."""

NEEDED = ("database", "redis", "pepper")


def refusal(helm: Path, assignments: list[str]) -> str:
    arguments = []
    if "mode=distributed" in assignments:
        assignments = [f"secrets.{name}.name=there" for name in NEEDED] + assignments
    for assignment in assignments:
        arguments += ["--set", assignment]
    done = template(helm, *arguments)
    assert done.returncode != 0, f"rendered in spite of {assignments}"
    # Versions of helm write the place of a value in two ways.
    return re.sub(r"'/([a-zA-Z_/]+)'", lambda place: place[1].replace("/", "."), done.stderr)


@pytest.mark.parametrize("story", REFUSED)
def test_a_mix_that_cannot_work_is_refused_by_its_name(story: str) -> None:
    assignments, *words = REFUSED[story]
    told = refusal(a_helm(), assignments)
    for word in words:
        assert word in told, told
    assert not re.search(r"nil pointer|error calling|executing \"", told.replace(
        'executing "gateway.refusals" at <fail>: error calling fail', "")), told  # fmt: skip


def test_memory_is_counted_as_doctor_counts_it(tmp_path: Path) -> None:
    told = refusal(a_helm(), ["resources.limits.memory=64Mi"])
    assert f"about {EACH_WORKER_BYTES // 2**20} MiB" in told
    defaults = configured("embedded", tmp_path)
    wanted = defaults.server.buffer_bytes + EACH_WORKER_BYTES + defaults.cache.memory_bytes
    assert f"may want {wanted // 2**20} MiB" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upstreams: {openai: null}", ["openai", "null", "object"]),
        ("upstreams: {openai: {kind: openai, timeouts: null}}", ["timeouts", "null", "object"]),
        ("upstreams: {openai: {kind: openai, api_keys: key}}", ["api_keys", "string", "array"]),
        ("upstreams: [openai]", ["config.upstreams", "array", "object"]),
        ("server: []", ["config.server", "array", "object"]),
    ],
)
def test_what_is_empty_or_of_the_wrong_kind_is_named(
    text: str, words: list[str], tmp_path: Path
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(f"config: {{{text}}}")
    done = template(a_helm(), "--values", values)
    assert done.returncode != 0
    told = re.sub(r"'/([a-zA-Z_/]+)'", lambda place: place[1].replace("/", "."), done.stderr)
    for word in words:
        assert word in told, told
    assert "error calling" not in told


@pytest.mark.parametrize(
    "assignments",
    [
        ["persistence.size=24Gi"],
        ["persistence.size=1Gi", "persistence.existingClaim=books"],
        ["persistence.size=5Gi", "secrets.redis.name=r"],
        ["persistence.size=4Gi", "config.cache.enabled=false", "config.results.enabled=false"],
        ["resources.limits.memory=352Mi"],
        ["resources.limits.memory=0.4G"],
        ["resources.limits.memory=288Mi", "config.cache.enabled=false"],
        ["config.tracing.otlp=http://c:4318/v1", "networkPolicy.upstreamPorts={443,4318}"],
        ["config.tracing.otlp=http://c:4318/v1", "networkPolicy.enabled=false"],
        ["config.tracing.otlp=http://c:4318/v1", "networkPolicy.extraEgress[0].ports[0].port=4318"],
        ["image.repository=localhost:5000/a/image-gateway"],
        ["serviceMonitor.scrapeTimeout=30s"],
    ],
)
def test_a_mix_that_just_works_is_rendered(assignments: list[str]) -> None:
    arguments = [word for one in assignments for word in ("--set", one)]
    assert the(documents(a_helm(), *arguments), "Deployment")


def strings(document: object) -> Iterator[object]:
    """What Kubernetes takes as texts only: names, labels, annotations, images."""
    if isinstance(document, list):
        for item in document:
            yield from strings(item)
    elif isinstance(document, dict):
        for name, value in document.items():
            if name in ("labels", "annotations", "matchLabels", "selector") and isinstance(
                value, dict
            ):
                yield from (one for one in value.values() if not isinstance(one, dict | list))
            elif name in ("name", "claimName", "image", "serviceAccountName", "secretName"):
                yield value if not isinstance(value, dict) else ""
            yield from strings(value)


@pytest.mark.parametrize("release", ["123", "1e5", "0x10", "true", "null"])
def test_names_that_look_like_something_else_stay_texts(release: str) -> None:
    done = run(
        a_helm(), "template", release, CHART, "--namespace", "prod",
        "--values", values_of("everything"), "--set-string", "secrets.redis.name=0123",
        "--set-string", "settlements.existingClaim=0123", "--set-string", "priorityClassName=1",
        "--set", "serviceAccount.create=false", "--set-string", "serviceAccount.name=0123",
        "--set-string", "nameOverride=true", "--set-string", "ingress.className=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = parsed(done.stdout)
    for document in found:
        for text in strings(document):
            assert isinstance(text, str), (document["kind"], text)
        assert re.match("[a-z]", document["metadata"]["name"])
    (deployment,) = of_kind(found, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("0123", "1")
    assert deployment["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    claims = documents(a_helm(), "--set-string", "persistence.existingClaim=0123")
    (volume,) = (
        one for one in the(claims, "Deployment")["spec"]["template"]["spec"]["volumes"]
        if one["name"] == "data"
    )  # fmt: skip
    assert volume["persistentVolumeClaim"]["claimName"] == "0123"


def test_all_that_is_wrong_is_said_at_once() -> None:
    told = refusal(
        a_helm(), ["drainSeconds=60", "config.server.port=1", "extraEnv[0].name=GATEWAY_X"]
    )
    assert told.count("\n  - ") == 3, told


# What the gateway makes of it


def written(found: tuple[Document, ...], folder: Path, contents: Mapping[str, str]) -> Path:
    """The files that a pod sees, in a folder in place of its root; the configuration's path."""
    secrets = folder / "secrets"
    secrets.mkdir(exist_ok=True)
    volumes = the(found, "Deployment")["spec"]["template"]["spec"]["volumes"]
    for volume in volumes:
        for source in volume.get("projected", {}).get("sources", []):
            for item in source["secret"]["items"]:
                text = contents.get(item["path"], f"key-of-{item['path']}-0123456789")
                (secrets / item["path"]).write_text(f"{text}\n")
    for name, text in the(found, "ConfigMap")["data"].items():
        local = text.replace(f"{SECRETS}/", f"{secrets}/").replace("/etc/gateway/", f"{folder}/")
        (folder / name).write_text(local)
    return folder / "gateway.yaml"


def configured(values: str, folder: Path, *arguments: str) -> Settings:
    """The rendered configuration as the gateway of a pod reads it."""
    found = rendered(values, *arguments)
    container = the_container(the(found, "Deployment")["spec"]["template"])
    environ = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    assert environ.pop("GATEWAY_CONFIG") == "/etc/gateway/gateway.yaml"
    return load(written(found, folder, CONTENTS), environ)


def test_the_gateway_reads_what_the_embedded_chart_writes(tmp_path: Path) -> None:
    settings = configured("embedded", tmp_path)
    assert settings.warnings == ()
    assert settings.storage.database == Path("/var/lib/gateway/gateway.db")
    assert settings.storage.redis is None
    assert settings.storage.pepper is None
    assert settings.storage.blobs == Path("/var/lib/gateway/blobs")
    assert settings.ledger.spool == Path("/var/lib/gateway/settlements")
    assert (settings.server.workers, settings.server.replicas) == (1, 1)
    assert settings.upstreams["openai"].ready
    assert "gpt-image-2.5-flare" in settings.catalogue.models


def test_one_gateway_may_have_several_workers_with_a_redis(tmp_path: Path) -> None:
    settings = configured(
        "embedded", tmp_path, "--set", "workers=3", "--set", "secrets.redis.name=redis"
    )
    assert settings.warnings == ()
    assert settings.server.workers == 3
    assert isinstance(settings.storage.database, Path)


def test_the_gateway_reads_what_the_distributed_chart_writes(tmp_path: Path) -> None:
    settings = configured("distributed", tmp_path)
    assert settings.warnings == ()
    assert settings.storage.database == Secret(CONTENTS["database"])
    assert settings.storage.redis == Secret(CONTENTS["redis"])
    assert settings.storage.pepper == Secret(CONTENTS["pepper"])
    assert settings.server.replicas == 2
    assert [key.order for key in settings.upstreams["openai"].api_keys] == [1, 2]


def test_the_gateway_reads_what_the_chart_writes_with_everything(tmp_path: Path) -> None:
    settings = configured("everything", tmp_path)
    assert settings.warnings == ()
    assert settings.cache.redis == Secret(CONTENTS["cache-redis"])
    assert settings.cache.max_bytes == 5 * 1024**3
    assert settings.storage.old_peppers == (Secret(CONTENTS["old-pepper"]),)
    assert settings.ledger.spool == Path("/var/lib/settlements")
    assert settings.server.max_pixels == 100_000_000
    assert settings.server.spool_bytes == 512 * 1024**2
    assert (settings.server.workers, settings.server.replicas) == (2, 12), "as many as may be"
    assert settings.server.drain_seconds == 720
    assert settings.upstreams["openai"].timeouts.connect_seconds == 2.5
    assert settings.upstreams["openai"].proxy == Secret("http://proxy.example.com:3128")
    prices = price_book(settings).of("azure", settings.upstreams["azure"].prices, ALWAYS)
    for model, nanousd in (("dep-1", 50_000_000), ("dep-2", 50_000)):  # helm writes 5e-05
        row = prices.find(model)
        assert row is not None
        assert row.price == ImagePrice(BySize({"default": {"any": nanousd}}))
    assert settings.notify.secret == Secret(CONTENTS["webhook-secret"])
    (key,) = settings.declared_keys
    assert key.expires is not None
    assert key.expires.year == 2027
    growth = settings.teams["growth"].limits
    assert (growth.budget_day, growth.max_cost_per_request) == (5_000_000_000, 250_000_000)
    assert growth.budget_month == 1_250_000_500_000_000


def test_a_price_list_of_ones_own_is_read_as_it_was_written(tmp_path: Path) -> None:
    shipped = ROOT / "config" / "prices.yaml"
    found = documents(a_helm(), "--set-file", f"prices.list={shipped}")
    data = the(found, "ConfigMap")["data"]
    assert data["prices.yaml"] == shipped.read_text()
    assert yaml.safe_load(data["gateway.yaml"])["prices"]["file"] == "/etc/gateway/prices.yaml"


def test_the_migration_reads_what_the_gateway_reads() -> None:
    for values in ("distributed", "everything"):
        found = rendered(values)
        job = the(found, "Job", f"{NAME}-migration")
        assert the(found, "ConfigMap", f"{NAME}-migration")["data"] == (
            the(found, "ConfigMap")["data"])  # fmt: skip
        volumes = {one["name"]: one for one in job["spec"]["template"]["spec"]["volumes"]}
        pod = the(found, "Deployment")["spec"]["template"]["spec"]
        of_gateway = {one["name"]: one for one in pod["volumes"]}
        assert volumes["secrets"] == of_gateway["secrets"]
        assert volumes["config"]["configMap"]["name"] == f"{NAME}-migration"
        pod_of_job = job["spec"]["template"]
        assert [one["args"] for one in every_container(pod_of_job)] == [
            ["check"],
            ["db", "upgrade"],
        ]


def test_what_the_migration_needs_is_there_before_it() -> None:
    """The release's own objects come only after its hooks; what of it the job named would hang."""
    found = rendered("everything")
    hooks = [one for one in found if is_hook(one) and one["kind"] != "Pod"]
    weights = {
        (document["kind"], document["metadata"]["name"]): int(
            document["metadata"]["annotations"]["helm.sh/hook-weight"]
        )
        for document in hooks
    }
    ours = {(one["kind"], one["metadata"]["name"]) for one in found if not is_hook(one)}
    (job,) = of_kind(hooks, "Job")
    pod = job["spec"]["template"]["spec"]
    assert "serviceAccountName" not in pod
    for volume in pod["volumes"]:
        named = volume.get("configMap", {}).get("name")
        assert ("ConfigMap", named) not in ours
        if named and named.startswith(NAME):
            assert weights["ConfigMap", named] < weights["Job", f"{NAME}-migration"]
    for document in hooks:
        assert document["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    (policy,) = of_kind(hooks, "NetworkPolicy")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert selects(policy["spec"]["podSelector"]["matchLabels"], labels)
    named_account = rendered(
        "everything", "--set", "serviceAccount.create=false", "--set", "serviceAccount.name=mine"
    )
    for template_ in gateways(named_account):
        assert template_["spec"]["serviceAccountName"] == "mine"
    assert not of_kind(rendered("embedded", "--set", "check.enabled=false"), "Job")
    only = rendered("distributed", "--set", "check.enabled=false")
    (container,) = every_container(the(only, "Job", f"{NAME}-migration")["spec"]["template"])
    assert container["args"] == ["db", "upgrade"]


@pytest.mark.parametrize(
    ("values", "arguments"),
    [("embedded", ()), ("distributed", ("--set", "migration.enabled=false"))],
)
def test_a_configuration_is_read_before_the_old_pod_ends(
    values: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """The hook's own command, on what is rendered for it: it ends well, or with the mistake."""

    def hook(*more: str) -> subprocess.CompletedProcess[str]:
        found = rendered(values, *arguments, *more)
        (job,) = of_kind(found, "Job")
        config = the(found, "ConfigMap", f"{NAME}-check")
        assert is_hook(job)
        assert is_hook(config)
        assert config["data"] == the(found, "ConfigMap")["data"]
        pod = job["spec"]["template"]
        assert not [one for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
        (container,) = every_container(pod)
        (rule,) = job["spec"]["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob", "the same mistake four times helps nobody"
        assert rule["onExitCodes"]["containerName"] == container["name"]
        path = written(found, tmp_path, CONTENTS)
        return run_gateway(*container["args"], "--config", str(path))

    good = hook()
    assert (good.returncode, good.stderr) == (0, "")
    typo = hook("--set", "config.server.prot=1")
    assert typo.returncode == 2
    assert 'server.prot: unknown key; did you mean "port"?' in typo.stderr


# What runs


@pytest.mark.parametrize("values", SETS)
def test_every_container_is_locked_down(values: str) -> None:
    found = list(pods(rendered(values)))
    assert len(found) >= 2
    for pod, container in [(each, one) for each in found for one in every_container(each)]:
        spec = pod["spec"]
        security = dict(spec["securityContext"])
        assert security.pop("fsGroupChangePolicy") == "OnRootMismatch"
        assert security == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        assert container["resources"]["limits"]["memory"]
        for volume in spec.get("volumes", []):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]
        for account in of_kind(rendered(values), "ServiceAccount"):
            assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize("values", SETS)
def test_secrets_are_files_and_nothing_of_them_is_rendered(values: str) -> None:
    found = rendered(values)
    assert not of_kind(found, "Secret")
    for pod, container in [
        (each, one) for each in gateways(found) for one in every_container(each)
    ]:
        assert not [one for one in container["env"] if "valueFrom" in one]
        assert "envFrom" not in container
        (volume,) = (one for one in pod["spec"]["volumes"] if one["name"] == "secrets")
        assert volume["projected"]["defaultMode"] == 0o440
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "secrets")
        assert (mount["mountPath"], mount["readOnly"]) == (SECRETS, True)
        # A subPath would never see a secret that has changed.
        assert not [one for one in container["volumeMounts"] if "subPath" in one]
    config = the(found, "ConfigMap")["data"]["gateway.yaml"]
    paths = {
        item["path"]
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    assert set(re.findall(rf"\$\{{file:{SECRETS}/([^}}]+)\}}", config)) == paths


def test_a_platform_that_chooses_the_user_may() -> None:
    found = rendered("embedded", "--set", "runAsUser=null")
    for pod in pods(found):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert not {"runAsUser", "fsGroup"} & pod["spec"]["securityContext"].keys()


@pytest.mark.parametrize("values", SETS)
def test_a_pod_has_the_time_to_drain(values: str) -> None:
    found = rendered(values)
    pod = the(found, "Deployment")["spec"]["template"]["spec"]
    server = yaml.safe_load(the(found, "ConfigMap")["data"]["gateway.yaml"])["server"]
    (container,) = pod["containers"]
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod["terminationGracePeriodSeconds"]
    assert grace >= pre_stop + server["drain_seconds"] + 30
    assert server["drain_seconds"] >= 610
    # Else helm and Kubernetes call a pod stuck that only finishes its calls.
    assert the(found, "Deployment")["spec"]["progressDeadlineSeconds"] > grace


@pytest.mark.parametrize("values", SETS)
def test_the_probes_ask_where_connections_are_not_counted(values: str) -> None:
    found = rendered(values)
    container = the_container(the(found, "Deployment")["spec"]["template"])
    server = yaml.safe_load(the(found, "ConfigMap")["data"]["gateway.yaml"])["server"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": server["port"], "metrics": server["metrics_port"]}
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"metrics"}
    assert probes["liveness"]["httpGet"]["path"] == "/healthz"
    assert probes["readiness"]["httpGet"]["path"] == "/readyz"
    assert probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"] >= 30


def test_one_gateway_goes_before_the_next_one_comes() -> None:
    found = rendered("embedded")
    spec = the(found, "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    claim = the(found, "PersistentVolumeClaim", f"{NAME}-data")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    volumes = {one["name"]: one for one in spec["template"]["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == f"{NAME}-data"
    assert not of_kind(found, "PodDisruptionBudget")
    assert not of_kind(found, "HorizontalPodAutoscaler")
    own = rendered("embedded", "--set", "persistence.existingClaim=books")
    assert not of_kind(own, "PersistentVolumeClaim")


def test_several_gateways_are_replaced_without_a_gap() -> None:
    found = rendered("distributed")
    spec = the(found, "Deployment")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert the(found, "PodDisruptionBudget")["spec"]["minAvailable"] == 1
    assert not of_kind(found, "PersistentVolumeClaim")
    alone = rendered("distributed", "--set", "replicas=1")
    assert not of_kind(alone, "PodDisruptionBudget"), "it would keep the only one on its node"


def test_the_autoscaler_decides_alone() -> None:
    found = rendered("everything")
    assert "replicas" not in the(found, "Deployment")["spec"]
    spec = the(found, "HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == NAME
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 12)
    assert spec["metrics"][0]["pods"]["metric"]["name"] == "gateway_inflight_requests"
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600


def test_the_image_is_of_the_chart_s_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    for pod in pods(rendered("distributed")):
        assert the_container(pod)["image"] == (
            f"registry.example.com/image-gateway:{project['version']}"
        )
    for pod in pods(rendered("everything")):
        assert "@sha256:0123" in the_container(pod)["image"]


@pytest.mark.parametrize(
    ("assignment", "setting"),
    [
        ("config.models.other.upstream=openai", None),
        ("config.relay.attempts=3", None),
        ("config.teams.art.disabled=true", None),
        ("config.notify.budget_percent=70", None),
        ("config.cache.ttl=1h", None),
        ("config.cache.scope=key", None),
        ("prices.rows[0].upstream=openai,prices.rows[0].model=a,prices.rows[0].per_image=1", None),
        ("secrets.pepper.name=p", None),
        ("config.log.level=debug", "log.level"),
        ("config.cache.max_bytes=1GiB", "cache.max_bytes"),
        ("config.results.ttl=1h", "results.ttl"),
        ("config.storage.without_redis=deny", "storage.without_redis"),
        ("spool.size=1Gi", "server.spool_bytes"),
        ("secrets.redis.name=r", "storage.redis"),
    ],
)
def test_pods_are_replaced_only_for_what_a_gateway_cannot_take_over(
    assignment: str, setting: str | None, tmp_path: Path
) -> None:
    """The gateway's own word for it is what its log says needs a restart."""

    def checksum(*arguments: str) -> str:
        pod = the(rendered("embedded", *arguments), "Deployment")["spec"]["template"]
        found = pod["metadata"]["annotations"]["gateway/restart-checksum"]
        assert isinstance(found, str)
        return found

    before = configured("embedded", tmp_path)
    after = configured("embedded", tmp_path, "--set", assignment)
    assert needs_restart(before, after) == ([setting] if setting else [])
    assert (checksum("--set", assignment) != checksum()) is (setting is not None)


@pytest.mark.parametrize("values", SETS)
def test_what_selects_finds_its_pods(values: str) -> None:
    found = rendered(values)
    deployment = the(found, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert selects(deployment["spec"]["selector"]["matchLabels"], labels)
    services = of_kind(found, "Service")
    assert len(services) == 2
    ports = {port["name"] for port in the_container(deployment["spec"]["template"])["ports"]}
    for service in services:
        assert selects(service["spec"]["selector"], labels)
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert selects(the(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"], labels)
    for budget in of_kind(found, "PodDisruptionBudget"):
        assert selects(budget["spec"]["selector"]["matchLabels"], labels)
    for pod in pods(found):
        served = selects(services[0]["spec"]["selector"], pod["metadata"]["labels"])
        assert served == (the_container(pod)["args"] == ["serve"]), "others would get requests"
    for monitor in of_kind(found, "ServiceMonitor"):
        matched = [
            service["metadata"]["name"]
            for service in services
            if selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
        ]
        assert matched == [f"{NAME}-metrics"]


@pytest.mark.parametrize("values", SETS)
def test_every_mount_has_its_volume_and_every_volume_its_mount(values: str) -> None:
    containers = [(pod, one) for pod in gateways(rendered(values)) for one in every_container(pod)]
    for pod, container in containers:
        mounts = container["volumeMounts"]
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        assert sorted(mount["name"] for mount in mounts) == sorted(volumes)
        paths = [mount["mountPath"] for mount in mounts]
        assert len(set(paths)) == len(paths)


def test_only_what_is_needed_may_go_out_and_never_to_a_cloud_s_metadata() -> None:
    for values in SETS:
        for policy in of_kind(rendered(values), "NetworkPolicy"):
            assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
            for rule in policy["spec"]["egress"]:
                if "to" not in rule:
                    assert {port["port"] for port in rule["ports"]} == {53}
                for peer in rule.get("to", []):
                    if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                        assert "169.254.0.0/16" in peer["ipBlock"]["except"]
    ports = {
        port["port"]
        for rule in the(rendered("embedded"), "NetworkPolicy")["spec"]["egress"]
        for port in rule["ports"]
    }
    assert ports == {53, 443}


def test_the_pod_of_helm_test_may_ask_the_gateway() -> None:
    found = rendered("everything")
    (test,) = (one for one in of_kind(found, "Pod") if is_hook(one))
    callers = the(found, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert callers[0] == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}
    }
    assert selects(callers[1]["podSelector"]["matchLabels"], test["metadata"]["labels"])
    everybody = the(rendered("embedded"), "NetworkPolicy")["spec"]["ingress"][0]
    assert "from" not in everybody


@pytest.mark.parametrize(
    ("url", "inside"),
    [
        ("https://images.example.com/v1", False),
        ("https://vllm/v1", True),
        ("https://vllm.models.svc/v1", True),
        ("https://vllm.models.svc.cluster.local:443/v1", True),
    ],
)
def test_pods_are_reached_where_an_upstream_is_a_service_of_the_cluster(
    url: str, inside: bool
) -> None:
    found = rendered("embedded", "--set", f"config.upstreams.openai.base_url={url}")
    _, upstreams = the(found, "NetworkPolicy")["spec"]["egress"]
    assert ({"namespaceSelector": {}} in upstreams["to"]) is inside


def test_a_pod_asks_for_the_disk_that_it_may_use() -> None:
    def requests(values: str, *arguments: str) -> Document:
        found = rendered(values, *arguments)
        container = the_container(the(found, "Deployment")["spec"]["template"])
        asked = container["resources"]["requests"]
        assert isinstance(asked, dict)
        return asked

    assert requests("embedded")["ephemeral-storage"] == "256Mi"
    assert requests("distributed")["ephemeral-storage"] == "5440Mi", "5 GiB, 256 MiB and 64 MiB"
    assert requests("everything")["ephemeral-storage"] == "1Gi", "the operator's own"
    bounded = requests("distributed", "--set", "resources.limits.ephemeral-storage=8Gi")
    assert "ephemeral-storage" not in bounded, "Kubernetes takes the limit"


def test_proxies_on_the_way_wait_longer_than_a_picture() -> None:
    found = rendered("everything")
    annotations = the(found, "Ingress")["metadata"]["annotations"]
    nginx = {
        name.removeprefix("nginx.ingress.kubernetes.io/"): value
        for name, value in annotations.items()
    }
    example = (ROOT / "config" / "nginx.conf").read_text()
    for directive in ("connect_timeout", "read_timeout", "send_timeout", "buffering",
                      "request_buffering", "next_upstream", "http_version"):  # fmt: skip
        (wanted,) = re.findall(rf"proxy_{directive} ([^;]+);", example)
        assert nginx[f"proxy-{directive.replace('_', '-')}"] == wanted.removesuffix("s"), directive
    assert nginx["proxy-body-size"] == "300m", "the operator's own goes before"
    (rule,) = the(found, "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert rule["backendRefs"] == [{"name": NAME, "port": 8080}]
    assert "retry" not in rule


# What is watched


RULES = """
groups:
  - name: gateway
    interval: 30s
    rules:
      - record: gateway:spend:rate5m
        expr: sum by (team) (rate(gateway_spend_usd_total[5m]))
      - alert: GatewayDown
        expr: up == 0
        for: 5m
        labels: {severity: critical}
        annotations:
          summary: "{{ $labels.instance }} is gone for {{ $value | humanizeDuration }}"
          runbook_url: gateway/docs/runbooks.md#gatewaydown
      - alert: GatewayNoisy
        expr: vector(1)
        annotations: {summary: noisy, runbook_url: gateway/docs/runbooks.md#gatewaynoisy}
"""


def test_rules_come_through_as_they_are_written(tmp_path: Path) -> None:
    """Prometheus' own templates are not helm's."""
    chart = tmp_path / "gateway"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("rules"))
    (chart / "rules").mkdir()
    (chart / "rules" / "one.yaml").write_text(RULES)

    def groups(*assignments: str) -> list[Document]:
        arguments = ["--set", "prometheusRule.enabled=true"]
        for assignment in assignments:
            arguments += ["--set", assignment]
        found = documents(a_helm(), *arguments, chart=chart)
        spec = the(found, "PrometheusRule")["spec"]
        assert spec.keys() == {"groups"}
        return list(spec["groups"])

    plain = yaml.safe_load(RULES)["groups"]
    (group,) = groups()
    assert [rule.get("alert") for rule in group["rules"]] == [None, "GatewayDown", "GatewayNoisy"]
    assert group["interval"] == "30s"
    assert group["rules"][1]["annotations"] == plain[0]["rules"][1]["annotations"]
    (group,) = groups(
        "prometheusRule.runbooksUrl=https://git.example.com/main/",
        "prometheusRule.alertLabels.team=platform",
        "prometheusRule.disabled={GatewayNoisy}",
    )
    record, alert = group["rules"]
    assert record == plain[0]["rules"][0]
    assert alert["labels"] == {"severity": "critical", "team": "platform"}
    assert alert["annotations"]["runbook_url"] == (
        "https://git.example.com/main/gateway/docs/runbooks.md#gatewaydown"
    )


def test_every_dashboard_is_a_config_map_that_grafana_finds() -> None:
    found = rendered("everything")
    dashboards = sorted((CHART / "dashboards").glob("*.json"))
    for path in dashboards:
        document = the(found, "ConfigMap", f"{NAME}-{path.stem}")
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        # The links to the runbooks lead to where the operator's clone can be read.
        clone = '"https://git.example.com/gateway/blob/main/gateway/docs/'
        text = path.read_text().replace('"gateway/docs/', clone)
        assert clone in text
        assert document["data"] == {path.name: text}
    endpoint = the(found, "ServiceMonitor")["spec"]["endpoints"][0]
    # The operator adds a label `endpoint`, which would hide the gateway's.
    assert endpoint["honorLabels"] is True
    for document in of_kind(found, "ConfigMap"):
        assert len(json.dumps(document)) < 1024 * 1024, "Kubernetes takes no more"


# What is written about it


def leaves(values: object, path: str = "") -> Iterator[str]:
    yield path
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}" if path else name)


def schema_leaves(schema: Document, path: str = "") -> Iterator[str]:
    yield path
    for name, value in schema.get("properties", {}).items():
        yield from schema_leaves(value, f"{path}.{name}" if path else name)


def test_the_schema_knows_every_value_and_no_other() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    sections = {field.name for field in fields(_Document)}
    assert schema["properties"]["config"]["properties"].keys() == sections
    inside = re.compile(r"config\.|global|resources\.claims|.*\.resources\.|resources\.")
    named = {path for path in schema_leaves(schema) if not inside.match(path)}
    assert named == {path for path in leaves(values) if not inside.match(path)}

    def strict(below: Document, path: str) -> None:
        # What the gateway and Kubernetes themselves read further.
        if path.startswith((".config.", ".resources.limits")):
            return
        if "properties" in below:
            assert below["additionalProperties"] is False, path
            for name, value in below["properties"].items():
                strict(value, f"{path}.{name}")

    strict(schema, "")


def test_the_chart_s_readme_names_values_that_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = set(leaves(values)) - {""}
    text = (CHART / "README.md").read_text()
    named = {
        name
        for name in re.findall(r"`([a-z][A-Za-z]*(?:\.[A-Za-z]+)+)`", text)
        if name.split(".")[0] in values
    }
    assert named
    assert named - {name for name in named if name.startswith("config.")} <= known
    for line in re.findall(r"--set ([A-Za-z.]+)=", text):
        assert line in known


def test_the_chart_s_readme_installs_what_lacks_nothing(tmp_path: Path) -> None:
    helm = TOOLS / "helm" / "4" / "helm"
    if not helm.is_file():
        missing("helm 4")
    text = (CHART / "README.md").read_text()
    first, second = re.findall(r"```console\n(.*?)```", text, re.DOTALL)[:2]
    values = tmp_path / "values.yaml"
    for block, more in ((first, ""), (second, "mode: distributed\n")):
        before, _, command = block.partition("$ helm install ")
        if not more:
            values.write_text(before.partition("$ cat > values.yaml\n")[2])
        else:
            values.write_text(values.read_text() + more)
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:2] == [RELEASE, "helm/gateway"]
        assert words[words.index("--timeout") + 1] == "20m"
        sets = [word for word in words if word.startswith("secrets.")]
        created = re.findall(r"create secret generic (\S+)", block)
        assert {one.partition("=")[2] for one in sets} <= set(created)
        arguments = [word for one in sets for word in ("--set", one)]
        done = run(helm, "install", RELEASE, CHART, "--dry-run=client", "--values", values,
                   *arguments)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "MISSING" not in done.stdout


def test_the_notes_name_commands_that_exist() -> None:
    helm = TOOLS / "helm" / "4" / "helm"
    if not helm.is_file():
        missing("helm 4")  # that of 3 asks a cluster
    for values in SETS:
        done = run(helm, "install", RELEASE, CHART, "--namespace", "prod", "--dry-run=client",
                   "--values", values_of(values))  # fmt: skip
        assert done.returncode == 0, done.stderr
        notes = done.stdout.partition("NOTES:")[2]
        assert "MISSING" not in notes, notes
        commands = re.findall(rf"exec deploy/{NAME} -- gateway (.+)", notes)
        assert len(commands) >= 2
        for line in commands:
            words = shlex.split(line)
            command, rest = main.commands[words[0]], words[1:]
            if isinstance(command, click.Group):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(words[0], rest, **main.context_settings)
    done = run(helm, "install", RELEASE, CHART, "--dry-run=client")
    assert "MISSING: config.models is empty" in done.stdout
    distributed = ("install", RELEASE, CHART, "--dry-run=client", "--values",
                   values_of("distributed"), "--set", "secrets.cacheRedis.name=")  # fmt: skip
    assert "MISSING: secrets.cacheRedis" in run(helm, *distributed).stdout
    off = ("--set", "config.cache.enabled=false", "--set", "config.results.enabled=false")
    assert "MISSING" not in run(helm, *distributed, *off).stdout


# Everything, with every helm and every Kubernetes


VALIDATE = """
import functools, json, sys
from kubernetes_validate import utils

utils.schema_contents = functools.cache(utils.schema_contents)
given = json.load(sys.stdin)
for version in given["versions"]:
    for document in given["documents"]:
        name = document["kind"] + "/" + document["metadata"]["name"]
        try:
            found = utils.validate(document, version, strict=True)
            print(json.dumps([version, name, found, None]))
        except utils.SchemaNotFoundError:
            print(json.dumps([version, name, None, "no schema"]))
        except utils.ValidationError as error:
            place = ".".join(map(str, error.path))
            print(json.dumps([version, name, error.version, place + ": " + error.message]))
"""

CUSTOM = {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}
"""Kinds that Kubernetes itself has no schema for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    version: str
    name: str
    against: str | None
    objection: str | None


def verdicts(found: list[Document], versions: tuple[str, ...]) -> list[Verdict]:
    python = TOOLS / "kubernetes-validate" / "bin" / "python"
    if not python.is_file():
        missing("kubernetes-validate")
    done = subprocess.run(
        [python, "-c", VALIDATE],
        input=json.dumps({"versions": versions, "documents": found}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Verdict(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.chart
@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("values", SETS)
def test_every_kubernetes_takes_what_every_helm_renders(values: str, major: int) -> None:
    helm = helm_of(major)
    done = run(helm, "lint", "--strict", CHART, "--values", values_of(values))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    texts = set()
    for version in KUBERNETES:
        done = template(helm, "--values", values_of(values), "--kube-version", version)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    (text,) = texts  # it does not depend on the version
    found = parsed(text)
    told = verdicts(found, KUBERNETES)
    assert len(told) == len(found) * len(KUBERNETES)
    for verdict in told:
        if verdict.name.partition("/")[0] in CUSTOM:
            assert verdict.objection == "no schema"
        else:
            assert (verdict.against, verdict.objection) == (verdict.version, None), verdict


@pytest.mark.chart
def test_the_check_itself_sees_a_misspelt_field() -> None:
    (deployment,) = of_kind(documents(helm_of(4)), "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 1
    for verdict in verdicts([deployment], KUBERNETES):
        assert verdict.objection is not None
        assert "terminationGracePeriodSecond" in verdict.objection


@pytest.mark.chart
def test_the_older_helm_refuses_alike() -> None:
    helm = helm_of(3)
    for assignments, *words in REFUSED.values():
        told = refusal(helm, assignments)
        assert all(word in told for word in words), told


@pytest.mark.chart
@pytest.mark.parametrize("values", SETS)
def test_both_helms_render_the_same(values: str) -> None:
    def ordered(major: int) -> list[Document]:
        found = documents(helm_of(major), "--values", values_of(values))
        return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))

    assert ordered(3) == ordered(4)


@pytest.mark.chart
def test_prometheus_takes_the_rules_that_are_rendered(tmp_path: Path) -> None:
    promtool = shutil.which("promtool") or missing("promtool", "apt-get install prometheus")
    spec = the(rendered("everything"), "PrometheusRule")["spec"]
    assert spec["groups"], "helm/gateway/rules has none"
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(spec))
    done = subprocess.run(
        [promtool, "check", "rules", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for group in spec["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["runbook_url"].startswith(
                    "https://git.example.com/gateway/blob/main/gateway/docs/runbooks.md#"
                )
                assert rule["labels"]["team"] == "platform"


@pytest.mark.chart
def test_a_release_of_several_starts_on_an_empty_database(tmp_path: Path) -> None:
    """The hook, and then two gateways, on a real PostgreSQL and a real Valkey."""
    found = rendered("distributed")
    with run_postgres() as postgres, start_valkey() as redis:
        contents = {**CONTENTS, "database": postgres.empty_database(), "redis": redis}
        folders = [tmp_path / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir()
            config = written(found, folder, contents)
            text = config.read_text().replace("/var/lib/", f"{folder}/")
            config.write_text(text.replace("metrics_port: 9090", "metrics_port: 0"))
        one, two = (folder / "gateway.yaml" for folder in folders)
        job = the(found, "Job", f"{NAME}-migration")
        done = run_gateway(*the_container(job["spec"]["template"])["args"], "--config", str(one))
        assert (done.returncode, done.stderr) == (0, "")
        with (
            GatewayProcess(one, "--port", "0") as first,
            GatewayProcess(two, "--port", "0") as other,
        ):
            first.wait_ready()
            other.wait_ready()
            other.terminate()
            assert other.wait() == 0
            assert first.is_ready()


@pytest.mark.chart
def test_what_has_no_schema_here_has_the_form_of_its_kind() -> None:
    """The names that the operators of these kinds know, from their reference."""
    found = rendered("everything")
    monitor = the(found, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() <= {"jobLabel", "selector", "endpoints", "namespaceSelector"}
    for endpoint in monitor["spec"]["endpoints"]:
        assert endpoint.keys() <= {
            "port", "path", "honorLabels", "interval", "scrapeTimeout", "relabelings",
            "metricRelabelings",
        }  # fmt: skip
    route = the(found, "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"].keys() == {"parentRefs", "hostnames", "rules"}
    for rule in route["spec"]["rules"]:
        assert rule.keys() == {"matches", "timeouts", "backendRefs"}
        assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]
    rules = the(found, "PrometheusRule")
    assert rules["apiVersion"] == "monitoring.coreos.com/v1"
    for group in rules["spec"]["groups"]:
        assert group.keys() <= {"name", "interval", "rules", "limit", "labels"}
        for rule in group["rules"]:
            assert rule.keys() <= {
                "alert", "record", "expr", "for", "keep_firing_for", "labels", "annotations"
            }  # fmt: skip
            assert isinstance(rule["expr"], str | int)
