"""The typed configuration tree: read once at the start, frozen, complete.

``load`` reads the file and the environment and either returns ``Settings`` or raises one
``ConfigError`` with every mistake in it, each with its place and what to do. Nothing else in the
house reads environment variables.

The names of the fields are the names in the file; ``config/gateway.yaml`` explains each of them.
"""

# ``setting`` and ``group`` make fields, as ``dataclasses.field`` does:
# ruff: noqa: RUF009

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from enum import StrEnum
from ipaddress import (
    IPv4Network,
    IPv6Network,
)
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from gateway import settingvalues as values
from gateway.domain.address import METADATA, address_of, is_never_an_upstream
from gateway.domain.compat import OFF, Compat, CompatRules, merged
from gateway.domain.money import Money
from gateway.domain.route import WILDCARD, Catalogue, Model, Pin, Target, Unpriced
from gateway.domain.team import ANY_MODEL, Key, Limits, PerUser, Team
from gateway.domain.user import UserPolicy, UserSource
from gateway.filewatch import Source, source
from gateway.reading import (
    Located,
    Reader,
    Report,
    Reported,
    Spot,
    T,
    Wrong,
    as_table,
    boolean,
    but_is,
    choice,
    dollars,
    duration,
    group,
    instant,
    listing,
    located,
    mapping,
    names_of,
    optional,
    percent,
    record,
    scalar,
    seconds,
    setting,
    share,
    size,
    suggestion,
    text,
    whole,
)
from gateway.secret import Secret
from gateway.yamlfile import (
    MAX_FILE_BYTES,
    Entry,
    Listing,
    Mistake,
    Node,
    Place,
    References,
    Scalar,
    Table,
    parse,
    presentable,
)

MIB = 1024 * 1024
_ENVIRONMENT_PREFIX = "GATEWAY_"


class ConfigError(Exception):
    """The configuration cannot be used. ``str()`` has one mistake a line, in the file's order."""

    def __init__(self, mistakes: tuple[Mistake, ...], sources: tuple[Source, ...] = ()) -> None:
        """``sources`` are the files that were read, as they were then."""
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = mistakes
        self.sources = sources


class Kind(StrEnum):
    """What an upstream speaks; SANDBOX is our own in-process fake server."""

    OPENAI = "openai"
    SANDBOX = "sandbox"


class ImageUrls(StrEnum):
    """What to do with an input picture that is given as a url."""

    REFUSE = "refuse"
    PASSTHROUGH = "passthrough"


class BillOn5xx(StrEnum):
    """Whether an upstream's own failure may be on its bill."""

    NEVER = "never"
    ALWAYS = "always"


class UnknownParameters(StrEnum):
    """What to do with a parameter that OpenAI's contract does not list."""

    FORWARD = "forward"
    REFUSE = "refuse"


class Auto(StrEnum):
    """What a size or a quality that is left to the provider is held at: its dearest choice, or
    what the operator pins it to."""

    BOUND = "bound"
    PIN = "pin"


class UpstreamStream(StrEnum):
    """Whether an upstream is asked for events: always, or where the client asked for them."""

    AS_ASKED = "as_asked"
    ALWAYS = "always"


class OnUnknown(StrEnum):
    """What a retry gets of a call whose outcome nobody knows: its error again, or another call."""

    ERROR = "error"
    REPEAT = "repeat"


class Validate(StrEnum):
    RELAXED = "relaxed"
    STRICT = "strict"


class WithoutRedis(StrEnum):
    """What holds while ``storage.redis`` does not answer: this process's share of the limits, or
    nothing gets in."""

    LOCAL = "local"
    DENY = "deny"


class WithoutImageTool(StrEnum):
    """What to do with a response that asks for text alone."""

    REFUSE = "refuse"
    ALLOW = "allow"


class CacheScope(StrEnum):
    """Who shares cached results."""

    TEAM = "team"
    KEY = "key"
    ORGANIZATION = "organization"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


def _named_upstream(node: Node, spot: Spot) -> str:
    return scalar(node).text


def _kind(node: Node, spot: Spot) -> Kind:
    value = scalar(node)
    try:
        return Kind(value.text)
    except ValueError:
        named = "this kind" if not but_is(value) else f'the kind "{value.text}"'
        raise Wrong(
            f'{named} does not exist in this version; there are "openai" (for every provider '
            'that speaks OpenAI\'s API) and "sandbox"'
        ) from None


def _keep(node: Node, spot: Spot) -> timedelta:
    """How long closed calls stay. A bare number would be seconds, which nobody means here."""
    value = scalar(node)
    if value.text.isascii() and value.text.isdigit():
        raise Wrong(f"needs a unit: write {value.text if value.text != '0' else '400'}d for days")
    kept = duration(node, spot)
    if kept < timedelta(days=1):
        raise Wrong("must be a day or more: write 400d, for example")
    return kept


def _upstream_key(node: Node, spot: Spot) -> UpstreamKey:
    """A key alone, or one with its place among the others."""
    if isinstance(node, Table):
        return record(UpstreamKey)(node, spot)
    return UpstreamKey(key=values.api_key(node, spot))


