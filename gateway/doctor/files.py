"""The configuration and its secrets: what the file says, and who else may read it."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gateway.assembly import PEPPER_FILE, read_peppers
from gateway.doctor.finding import Check, Finding, Topic, counted
from gateway.ports import StoreError
from gateway.secret import Secret
from gateway.settings import Kind, Settings, shipped
from gateway.stores.sqlite import keys_in
from gateway.stores.sqlite_glance import is_mounted, kind_of_disk
from gateway.yamlfile import Listing, Mistake, Place, References, Table, parse

SHORT = 8
"""Shorter secrets are not looked for in texts: they would be found in any."""


async def configuration(settings: Settings) -> Check:
    """What loading it warned of."""
    topic = Topic("config")
    models, teams = len(settings.catalogue.models), len(settings.teams)
    behind = " and any other behind '*'" if settings.catalogue.wildcard else ""
    yield topic.ok(
        f"{settings.file} loads: {counted(len(settings.upstreams), 'upstream')}, "
        f"{counted(models, 'model')}{behind}, {counted(teams, 'team')}"
    )
    for warning in settings.warnings:
        if _is_off(warning):
            continue  # said with the secrets
        place = Place(warning.file, warning.line, warning.column)
        yield Topic("config", warning.path).warn(warning.message, f"change it in {place}")


async def readers(settings: Settings) -> Check:
    """Who may read the files that hold secrets, and who may change the configuration."""
    holding = await asyncio.to_thread(_holding, settings)
    open_to_all = await asyncio.to_thread(lambda: [path for path in holding if _is_open(path)])
    for path in open_to_all:
        close = f"chmod o-rwx {path}"
        yield Topic("secrets", str(path)).warn(
            "holds secrets, and every user of this machine may read it",
            # Closed as it is, the gateway could not read it any more.
            f"chown {os.geteuid()} {path} && {close}" if _is_a_strangers(path) else close,
        )
    if not open_to_all:
        yield Topic("secrets").ok(
            f"{counted(len(holding), 'file')} with secrets, not readable for everybody"
            if holding
            else "none stands in the configuration file itself"
        )
    if _mode(settings.file) & (stat.S_IWOTH):
        yield Topic("config").warn(
            f"every user of this machine may change {settings.file}",
            f"chmod o-w {settings.file}",
        )


async def pepper(settings: Settings) -> Check:
    """What keys are hashed with. Nothing is made here: the first start does that."""
    topic = Topic("secrets", "pepper")
    database = settings.storage.database
    if settings.storage.pepper or not isinstance(database, Path):
        old = len(settings.storage.old_peppers)
        beside = f", and {counted(old, 'older one')}" if old else ""
        yield topic.ok(f"set in the configuration{beside}")
        return
    path = database.parent / PEPPER_FILE
    try:
        if await asyncio.to_thread(lambda: path.exists() or keys_in(database) > 0):
            await asyncio.to_thread(read_peppers, settings)
            yield topic.ok(f"{path} is readable; it belongs into every backup")
        else:
            yield topic.ok(f"{path} is made by the first start")
    except StoreError as error:
        says, _, fix = str(error).partition(". ")
        yield topic.fail(says, fix or f"make {path} readable for this user")


async def keys_of_upstreams(settings: Settings) -> Check:
    """Which providers can be called at all."""
    advice = {one.path: one.message.partition(": ")[2] for one in settings.warnings if _is_off(one)}
    for upstream in settings.upstreams.values():
        topic = Topic("secrets", f"upstream {upstream.name}")
        if upstream.kind is Kind.SANDBOX:
            yield topic.ok("a sandbox takes every key")
            continue
        if upstream.ready:
            yield topic.ok(f"{counted(len(upstream.api_keys), 'key')} set")
            continue
        fix = advice.get(f"upstreams.{upstream.name}", "")
        fix = fix or f"set one in {place_of_keys(settings, upstream.name)}"
        dark = _unserved(settings, upstream.name)
        if dark:
            yield topic.fail(f"no key: it is off, and with it {', '.join(dark)}", fix)
        else:
            yield topic.warn("no key: it is off; other upstreams have its models", fix)
    if not settings.upstreams:
        yield Topic("secrets", "upstreams").fail(
            "no upstream is configured: nothing can be drawn", "add one under upstreams"
        )


def _is_off(warning: Mistake) -> bool:
    return warning.path.startswith("upstreams.") and warning.message.startswith("has no key")


def _unserved(settings: Settings, upstream: str) -> list[str]:
    """The models of an upstream that no other one, which has a key, serves."""
    catalogue = settings.catalogue
    models = [*catalogue.models.values(), *([catalogue.wildcard] if catalogue.wildcard else [])]
    return [
        model.name
        for model in models
        if upstream in (names := [target.upstream for target in model.targets])
        and not any(settings.upstreams[name].ready for name in names)
    ]


def place_of_keys(settings: Settings, upstream: str, number: int | None = None) -> str:
    """Where the keys of an upstream, or its ``number``-th (from 1), stand in the file."""
    path = f"upstreams.{upstream}.api_keys"
    nodes: Table | Listing | object = None
    with suppress(OSError):
        content = settings.file.read_bytes()
        # What the variables hold does not matter for where they stand.
        nodes, _ = parse(content, str(settings.file), References({}, settings.file.parent))
    for name in ("upstreams", upstream, "api_keys"):
        if not isinstance(nodes, Table) or name not in nodes.entries:
            return f"{settings.file}: {path}"
        nodes = nodes.entries[name].value
    if not isinstance(nodes, Listing):
        return f"{settings.file}: {path}"
    place = nodes.place
    # Empty ones were left out: then nobody knows any more which is which.
    if number is not None and len(nodes.items) == len(settings.upstreams[upstream].api_keys):
        place, path = nodes.items[number - 1].place, f"{path}[{number - 1}]"
    return f"{place}: {path}"


def hidden(text: str, secrets: list[str]) -> str:
    """The text on one line, without any of the secrets: whatever a library may have said."""
    for secret in secrets:
        if len(secret) >= SHORT:
            text = text.replace(secret, "***")
    line = " ".join(text.split())
    return "".join(one for one in line if one.isprintable())[:600]


def secrets_of(value: object) -> list[str]:
    """Every secret in the settings, and of urls their passwords and paths by themselves; the
    longest first."""
    found = {part for secret in _secrets(value) for part in _parts(secret.reveal())}
    return sorted(found, key=len, reverse=True)


def _secrets(value: object) -> Iterator[Secret]:
    if isinstance(value, Secret):
        yield value
    elif isinstance(value, dict) or hasattr(value, "values"):
        for one in value.values():
            yield from _secrets(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _secrets(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _secrets(getattr(value, field.name))


def _parts(secret: str) -> Iterator[str]:
    if secret:
        yield secret
    with suppress(ValueError):
        parts = urlsplit(secret)
        if parts.scheme and parts.netloc:
            for part in (parts.password or "", unquote(parts.password or "")):
                if part:
                    yield part
            if parts.scheme.startswith("http") and len(parts.path) > SHORT:
                yield parts.path


def _holding(settings: Settings) -> list[Path]:
    """The files that hold a secret."""
    secrets = [one for one in secrets_of(settings) if len(one) >= SHORT]
    return [path for path in _files(settings) if _holds(path, secrets)]


def _files(settings: Settings) -> list[Path]:
    """What was read, and the pepper that was made; not what ships."""
    paths = [source.path for source in settings.sources]
    if isinstance(settings.storage.database, Path):
        paths.append(settings.storage.database.parent / PEPPER_FILE)
    ours = {shipped("prices.yaml"), shipped("gateway.yaml")}
    return [path for path in dict.fromkeys(paths) if path not in ours and path.is_file()]


def _holds(path: Path, secrets: list[str]) -> bool:
    if path.name == PEPPER_FILE:
        return True
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return False
    return any(secret in text for secret in secrets)


def _is_open(path: Path) -> bool:
    """Whether every user of the machine may read it, as far as can be told from here."""
    real = path.resolve()
    if not _mode(real) & stat.S_IROTH:
        return False
    if not all(_mode(folder) & stat.S_IXOTH for folder in real.parents):
        return False  # nobody gets there
    # A secret that Kubernetes or swarm mounts is in memory, and of one container alone.
    if kind_of_disk(real.parent) == "tmpfs":
        return False
    # A file that is mounted by itself is a container's: who gets to it outside is not seen here,
    # and a container's user reads what belongs to one of the host in no other way.
    return not (_is_a_strangers(real) and is_mounted(real))


def _is_a_strangers(path: Path) -> bool:
    """Whether this process reads it as anybody would."""
    try:
        found = path.stat()
    except OSError:
        return False
    mine = os.geteuid()
    return mine not in (0, found.st_uid) and found.st_gid not in {os.getegid(), *os.getgroups()}


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def without_secrets(finding: Finding, secrets: list[str]) -> Finding:
    return Finding(
        finding.check,
        hidden(finding.subject, secrets),
        finding.state,
        hidden(finding.says, secrets),
        hidden(finding.fix, secrets),
    )