_PORT = whole(0, 65_535, "a port")
_ORDER = whole(1, 1000)
_WEIGHT = whole(1, 1_000_000)
_COUNT = whole(1, 1_000_000_000)
_HOST = text(r"[A-Za-z0-9.:_%-]+", "a host or an address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """Which pages of other origins browsers let in; none without ``origins``. ``max_age`` is how
    long a browser remembers that it may."""

    origins: tuple[str, ...] = group(listing(values.origin), ())
    max_age: timedelta = setting(duration, timedelta(minutes=10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where the gateway listens, and what a request may be. Port 0 is any free one. ``public_url``
    has no slash at its end."""

    host: str = setting(_HOST, "0.0.0.0")
    port: int = setting(_PORT, 8080)
    metrics_port: int | None = setting(optional(_PORT), None)
    public_url: str | None = setting(optional(values.public_url), None)
    workers: int = setting(whole(1, 256), 1)
    replicas: int = setting(whole(1, 10_000), 1)
    buffer_bytes: int = setting(size, 128 * MIB)
    spool_bytes: int = setting(size, 10 * 1024 * MIB)
    drain_seconds: float = setting(seconds(0), 610.0)
    watch_seconds: float = setting(seconds(0), 5.0)
    max_connections: int | None = setting(optional(_COUNT), None)
    max_in_flight: int = setting(_COUNT, 10_000)
    queue: int = setting(whole(0, 1_000_000), 1000)
    queue_seconds: float = setting(seconds(0), 5.0)
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = group(listing(values.network), ())
    max_json_bytes: int = setting(size, 4 * MIB)
    max_form_bytes: int = setting(size, 200 * MIB)
    max_file_bytes: int = setting(size, 50 * MIB)
    max_pixels: int = setting(_COUNT, 100_000_000)
    max_side: int = setting(whole(1, 1_000_000), 16_384)
    cors: Cors = group(record(Cors), Cors())


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Where state lives. ``database`` is the SQLite file, or the url of a PostgreSQL database;
    paths are absolute once loaded. ``pepper`` is what keys are hashed with, ``old_peppers`` what
    some of them still may be, the newest first."""

    database: Path | Secret = setting(values.database, Path("data/gateway.db"))
    redis: Secret | None = setting(optional(values.redis), None)
    without_redis: WithoutRedis = setting(choice(WithoutRedis), WithoutRedis.LOCAL)
    blobs: Path = setting(values.blobs, Path("data/blobs"))
    pepper: Secret | None = setting(optional(values.pepper), None)
    old_peppers: tuple[Secret, ...] = group(listing(values.pepper), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """``Settings.lease_seconds`` has the lease that holds where none is set here. ``spool`` is
    where settlements wait while the ledger is away; ``keep`` None is for ever."""

    lease_seconds: float | None = setting(optional(seconds()), None)
    sweep_seconds: float = setting(seconds(), 15.0)
    spool: Path = setting(values.any_path, Path("data/settlements"))
    keep: timedelta | None = setting(optional(_keep), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    connect_seconds: float = setting(seconds(), 5.0)
    first_byte_seconds: float = setting(seconds(), 600.0)
    total_seconds: float = setting(seconds(), 600.0)
    write_seconds: float = setting(seconds(), 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamKey:
    """One of a provider's keys: of the lowest order first, those of one order by weight."""

    key: Secret = setting(values.api_key)
    weight: int = setting(_WEIGHT, 1)
    order: int = setting(_ORDER, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One provider account.

    ``base_url`` has no slash at its end and is empty for a sandbox. Names of ``headers`` are in
    lower case. ``verify`` is True or the CA bundle to trust. ``prices`` is the provider whose
    price list applies.
    """

    name: str = ""
    kind: Kind = setting(_kind)
    base_url: str = setting(values.base_url, "")
    api_keys: tuple[UpstreamKey, ...] = group(listing(_upstream_key), ())
    timeouts: Timeouts = group(record(Timeouts), Timeouts())
    headers: tuple[tuple[str, Secret], ...] = group(values.headers, ())
    proxy: Secret | None = setting(optional(values.proxy), None)
    verify: Path | bool = setting(values.verify, True)
    max_connections: int = setting(whole(1, 100_000), 1000)
    max_in_flight: int | None = setting(optional(whole(1, 100_000)), None)
    prices: str = setting(text(r"[a-z0-9][a-z0-9_.-]{0,62}", "a provider's name"), "openai")
    allow_http: bool = setting(boolean, False)
    image_urls: ImageUrls = setting(choice(ImageUrls), ImageUrls.REFUSE)
    bill_on_5xx: BillOn5xx = setting(choice(BillOn5xx), BillOn5xx.NEVER)
    admin_key: Secret | None = setting(optional(values.provider_admin_key), None)

    @property
    def ready(self) -> bool:
        """False where it has no key: it is off."""
        return self.kind is Kind.SANDBOX or bool(self.api_keys)

    @property
    def places(self) -> int:
        """How many calls may be there at a time."""
        return self.max_connections if self.max_in_flight is None else self.max_in_flight


def _upstream(node: Node, spot: Spot) -> Upstream:
    """An upstream, its fields checked against each other."""
    upstream = record(Upstream)(node, spot)
    entries = as_table(node).entries
    keys = tuple(one for one in upstream.api_keys if one.key)
    if upstream.kind is Kind.SANDBOX:
        if "base_url" in entries:
            spot.at("base_url").wrong(
                entries["base_url"].place, "a sandbox has none: it runs in this process; remove it"
            )
        if keys:
            spot.at("api_keys").wrong(
                entries["api_keys"].place, "a sandbox has none: it takes every key; remove them"
            )
        if upstream.admin_key:
            spot.at("admin_key").wrong(
                entries["admin_key"].place, "a sandbox has none: it bills nobody; remove it"
            )
        return upstream
    if "base_url" not in entries:
        spot.wrong(node.place, 'needs "base_url": https://api.openai.com/v1, for example')
    elif upstream.base_url:
        _check_origin(upstream, spot.at("base_url"), entries["base_url"].value.place)
    if len({one.key.reveal() for one in keys}) < len(keys):
        spot.at("api_keys").wrong(entries["api_keys"].place, "holds the same key twice")
    if not keys:
        value = entries["api_keys"].value if "api_keys" in entries else None
        items = value.items if isinstance(value, Listing) else ()
        names = [name for item in items for name in _sources_of_key(item)]
        advice = f"set {' or '.join(names)}" if names else 'write api_keys: ["${NAME}"]'
        spot.warn(node.place, f"has no key and is off: {advice}")
    return replace(upstream, api_keys=keys)


def _sources_of_key(item: Node) -> tuple[str, ...]:
    """The variables that a key of an upstream is made of."""
    if isinstance(item, Table) and "key" in item.entries:
        item = item.entries["key"].value
    return item.sources if isinstance(item, Scalar) else ()


ENDPOINT = re.compile(
    r"/(?:images/(?:generations|edits)|responses|models|files|chat/completions)\Z"
)
"""The end of a base url that was copied from a whole call."""


def _check_origin(upstream: Upstream, spot: Spot, place: Place) -> None:
    """The addresses that keys and pictures may be sent to, as far as the text alone tells.

    A name may resolve to anything: the transport looks again at what it is connected to, where no
    forward proxy is between.
    """
    parts = urlsplit(upstream.base_url)
    host = (parts.hostname or "").rstrip(".")
    address = address_of(host)
    if address is None and values.NUMERIC_HOST.fullmatch(host):
        spot.wrong(place, "write the address in its usual form, like 10.1.2.3")
        return
    if host in values.METADATA_HOSTS or (address is not None and address in METADATA):
        spot.wrong(place, "is the metadata service of a cloud, which is never an upstream")
        return
    if address is not None and is_never_an_upstream(address):
        spot.wrong(place, "is a link-local, multicast or empty address, never an upstream")
        return
    if parts.scheme.lower() == "http":
        near = not address.is_global if address is not None else values.is_private_name(host)
        if not near and not upstream.allow_http:
            spot.wrong(
                place,
                "sends keys and pictures unencrypted over a public network: write https://, "
                "or allow_http: true if you are sure",
            )
        else:
            spot.warn(place, "sends keys and pictures unencrypted: https:// is better")
    if not parts.path:
        spot.warn(
            place,
            "has no path: base urls of OpenAI's API usually end in /v1; write /v1 behind it, "
            "unless /images/generations is served without it",
        )
    elif ENDPOINT.search(parts.path):
        spot.warn(
            place,
            "names an endpoint: it ends before that, usually in /v1; the path of each call is put "
            "behind it",
        )


def _row(node: Node, spot: Spot) -> Table:
    if isinstance(node, Scalar):
        scalar(node)
    if not isinstance(node, Table):
        raise Wrong("must be a row as in prices.yaml: {provider: ..., model: ..., ...}")
    return node


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """``file`` None is the list that ships with the gateway. ``rows`` go before it, as written:
    ``yamlfile.plain(row)`` gives a row's values, its entries give their places."""

    file: Path | None = setting(optional(values.existing_file), None)
    rows: tuple[Table, ...] = group(listing(_row), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """``max_bytes`` is on disk, ``memory_bytes`` in each process; a larger answer than
    ``max_entry_bytes`` is not kept."""

    enabled: bool = setting(boolean, True)
    ttl: timedelta = setting(duration, timedelta(hours=24))
    scope: CacheScope = setting(choice(CacheScope), CacheScope.TEAM)
    max_bytes: int = setting(size, 10 * 1024 * MIB)
    memory_bytes: int = setting(size, 64 * MIB)
    max_entry_bytes: int = setting(size, 64 * MIB)
    redis: Secret | None = setting(optional(values.redis), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Answers by request id: kept for ``ttl``, or ``idempotent_ttl`` where the request had an
    Idempotency-Key; ``max_bytes`` is on disk. ``webhook`` hears of the end of asynchronous ones."""

    enabled: bool = setting(boolean, True)
    ttl: timedelta = setting(duration, timedelta(minutes=15))
    idempotent_ttl: timedelta = setting(duration, timedelta(hours=24))
    max_bytes: int = setting(size, 10 * 1024 * MIB)
    webhook: Secret | None = setting(optional(values.webhook), None)
    secret: Secret | None = setting(optional(values.webhook_secret), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """Pictures as urls: each may be fetched for ``ttl``; ``max_bytes`` is on disk."""

    enabled: bool = setting(boolean, True)
    ttl: timedelta = setting(duration, timedelta(hours=1))
    max_bytes: int = setting(size, 10 * 1024 * MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """``/v1/responses``. ``max_output_tokens`` and ``max_tool_calls`` are filled in where a request
    leaves them open, and the most that it may say; ``keep`` is how long its ids are known."""

    enabled: bool = setting(boolean, True)
    without_image_tool: WithoutImageTool = setting(
        choice(WithoutImageTool), WithoutImageTool.REFUSE
    )
    max_output_tokens: int = setting(whole(16, 1_000_000), 16_384)
    max_tool_calls: int = setting(whole(1, 100), 4)
    keep: timedelta = setting(duration, timedelta(days=30))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSettings:
    """`/v1/files`. ``upstream`` None: the first that is on. ``max_total_bytes`` is of all files of
    a team."""

    enabled: bool = setting(boolean, True)
    upstream: str | None = setting(optional(_named_upstream), None)
    max_bytes: int = setting(size, 512 * MIB)
    max_total_bytes: int = setting(size, 10 * 1024 * MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """An endpoint that is passed on for nothing. ``upstream`` None: the first that is on."""

    enabled: bool = setting(boolean, True)
    upstream: str | None = setting(optional(_named_upstream), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    keys: tuple[Secret, ...] = group(listing(values.admin_key), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """Who hears of budgets and drifts. ``budget_percent`` of a budget is when it is warned of;
    a reconciliation that is off by more than ``drift_percent`` is told."""

    webhook: Secret | None = setting(optional(values.webhook), None)
    secret: Secret | None = setting(optional(values.webhook_secret), None)
    budget_percent: int = setting(whole(1, 100), 80)
    drift_percent: float = setting(percent, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """``attempts`` is how often one request is sent upstream at the most, where the attempts
    before were surely not billed. ``keep_alive_seconds``: after so long a silence a stream gets a
    comment. A client that waits for JSON is told to ask again after ``max_wait_seconds``; None: it
    waits for the whole call."""

    attempts: int = setting(whole(1, 5), 2)
    on_unknown: OnUnknown = setting(choice(OnUnknown), OnUnknown.ERROR)
    keep_alive_seconds: float = setting(seconds(), 15.0)
    max_wait_seconds: float | None = setting(optional(seconds()), None)
    log_prompts: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """Where a request says who its end user is: the first of ``sources`` that says something.
    ``record``: the books and the log keep a hash of that."""

    sources: tuple[UserSource, ...] = group(listing(choice(UserSource)), tuple(UserSource))
    record: bool = setting(boolean, True)

    @property
    def policy(self) -> UserPolicy:
        return UserPolicy(self.sources, self.record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """``otlp`` None: nothing is traced. ``sample`` is the share of the traces that begin here; a
    client's own trace is sampled where the client samples it and its key is known. ``cost``: spans
    say what a call cost.
    ``propagate``: upstreams are told the trace."""

    otlp: str | None = setting(optional(values.collector), None)
    headers: tuple[tuple[str, Secret], ...] = group(values.collector_headers, ())
    sample: float = setting(share, 1.0)
    cost: bool = setting(boolean, False)
    propagate: bool = setting(boolean, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    level: LogLevel = setting(choice(LogLevel), LogLevel.INFO)
    format: LogFormat = setting(choice(LogFormat), LogFormat.JSON)


_MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}"
_model_name = text(_MODEL_NAME, "a model's name")
_model_or_any = text(rf"{_MODEL_NAME}|\*", 'a model\'s name or "*"')


def _stated(reader: Reader[T]) -> Reader[T]:
    """Refuses nothing at all: an empty ``budget:`` must not silently be no budget."""

    def read(node: Node, spot: Spot) -> T:
        if isinstance(node, Scalar) and node.is_null:
            raise Wrong("is empty: fill it in, or remove it")
        return reader(node, spot)

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatSettings:
    """What is repaired of requests, where neither a model nor a key says otherwise."""

    response_format: bool = setting(boolean, True)
    style: bool = setting(boolean, True)
    quality: bool = setting(boolean, True)
    sizes: bool = setting(boolean, True)
    media_types: bool = setting(boolean, True)
    repeated_images: bool = setting(boolean, False)
    default_model: Located[str] | None = setting(optional(located(_model_name)), None)
    aliases: dict[str, Located[str]] | None = group(
        mapping(located(_model_name), lambda name: _alias_objection(name)), None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelCompatEntry:
    """What a model says of it; left out: what holds for all."""

    response_format: bool | None = setting(boolean, None)
    style: bool | None = setting(boolean, None)
    quality: bool | None = setting(boolean, None)
    sizes: bool | None = setting(boolean, None)
    media_types: bool | None = setting(boolean, None)
    repeated_images: bool | None = setting(boolean, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyCompatEntry(_ModelCompatEntry):
    """What a key says of it, which goes before its model's word."""

    default_model: Located[str] | None = setting(located(_model_name), None)


def _or_off(reader: Reader[T]) -> Reader[T | CompatRules]:
    """A table of switches, or one word that turns all of them off."""

    def read(node: Node, spot: Spot) -> T | CompatRules:
        if isinstance(node, Scalar) and not node.is_null and node.text in ("off", "false"):
            return OFF
        return reader(node, spot)

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class _PinEntry:
    """What ``auto`` is rewritten to with ``auto: pin``."""

    size: str = setting(
        text(r"[1-9][0-9]{1,4}x[1-9][0-9]{1,4}", "a size, like 1024x1024"), "1024x1024"
    )
    quality: str = setting(text(r"[a-z]{1,16}", "a quality, like medium"), "medium")


_upstream_name = located(text(r".+", "the name of an upstream"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TargetEntry:
    """One of several places that serve a model; ``order`` None is its place in the list."""

    upstream: Located[str] = setting(_upstream_name)
    model: Located[str] | None = setting(optional(located(_model_name)), None)
    weight: int = setting(_WEIGHT, 1)
    order: int | None = setting(_ORDER, None)
    upstream_stream: UpstreamStream | None = setting(choice(UpstreamStream), None)


def _target(node: Node, spot: Spot) -> _TargetEntry:
    if isinstance(node, Table):
        return record(_TargetEntry)(node, spot)
    return _TargetEntry(upstream=_upstream_name(node, spot))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelEntry:
    upstream: Located[str] | None = setting(_upstream_name, None)
    upstreams: Located[tuple[_TargetEntry, ...]] | None = group(
        located(_stated(listing(_target))), None
    )
    model: Located[str] | None = setting(optional(located(_model_name)), None)
    upstream_stream: UpstreamStream = setting(choice(UpstreamStream), UpstreamStream.AS_ASKED)
    fallback: tuple[Located[str], ...] = group(
        listing(located(text(rf"{_MODEL_NAME}|\*", "a model's name"))), ()
    )
    unpriced: Unpriced = setting(choice(Unpriced), Unpriced.REFUSE)
    validate: Validate = setting(choice(Validate), Validate.RELAXED)
    unknown_parameters: UnknownParameters = setting(
        choice(UnknownParameters), UnknownParameters.FORWARD
    )
    auto: Auto = setting(choice(Auto), Auto.BOUND)
    pin: Located[_PinEntry] | None = group(located(_stated(record(_PinEntry))), None)
    cache: bool = setting(boolean, True)
    compat: _ModelCompatEntry | CompatRules | None = group(
        _or_off(_stated(record(_ModelCompatEntry))), None
    )


def _model(node: Node, spot: Spot) -> _ModelEntry:
    """A model, served by one upstream or by several."""
    entry = record(_ModelEntry)(node, spot)
    written = as_table(node).entries
    if "upstream" in written and "upstreams" in written:
        spot.at("upstreams").wrong(
            written["upstreams"].place, 'cannot stand beside "upstream": write all of them here'
        )
    if "upstream" not in written and "upstreams" not in written:
        raise Wrong('needs "upstream"')
    if entry.upstreams is not None:
        items = written["upstreams"].value
        if isinstance(items, Listing) and not items.items:
            entry.upstreams.wrong("is empty: name one upstream or more")
    if entry.upstream is None and (entry.upstreams is None or not entry.upstreams.value):
        raise Reported
    return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class _BudgetEntry:
    day: Money | None = setting(dollars, None)
    week: Money | None = setting(dollars, None)
    month: Money | None = setting(dollars, None)
    total: Money | None = setting(dollars, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LimitsEntry:
    requests_per_minute: int | None = setting(_COUNT, None)
    images_per_minute: int | None = setting(_COUNT, None)
    concurrent_requests: int | None = setting(_COUNT, None)
    max_cost_per_request: Money | None = setting(dollars, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TeamCacheEntry:
    enabled: bool = setting(boolean, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserLimitsEntry:
    requests_per_minute: int | None = setting(_COUNT, None)
    images_per_minute: int | None = setting(_COUNT, None)
    concurrent_requests: int | None = setting(_COUNT, None)


_limits = _stated(record(_LimitsEntry))
_budget = _stated(record(_BudgetEntry))
_models = _stated(listing(located(_model_or_any)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PerUserEntry:
    limits: _UserLimitsEntry = group(_stated(record(_UserLimitsEntry)), _UserLimitsEntry())
    budget: _BudgetEntry = group(_budget, _BudgetEntry())
    required: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyEntry:
    key: Located[Secret | None] = setting(located(values.team_secret))
    name: str = setting(
        text(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,62}", "a name of letters, digits, spaces and ._@-"), ""
    )
    models: tuple[Located[str], ...] | None = group(_models, None)
    limits: _LimitsEntry = group(_limits, _LimitsEntry())
    budget: _BudgetEntry = group(_budget, _BudgetEntry())
    soft_budget: _BudgetEntry = group(_budget, _BudgetEntry())
    expires: datetime | None = setting(instant, None)
    disabled: bool = setting(boolean, False)
    compat: _KeyCompatEntry | CompatRules | None = group(
        _or_off(_stated(record(_KeyCompatEntry))), None
    )


def _key(node: Node, spot: Spot) -> _KeyEntry:
    if isinstance(node, Scalar):
        return _KeyEntry(key=located(values.team_secret)(node, spot))
    return record(_KeyEntry)(node, spot)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TeamEntry:
    keys: tuple[_KeyEntry, ...] = group(listing(_key), ())
    models: tuple[Located[str], ...] | None = group(_models, None)
    limits: _LimitsEntry = group(_limits, _LimitsEntry())
    budget: _BudgetEntry = group(_budget, _BudgetEntry())
    soft_budget: _BudgetEntry = group(_budget, _BudgetEntry())
    time_zone: str = setting(values.time_zone, "UTC")
    cache: _TeamCacheEntry = group(_stated(record(_TeamCacheEntry)), _TeamCacheEntry())
    weight: int = setting(whole(1, 1000), 1)
    per_user: _PerUserEntry = group(_stated(record(_PerUserEntry)), _PerUserEntry())
    disabled: bool = setting(boolean, False)


def _upstream_objection(name: str) -> str | None:
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        return None
    return _NAME_RULE.format("an upstream")


def is_team_name(name: str) -> bool:
    """Whether a team may have this name."""
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name) is not None


def _team_objection(name: str) -> str | None:
    return None if is_team_name(name) else _NAME_RULE.format("a team")


def _alias_objection(name: str) -> str | None:
    if re.fullmatch(_MODEL_NAME, name):
        return None
    return "a model's name has letters, digits and ._:/@+- (at most 128)"


def _model_objection(name: str) -> str | None:
    if name == WILDCARD or re.fullmatch(_MODEL_NAME, name):
        return None
    return 'a model\'s name has letters, digits and ._:/@+- (at most 128), or is "*"'


_NAME_RULE = (
    "the name of {} has lower-case letters, digits, - and _ (at most 63), "
    "and starts with a letter or a digit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """The file's sections, in the order of ``config/gateway.yaml``."""

    server: Server = group(record(Server), Server())
    storage: Storage = group(record(Storage), Storage())
    ledger: LedgerSettings = group(record(LedgerSettings), LedgerSettings())
    upstreams: dict[str, Upstream] | None = group(mapping(_upstream, _upstream_objection), None)
    models: dict[str, _ModelEntry] | None = group(mapping(_model, _model_objection), None)
    compat: CompatSettings | CompatRules = group(_or_off(record(CompatSettings)), CompatSettings())
    prices: Prices = group(record(Prices), Prices())
    cache: CacheSettings = group(record(CacheSettings), CacheSettings())
    results: Results = group(record(Results), Results())
    hosted: Hosted = group(record(Hosted), Hosted())
    users: Users = group(record(Users), Users())
    files: FileSettings = group(record(FileSettings), FileSettings())
    moderations: CheckSettings = group(record(CheckSettings), CheckSettings())
    provenance: CheckSettings = group(record(CheckSettings), CheckSettings())
    teams: dict[str, _TeamEntry] | None = group(mapping(record(_TeamEntry), _team_objection), None)
    admin: Admin = group(record(Admin), Admin())
    notify: Notify = group(record(Notify), Notify())
    responses: Responses = group(record(Responses), Responses())
    relay: Relay = group(record(Relay), Relay())
    log: Log = group(record(Log), Log())
    tracing: Tracing = group(record(Tracing), Tracing())


_OVERRIDABLE = MappingProxyType(
    {
        "server": names_of(Server),
        "storage": names_of(Storage),
        "ledger": names_of(LedgerSettings),
        "compat": names_of(CompatSettings),
        "prices": names_of(Prices),
        "cache": names_of(CacheSettings),
        "results": names_of(Results),
        "hosted": names_of(Hosted),
        "users": names_of(Users),
        "files": names_of(FileSettings),
        "moderations": names_of(CheckSettings),
        "provenance": names_of(CheckSettings),
        "admin": names_of(Admin),
        "notify": names_of(Notify),
        "responses": names_of(Responses),
        "relay": names_of(Relay),
        "log": names_of(Log),
        "tracing": names_of(Tracing),
    }
)
"""Section -> setting -> whether it is a scalar, which the environment may set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredKey:
    """A team's key as the file declares it; its id is derived from the digest of its secret."""

    secret: Secret
    team: str
    name: str = ""
    models: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    expires: datetime | None = None
    disabled: bool = False
    compat: CompatRules | None = None

    def key(self, key_id: str) -> Key:
        """The key's public half, once its id is known."""
        return Key(
            id=key_id,
            team=self.team,
            name=self.name,
            models=self.models,
            limits=self.limits,
            expires=self.expires,
            disabled=self.disabled,
            declared=True,
            compat=self.compat,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. ``teams`` and ``declared_keys`` are those of the file."""

    file: Path
    server: Server
    storage: Storage
    ledger: LedgerSettings
    upstreams: Mapping[str, Upstream]
    catalogue: Catalogue
    compat: Compat
    prices: Prices
    cache: CacheSettings
    results: Results
    hosted: Hosted
    users: Users
    files: FileSettings
    moderations: CheckSettings
    provenance: CheckSettings
    teams: Mapping[str, Team]
    declared_keys: tuple[DeclaredKey, ...]
    notify: Notify
    responses: Responses
    relay: Relay
    log: Log
    tracing: Tracing
    warnings: tuple[Mistake, ...] = ()
    sources: tuple[Source, ...] = ()
    """The files that all of this was read from, as they were then: of the configuration, of each
    ``${file:...}``, of the prices, and each CA bundle."""

    @property
    def hosts_pictures(self) -> bool:
        """Whether `response_format=url` can be answered with urls of this gateway."""
        return self.hosted.enabled and self.server.public_url is not None

    @property
    def lease_seconds(self) -> float:
        """How long a hold may live: as set, or the longest call and a minute."""
        return self.ledger.lease_seconds or _longest_call(self.upstreams) + 60

    @property
    def background_seconds(self) -> float:
        """How long what an upstream goes on with by itself is looked after: its hold ends then."""
        return max(1.0, self.lease_seconds - 60)

    @property
    def patience_seconds(self) -> float:
        """How long after a call's first attempt another one may begin, so that the longest ends
        before its hold does."""
        return max(1.0, self.lease_seconds - _longest_call(self.upstreams) - 10)


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """The settings of a file (None: ``default_config_path``) and the environment, which wins.

    Raises ``ConfigError`` with every mistake.
    """
    path = path or default_config_path(environ)
    folder = _folder(path)
    report = Report(folder)
    spot = Spot(report)
    references = References(environ, folder, report.sources)
    report.sources.append(source(path))
    settings: Settings | None = None
    try:
        root = _read(path, references, report)
        root = _with_environment(root, environ, report)
        document = spot.read(record(_Document), root)
        if document.prices.file is None:
            report.sources.append(source(shipped("prices.yaml")))
        settings = _settle(path, document, root, spot)
    except Reported:
        pass
    sources = tuple(report.sources)
    if report.mistakes or settings is None:
        raise ConfigError(tuple(sorted(set(report.mistakes))), sources)
    warnings = tuple(sorted(set(report.warnings)))
    return replace(settings, warnings=warnings, sources=sources)


def listening(path: Path | None, environ: Mapping[str, str]) -> Server:
    """Where the gateway of a file and the environment listens, whatever is wrong with the rest of
    them: one that runs goes on with what it read before. What cannot be read has its default."""
    path = path or default_config_path(environ)
    report = Report(_folder(path))
    spot = Spot(report)
    root: Node = Table(Place(str(path), 1, 1), {})
    with suppress(Reported):
        root = _read(path, References(environ, report.folder, report.sources), report)
    with suppress(Reported, Wrong):
        entry = as_table(_with_environment(root, environ, report)).entries.get("server")
        if entry is not None:
            return spot.at("server").read(record(Server), entry.value)
    return Server()


def default_config_path(environ: Mapping[str, str]) -> Path:
    """``GATEWAY_CONFIG``, then ``config/gateway.yaml`` here, then the copy that ships."""
    if chosen := environ.get("GATEWAY_CONFIG"):
        return Path(chosen)
    here = Path("config", "gateway.yaml")
    return here if here.is_file() else shipped("gateway.yaml")


def shipped(name: str) -> Path:
    """A file that comes with the gateway: inside the package, or beside it in the repository."""
    packaged = _PACKAGED / name
    return packaged if packaged.is_file() else _PACKAGED.parent.parent / "config" / name


_PACKAGED = Path(__file__).resolve().parent / "_config"


def _folder(path: Path) -> Path:
    """Where relative paths start: the folder of the file. The copy inside the package stands for
    a file that nobody wrote: there it is the working directory, not ``site-packages``."""
    folder = path.absolute().parent
    return Path.cwd() if folder == _PACKAGED else folder


def _read(path: Path, references: References, report: Report) -> Node:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a path"
        advice = "give another with --config FILE or GATEWAY_CONFIG"
        report.mistakes.append(
            Mistake(str(path), 0, 0, "", f"the file cannot be read ({why}): {advice}")
        )
        raise Reported from None
    node, mistakes = parse(content, str(path), references)
    report.mistakes.extend(mistakes)
    return node or Table(Place(str(path), 1, 1), {})


def _with_environment(root: Node, environ: Mapping[str, str], report: Report) -> Node:
    """The file's tree with what ``GATEWAY_SECTION__NAME`` sets laid over it."""
    sections: dict[str, dict[str, Entry]] = {}
    for variable, value in sorted(environ.items()):
        if not variable.startswith(_ENVIRONMENT_PREFIX) or "__" not in variable:
            continue
        place = Place(variable)
        section, _, name = variable.removeprefix(_ENVIRONMENT_PREFIX).lower().partition("__")
        if variable == variable.upper() and _OVERRIDABLE.get(section, {}).get(name):
            # Not read for references: it has been through a shell already.
            node = Scalar(place, value, given=True, sources=(variable,))
            sections.setdefault(section, {})[name] = Entry(place, node)
        else:
            report.mistakes.append(Mistake(variable, 0, 0, "", _objection(variable, section, name)))
    table = Spot(report).read(lambda node, spot: as_table(node), root)
    entries = dict(table.entries)
    for section, overrides in sections.items():
        below = entries.get(section)
        try:
            inside = as_table(below.value) if below is not None else Table(table.place, {})
        except (Wrong, Reported):
            continue  # the section itself is reported when it is read
        merged = Table(inside.place, {**inside.entries, **overrides})
        entries[section] = Entry(below.place if below is not None else table.place, merged)
    return Table(table.place, entries)


def _objection(variable: str, section: str, name: str) -> str:
    """Why a variable that looks like a setting is none."""
    if (
        section in ("upstreams", "models", "teams")
        or _OVERRIDABLE.get(section, {}).get(name) is False
    ):
        return "this can only be set in the file, not by a variable"
    known = [
        f"{_ENVIRONMENT_PREFIX}{section}__{name}".upper()
        for section, names in _OVERRIDABLE.items()
        for name, is_scalar in names.items()
        if is_scalar
    ]
    near = get_close_matches(variable.upper(), known, n=1) if len(variable) < 65 else []
    return "there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


def _settle(path: Path, document: _Document, root: Node, spot: Spot) -> Settings:
    """The document checked as a whole, in the domain's own types."""
    folder = spot.report.folder
    upstreams = {
        name: replace(upstream, name=name) for name, upstream in (document.upstreams or {}).items()
    }
    teams = document.teams or {}
    _check_sections(document, upstreams, root, spot)
    _check_teams(teams, _names(root, "models"), document.users.sources, root, spot)
    _check_secrets(teams, upstreams)
    keys = (key for team in teams.values() for key in team.keys)
    _check_compat(document.compat, keys, _names(root, "models"))
    return Settings(
        file=path,
        server=document.server,
        storage=replace(
            document.storage,
            database=_from(folder, document.storage.database),
            blobs=folder / document.storage.blobs,
        ),
        ledger=replace(document.ledger, spool=folder / document.ledger.spool),
        upstreams=MappingProxyType(upstreams),
        catalogue=_catalogue(
            document.models or {},
            _names(root, "models"),
            _names(root, "upstreams"),
            frozenset(
                name for name, one in upstreams.items() if one.bill_on_5xx is BillOn5xx.ALWAYS
            ),
        ),
        compat=_compat(document.compat),
        prices=document.prices,
        cache=document.cache,
        results=document.results,
        hosted=document.hosted,
        users=document.users,
        files=document.files,
        moderations=document.moderations,
        provenance=document.provenance,
        teams=MappingProxyType({name: _team(name, entry) for name, entry in teams.items()}),
        declared_keys=tuple(
            _declared(name, key, key.key.value)
            for name, entry in teams.items()
            for key in entry.keys
            if key.key.value is not None
        ),
        notify=document.notify,
        responses=document.responses,
        relay=document.relay,
        log=document.log,
        tracing=document.tracing,
    )


def _from(folder: Path, database: Path | Secret) -> Path | Secret:
    return folder / database if isinstance(database, Path) else database


def _check_sections(
    document: _Document, upstreams: Mapping[str, Upstream], root: Node, spot: Spot
) -> None:
    server, ledger = document.server, document.ledger
    if server.metrics_port and server.metrics_port == server.port:
        spot.at("server").at("metrics_port").wrong(
            _place(root, "server", "metrics_port"),
            "is the same as server.port: remove it to serve /metrics there",
        )
    _check_storage(document, root, spot)
    longest = _longest_call(upstreams)
    if ledger.lease_seconds is not None and ledger.lease_seconds <= longest:
        spot.at("ledger").at("lease_seconds").warn(
            _place(root, "ledger", "lease_seconds"),
            f"is no longer than the longest call ({longest:g} s, total_seconds of an upstream): "
            "calls that still run would be charged at their bound",
        )
    if server.drain_seconds < longest:
        spot.at("server").at("drain_seconds").warn(
            _place(root, "server", "drain_seconds"),
            f"is shorter than the longest call ({longest:g} s, total_seconds of an upstream): "
            "calls that run at a SIGTERM would be given up, and charged at their bound",
        )
    for section, webhook, secret in (
        ("notify", document.notify.webhook, document.notify.secret),
        ("results", document.results.webhook, document.results.secret),
    ):
        if webhook is not None and secret is None:
            spot.at(section).at("secret").warn(
                _place(root, section, "webhook"),
                "is not set: whoever knows the webhook's address can forge messages to it; echo "
                "whsec_$(openssl rand -base64 32)",
            )
    _check_results(document.results, root, spot.at("results"))
    for section, named in (
        ("files", document.files.upstream),
        ("moderations", document.moderations.upstream),
        ("provenance", document.provenance.upstream),
    ):
        if named is not None and named not in _names(root, "upstreams"):
            spot.at(section).at("upstream").wrong(
                _place(root, section, "upstream"),
                f"is no upstream of this file{suggestion(named, sorted(upstreams))}",
            )
    for name, upstream in upstreams.items():
        if upstream.places > upstream.max_connections:
            spot.at("upstreams").at(name).at("max_in_flight").warn(
                _place(root, "upstreams", name, "max_in_flight"),
                f"is over its max_connections ({upstream.max_connections}), which is what holds",
            )
    if not document.models:
        spot.at("models").warn(
            _place(root, "models"),
            'no model is routed: every request is refused; add "*"'
            + (
                ""
                if isinstance(root, Table) and root.entries
                else ", or is this empty file the one you meant?"
            ),
        )


def _check_results(results: Results, root: Node, spot: Spot) -> None:
    if results.ttl > results.idempotent_ttl:
        spot.at("ttl").warn(
            _place(root, "results", "ttl"),
            "is longer than idempotent_ttl: a result would be kept for a shorter time because its "
            "request had an Idempotency-Key",
        )
    if results.webhook is not None and not results.enabled:
        spot.at("webhook").warn(
            _place(root, "results", "webhook"),
            "hears nothing while results.enabled is false: there are no asynchronous requests",
        )


def _check_storage(document: _Document, root: Node, spot: Spot) -> None:
    """Which stores several processes, and several machines, can share."""
    server, storage = document.server, document.storage
    if isinstance(storage.database, Secret):
        if not storage.pepper:
            spot.at("storage").at("pepper").wrong(
                _place(root, "storage", "database"),
                "must be set where the database is shared, or each replica would hash keys its "
                'own way: "${file:/run/secrets/pepper}", made with openssl rand -hex 32',
            )
    elif server.replicas > 1:
        spot.at("server").at("replicas").wrong(
            _place(root, "server", "replicas"),
            "must be 1 with SQLite, which serves one machine: for several, set storage.database "
            "to postgresql://",
        )
    if server.replicas > 1 and storage.redis is None:
        spot.at("server").at("replicas").warn(
            _place(root, "server", "replicas"),
            "is over 1 without storage.redis: each replica then keeps its share of the limits, "
            "whatever the others do",
        )
    if server.workers > 1 and storage.redis is None:
        spot.at("server").at("workers").warn(
            _place(root, "server", "workers"),
            "is over 1 without storage.redis, through which workers share their limits: one "
            "will run",
        )
    if storage.pepper and storage.pepper in storage.old_peppers:
        spot.at("storage").at("old_peppers").wrong(
            _place(root, "storage", "old_peppers"), "holds the pepper that is in use"
        )


def _longest_call(upstreams: Mapping[str, Upstream]) -> float:
    """In seconds."""
    totals = [upstream.timeouts.total_seconds for upstream in upstreams.values()]
    return max(totals, default=Timeouts().total_seconds)


def _catalogue(
    entries: Mapping[str, _ModelEntry],
    named: frozenset[str],
    upstreams: frozenset[str],
    billing: frozenset[str],
) -> Catalogue:
    """``named`` are all models of the file, also those that were refused; ``billing`` are the
    upstreams whose own failures may be on their bill."""
    models: dict[str, Model] = {}
    for name, entry in entries.items():
        target, *others = _targets(name, entry, upstreams, billing)
        if name == WILDCARD and entry.model is not None:
            entry.model.wrong(f'"{WILDCARD}" passes every name on as it is: remove this')
        if entry.pin is not None and entry.auto is not Auto.PIN:
            entry.pin.warn("does nothing without auto: pin")
        _check_fallbacks(name, entry, named)
        pin = entry.pin.value if entry.pin is not None else _PinEntry()
        models[name] = Model(
            name=name,
            target=target,
            unpriced=entry.unpriced,
            strict=entry.validate is Validate.STRICT,
            cache_enabled=entry.cache,
            label="other" if name == WILDCARD else name,
            refuse_unknown=entry.unknown_parameters is UnknownParameters.REFUSE,
            pin=Pin(pin.size, pin.quality) if entry.auto is Auto.PIN else None,
            others=tuple(sorted(others, key=lambda other: other.order)),
            fallbacks=tuple(fallback.value for fallback in entry.fallback),
            compat=_compat_rules(entry.compat),
        )
    wildcard = models.pop(WILDCARD, None)
    return Catalogue(MappingProxyType(models), wildcard)


def _targets(
    name: str, entry: _ModelEntry, upstreams: frozenset[str], billing: frozenset[str]
) -> list[Target]:
    """Where a model is served, as the file lists it."""
    if entry.upstreams is None:
        assert entry.upstream is not None, "one of both was written"
        listed: tuple[_TargetEntry, ...] = (_TargetEntry(upstream=entry.upstream),)
    else:
        listed = entry.upstreams.value
    found: list[Target] = []
    for place, each in enumerate(listed, 1):
        upstream = each.upstream.value
        if upstream not in upstreams:
            shown = f'there is no upstream "{upstream}"' if presentable(upstream) else "no upstream"
            each.upstream.wrong(f"{shown}{suggestion(upstream, sorted(upstreams))}")
        if name == WILDCARD and each.model is not None:
            each.model.wrong(f'"{WILDCARD}" passes every name on as it is: remove this')
        served = each.model or entry.model
        target = Target(
            upstream,
            served.value if served else name,
            each.order or place,
            each.weight,
            (each.upstream_stream or entry.upstream_stream) is UpstreamStream.ALWAYS,
            upstream in billing,
        )
        if any((one.upstream, one.model) == (upstream, target.model) for one in found):
            each.upstream.wrong("is listed twice with the same model: give it more weight instead")
        found.append(target)
    return found


def _check_fallbacks(name: str, entry: _ModelEntry, named: frozenset[str]) -> None:
    seen: set[str] = set()
    for fallback in entry.fallback:
        other = fallback.value
        if other == WILDCARD:
            fallback.wrong(f'"{WILDCARD}" is no model: name one that stands under models')
        elif other == name:
            fallback.wrong("is this model itself: name another one")
        elif other not in named:
            shown = f' "{other}"' if presentable(other) else ""
            near = suggestion(other, sorted(named - {WILDCARD, name}))
            fallback.wrong(
                f"there is no model{shown} under models{near}"
                + (f'; "{WILDCARD}" does not do for this' if WILDCARD in named else "")
            )
        elif other in seen:
            fallback.wrong("is listed twice")
        seen.add(other)


def _check_teams(
    teams: Mapping[str, _TeamEntry],
    models: frozenset[str],
    sources: Sequence[UserSource],
    root: Node,
    spot: Spot,
) -> None:
    for name, team in teams.items():
        place, inside = _place(root, "teams", name), spot.at("teams").at(name)
        if not team.keys and not team.disabled:
            inside.warn(place, 'has no key, so nobody can call for it: keys: ["${NAME}"]')
        names = [key.name for key in team.keys if key.name]
        for twice in sorted({each for each in names if names.count(each) > 1}):
            inside.at("keys").wrong(place, f'two keys have the name "{twice}"')
        _check_models(team.models or (), models)
        allowed = {each.value for each in team.models or ()}
        _check_budgets(team, inside, _place(root, "teams", name, "soft_budget"))
        if team.per_user != _PerUserEntry() and not sources:
            inside.at("per_user").wrong(
                _place(root, "teams", name, "per_user"),
                "holds for nobody while users.sources is empty: no request has a user",
            )
        for index, key in enumerate(team.keys):
            _check_budgets(key, inside.at("keys").at(index), key.key.place)
        for key in team.keys:
            _check_models(key.models or (), models)
            for model in key.models or ():
                if allowed and ANY_MODEL not in allowed and model.value not in {*allowed, "*"}:
                    model.warn("the team may not use this model, so neither may this key")


def _check_budgets(entry: _TeamEntry | _KeyEntry, spot: Spot, place: Place) -> None:
    limits = _bounds(entry.limits, entry.budget, entry.soft_budget)
    for window in limits.unreachable:
        spot.at("soft_budget").at(window).warn(
            place, f"is over budget.{window}, so that it is never reached"
        )


def _check_models(wanted: tuple[Located[str], ...], models: frozenset[str]) -> None:
    for model in wanted:
        if model.value != ANY_MODEL and WILDCARD not in models and model.value not in models:
            shown = f' "{model.value}"' if presentable(model.value) else ""
            near = suggestion(model.value, sorted(models))
            model.wrong(f"there is no model{shown} under models{near}")


def _check_secrets(teams: Mapping[str, _TeamEntry], upstreams: Mapping[str, Upstream]) -> None:
    """A key belongs to one team, and a provider's key to none."""
    providers = {
        key.reveal()
        for upstream in upstreams.values()
        for key in (*(one.key for one in upstream.api_keys), upstream.admin_key)
        if key
    }
    first: dict[str, Located[Secret | None]] = {}
    for team in teams.values():
        for key in team.keys:
            if key.key.value is None:
                continue
            secret = key.key.value.reveal()
            if secret in providers:
                key.key.wrong("that is a provider's key (of an upstream), not a team's")
            if (earlier := first.setdefault(secret, key.key)) is not key.key:
                key.key.wrong(f"is the same key as {earlier.spot.path} (line {earlier.place.line})")


def _team(name: str, entry: _TeamEntry) -> Team:
    per_user = entry.per_user.limits
    return Team(
        id=name,
        models=_model_names(entry.models) if entry.models is not None else frozenset({ANY_MODEL}),
        limits=_bounds(entry.limits, entry.budget, entry.soft_budget),
        cache_enabled=entry.cache.enabled,
        disabled=entry.disabled,
        declared=True,
        time_zone=entry.time_zone,
        weight=entry.weight,
        per_user=PerUser(
            _bounds(
                _LimitsEntry(
                    requests_per_minute=per_user.requests_per_minute,
                    images_per_minute=per_user.images_per_minute,
                    concurrent_requests=per_user.concurrent_requests,
                ),
                entry.per_user.budget,
                _BudgetEntry(),
            ),
            entry.per_user.required,
        ),
    )


def _declared(team: str, entry: _KeyEntry, secret: Secret) -> DeclaredKey:
    return DeclaredKey(
        secret=secret,
        team=team,
        name=entry.name,
        models=_model_names(entry.models) if entry.models is not None else None,
        limits=_bounds(entry.limits, entry.budget, entry.soft_budget),
        expires=entry.expires,
        disabled=entry.disabled,
        compat=_compat_rules(entry.compat),
    )


def _compat(said: CompatSettings | CompatRules) -> Compat:
    if isinstance(said, CompatRules):
        return merged(Compat(), said)
    return Compat(
        default_model=said.default_model.value if said.default_model else None,
        aliases={name: model.value for name, model in (said.aliases or {}).items()},
        **_switches(said),
    )


def _compat_rules(said: _ModelCompatEntry | CompatRules | None) -> CompatRules | None:
    if said is None or isinstance(said, CompatRules):
        return said
    default = said.default_model if isinstance(said, _KeyCompatEntry) else None
    return CompatRules(default_model=default.value if default else None, **_switches(said))


def _switches(said: CompatSettings | _ModelCompatEntry) -> dict[str, Any]:
    return {name: getattr(said, name) for name in names_of(_ModelCompatEntry)}


def _check_compat(
    said: CompatSettings | CompatRules, keys: Iterable[_KeyEntry], models: frozenset[str]
) -> None:
    """Defaults and aliases lead to what is configured; the wildcard does not count."""
    settings = said if isinstance(said, CompatSettings) else CompatSettings()
    aliases = settings.aliases or {}
    entries = [key.compat for key in keys if isinstance(key.compat, _KeyCompatEntry)]
    defaults = (settings.default_model, *(entry.default_model for entry in entries))
    for name in (*aliases.values(), *(default for default in defaults if default is not None)):
        if name.value not in models:
            shown = f' "{name.value}"' if presentable(name.value) else ""
            near = suggestion(name.value, sorted(models))
            name.wrong(f"there is no model{shown} under models{near}")
    for alias, name in aliases.items():
        if alias in models:
            name.warn("does nothing: the model of that name under models is the one that is asked")


def _model_names(models: tuple[Located[str], ...]) -> frozenset[str]:
    return frozenset(model.value for model in models)


def _bounds(limits: _LimitsEntry, budget: _BudgetEntry, soft: _BudgetEntry) -> Limits:
    return Limits(
        requests_per_minute=limits.requests_per_minute,
        images_per_minute=limits.images_per_minute,
        concurrent_requests=limits.concurrent_requests,
        budget_day=budget.day,
        budget_week=budget.week,
        budget_month=budget.month,
        budget_total=budget.total,
        soft_budget_day=soft.day,
        soft_budget_week=soft.week,
        soft_budget_month=soft.month,
        soft_budget_total=soft.total,
        max_cost_per_request=limits.max_cost_per_request,
    )


def _names(root: Node, section: str) -> frozenset[str]:
    """The names in a section, also of entries that were refused: one mistake is not reported
    again by everything that refers to it."""
    entry = as_table(root).entries.get(section)
    below = entry.value if entry is not None else None
    return frozenset(below.entries) if isinstance(below, Table) else frozenset()


def _place(root: Node, *path: str) -> Place:
    """Where a value is written, or the nearest thing above it that is."""
    node = root
    for name in path:
        if not isinstance(node, Table) or name not in node.entries:
            break
        node = node.entries[name].value
    return node.place
