"""The parts: each function makes one of them from the settings, or says why it cannot be made.

``app`` puts them together; commands use some of them by themselves.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, time
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.domain import keys
from gateway.domain.bill import BilledItem
from gateway.domain.price import Price, PriceBook, PriceRow
from gateway.domain.route import WILDCARD, Model, Pin, Target, Unpriced
from gateway.domain.team import Declared, Key, Team
from gateway.notify import PAUSES_SECONDS, Webhooks
from gateway.ports import (
    BillUnreadable,
    Clock,
    Directory,
    Notifier,
    StoreError,
)
from gateway.pricefile import PriceFileError, load_prices
from gateway.relay.arrival import Patience
from gateway.relay.checks import CheckRules
from gateway.relay.files import FileRules
from gateway.relay.health import CircuitState, HealthListener, Why
from gateway.relay.news import ResultNews
from gateway.relay.passing import Place
from gateway.relay.read import ReadRules, ResponseRules
from gateway.secret import Secret
from gateway.settings import (
    ImageUrls,
    Kind,
    OnUnknown,
    Settings,
    UpstreamKey,
    WithoutImageTool,
    shipped,
)
from gateway.settings import Upstream as UpstreamSettings
from gateway.stores.sqlite import keys_in
from gateway.telemetry.metrics import Metrics, Move, status_class
from gateway.upstream.account import (
    Account,
    AccountKey,
    AccountNews,
    AccountOptions,
    build_account,
)
from gateway.upstream.costs import read_costs
from gateway.upstream.postbox import WebPostbox
from gateway.upstream.wire import Timeouts
from gateway.yamlfile import plain

if TYPE_CHECKING:
    from gateway.telemetry.trace import Spans

log = logging.getLogger(__name__)

PEPPER_FILE = "gateway.pepper"


class CannotServe(Exception):
    """The configuration can be read but not served: one line for each mistake."""


def price_book(settings: Settings) -> PriceBook:
    """The prices that apply. Raises ``PriceFileError``."""
    own = [plain(row) for row in settings.prices.rows]
    try:
        found = load_prices(
            settings.prices.file or shipped("prices.yaml"),
            [row for row in own if isinstance(row, dict)],
        )
    except PriceFileError as error:
        raise PriceFileError([_placed(mistake, settings) for mistake in error.mistakes]) from None
    return PriceBook(found.rows, found.compiled)


def shutdowns(settings: Settings, book: PriceBook, day: date) -> dict[tuple[str, ...], date]:
    """When configured models shut down, by their label and upstream; the first of several."""
    found: dict[tuple[str, ...], date] = {}
    for model in settings.catalogue.models.values():
        for target in model.targets:
            upstream = settings.upstreams[target.upstream]
            row = book.of(upstream.name, upstream.prices, day).find(target.model)
            if row is not None and row.shuts_down is not None:
                where = (model.label or model.name, upstream.name)
                found[where] = min(row.shuts_down, found.get(where, row.shuts_down))
    return found


def tell_prices(metrics: Metrics, settings: Settings, book: PriceBook, day: date) -> None:
    """Sets the gauges of the price table's age and of the models that shut down."""
    known: dict[tuple[str, ...], float] = {}
    if book.compiled is not None:
        known[()] = _midnight(book.compiled)
    metrics.replace("gateway_prices_compiled_timestamp_seconds", known)
    ends = {where: _midnight(end) for where, end in shutdowns(settings, book, day).items()}
    metrics.replace("gateway_model_shutdown_timestamp_seconds", ends)


def _midnight(day: date) -> float:
    """The beginning of a UTC day, as a Unix time."""
    return datetime.combine(day, time(), UTC).timestamp()


def _placed(mistake: str, settings: Settings) -> str:
    """A mistake in one of the operator's rows, with the line that the row begins at."""
    row = re.match(r"prices\.rows\[(\d+)\]", mistake)
    if row is None:
        return mistake
    place = settings.prices.rows[int(row[1])].place
    return f"{settings.file}:{place.line}:{place.column}: {mistake}"


def retired_names(settings: Settings, book: PriceBook, day: date) -> list[str]:
    """What is configured and leads to a model that is served no more, by its place: models,
    aliases and defaults. A model that has another target, or a fallback, is answered still."""
    found: list[str] = []
    over: dict[str, str] = {}
    for model in settings.catalogue.models.values():
        rows = [ended_row(settings, book, target, day) for target in model.targets]
        ended = [row for row in rows if row is not None]
        if len(ended) < len(rows):
            continue
        row = ended[0]
        said = f"{row.provider} shut {row.model} down on {row.shuts_down}"
        instead = f" Its replacement is {row.replacement}" if row.replacement else ""
        if stand_in := standing_in(settings, book, model, day):
            found.append(f"models.{model.name}: {said}; {stand_in} answers for it.{instead}")
        else:
            over[model.name] = f"{said}, so such calls are refused.{instead}"
            found.append(f"models.{model.name}: {over[model.name]}")
    compat = settings.compat
    places = [(f"compat.aliases.{alias}", name) for alias, name in compat.aliases.items()]
    places.append(("compat.default_model", compat.default_model or ""))
    for key in settings.declared_keys:
        named = f"the key {key.name}" if key.name else "a key"
        own = key.compat.default_model if key.compat else None
        places.append((f"teams.{key.team}.keys: {named}: compat.default_model", own or ""))
    found += [f"{place} leads to {name}: {over[name]}" for place, name in places if name in over]
    return found


def standing_in(
    settings: Settings, book: PriceBook, model: Model, day: date, *, ready: bool = False
) -> str:
    """The first of a model's fallbacks that can answer for it; empty where none can. ``ready``: by
    the keys that there are now."""
    for name in model.fallbacks:
        other = settings.catalogue.models.get(name)
        targets = other.targets if other else ()
        if any(
            (settings.upstreams[target.upstream].ready or not ready)
            and ended_row(settings, book, target, day) is None
            for target in targets
        ):
            return name
    return ""


def ended_row(settings: Settings, book: PriceBook, target: Target, day: date) -> PriceRow | None:
    """The price of a target that is served no more; None of one that is, as far as is known."""
    upstream = settings.upstreams[target.upstream]
    row = book.of(upstream.name, upstream.prices, day).find(target.model)
    return row if row is not None and row.retired(day) else None


def unpriced_models(settings: Settings, book: PriceBook, day: date) -> list[str]:
    """What is configured but has no price, models and pins: refused, unless the operator allows
    it of a model."""
    found = []
    for model in settings.catalogue.models.values():
        for target in model.targets:
            upstream = settings.upstreams[target.upstream]
            row = book.of(upstream.name, upstream.prices, day).find(target.model)
            if row is not None:
                found += _unknown_pin(model, target, row.price)
            elif model.unpriced is Unpriced.REFUSE:
                found.append(
                    f"models.{model.name}: {target.model} has no price at {upstream.name}. Add "
                    "a row under prices.rows, or set unpriced: allow"
                )
    rule = settings.catalogue.wildcard
    if rule is not None and rule.pin is not None:
        for target in rule.targets:
            found += _unknown_wildcard_pin(settings, book, day, target.upstream, rule.pin)
    return found


def _unknown_wildcard_pin(
    settings: Settings, book: PriceBook, day: date, upstream: str, pin: Pin
) -> list[str]:
    """One entry for many models: not all need to draw what it pins, but one of them must."""
    rows = book.of(upstream, settings.upstreams[upstream].prices, day).rows.values()
    if any(row.price.knows(pin.size, pin.quality) for row in rows):
        return []
    return [
        f"models.{WILDCARD}.pin: no price at {upstream} knows size {pin.size} with quality "
        f"{pin.quality}. Pin what its models draw, or set auto: bound"
    ]


def _unknown_pin(model: Model, target: Target, price: Price) -> list[str]:
    """What is filled in for clients must be what the model draws, at a sure price."""
    pin = model.pin
    if pin is None or price.knows(pin.size, pin.quality):
        return []
    return [
        f"models.{model.name}.pin: the price of {target.model} does not know size "
        f"{pin.size} with quality {pin.quality}. Pin what it draws, or set auto: bound"
    ]


async def owned_twice(settings: Settings, peppers: keys.Peppers, directory: Directory) -> list[str]:
    """Teams and keys have one owner, the file or the directory: else a limit that one of them
    changes would not be the limit that holds."""
    found = [
        f"teams.{team.id}: a team of this name was made with `gateway team create` too. Give the "
        "one in this file another name"
        for team in await directory.teams()
        if team.id in settings.teams
    ]
    for declared in settings.declared_keys:
        digests = peppers.digests(declared.secret.reveal())
        made = [one for digest in digests if (one := await directory.find_key(digest)) is not None]
        for team, key in made[:1]:
            named = f"the key {declared.name}" if declared.name else "a key"
            found.append(
                f"teams.{declared.team}.keys: {named} was made with `gateway key create` as "
                f"{key.id} of team {team.id} too. Remove it from this file"
            )
    return found


def refuse(settings: Settings, mistakes: Sequence[str]) -> None:
    if mistakes:
        raise CannotServe("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes))


def read_peppers(settings: Settings) -> keys.Peppers:
    """The pepper of the keys, configured or made once beside the database, and those before it.

    Raises ``StoreError`` as ``_read_pepper`` does.
    """
    old = tuple(pepper.reveal().encode() for pepper in settings.storage.old_peppers)
    return keys.Peppers(_read_pepper(settings), old)


def _read_pepper(settings: Settings) -> bytes:
    """Raises ``StoreError`` when the file is unusable: with another one no key would be known."""
    configured = settings.storage.pepper
    if configured:
        return configured.reveal().encode()
    database = settings.storage.database
    if not isinstance(database, Path):
        raise StoreError("storage.pepper must be set where the database is shared")
    path = database.parent / PEPPER_FILE
    try:
        if not path.exists():
            known = keys_in(database)
            if known:
                raise StoreError(
                    f"{path} is missing, and {known} keys in {database} are known "
                    "by it. Restore it from a backup, or set storage.pepper to what it held"
                )
            _make_pepper(path)
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise StoreError(f"{path} cannot be made or read: {error}") from error
    if len(pepper) < 32:
        raise StoreError(
            f"{path} is not a pepper of this gateway; restore it from a backup, or no key will be "
            "known"
        )
    return pepper


def _make_pepper(path: Path) -> None:
    """Makes the file whole or not at all; of two processes that start at once, one wins."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(made, path)
    finally:
        made.unlink()


async def declared_keys(
    settings: Settings, peppers: keys.Peppers, directory: Directory
) -> Declared:
    """The teams and keys of the file. A key's id is the one that the directory remembers: it is
    what the books know the key by, and outlives its pepper. Raises ``LedgerUnavailable``."""
    found: dict[bytes, tuple[Team, Key]] = {}
    for declared in settings.declared_keys:
        secret = declared.secret.reveal()
        digests = peppers.digests(secret)
        proposed = keys.declared_id(keys.digest(peppers.oldest, secret))
        key_id = await directory.declared_id(digests, proposed)
        found[digests[0]] = (settings.teams[declared.team], declared.key(key_id))
    return Declared(settings.teams, found)


def message_id(peppers: keys.Peppers, name: str) -> str:
    """The same in every process, also while a rotation has reached only some of them."""
    return f"msg_{keys.digest(peppers.oldest, f'message {name}').hex()[:32]}"


async def read_bill(settings: Settings, upstream: str, day: date) -> list[BilledItem]:
    """What an upstream billed on a UTC day, by line item, read with its ``admin_key``.

    Raises ``CannotServe`` where it has none, ``BillUnreadable`` for all that can go wrong then.
    """
    configured = settings.upstreams[upstream]
    if configured.kind is Kind.SANDBOX:
        raise BillUnreadable(
            f"upstream {upstream} is a sandbox inside the gateway, and its bill ends with it. Run "
            "`gateway sandbox` and point an upstream of kind openai at it"
        )
    if not configured.admin_key:
        raise CannotServe(
            f"{settings.file}: upstreams.{upstream}.admin_key is not set, and it is what reads a "
            "bill. Set it, or give the upstream's export with --csv FILE"
        )
    with_admin_key = replace(configured, api_keys=(UpstreamKey(key=configured.admin_key),))
    account = make_account(with_admin_key, configured.base_url)
    try:
        found = await read_costs(account, day, day)
    finally:
        await account.aclose()
    if day not in found:
        raise BillUnreadable(
            f"upstream {upstream}: its costs do not have {day} yet; try again later"
        )
    return found[day]


def passes_urls(upstream: UpstreamSettings) -> bool:
    return upstream.image_urls is ImageUrls.PASSTHROUGH


def account_keys(configured: UpstreamSettings) -> list[AccountKey]:
    return [AccountKey(one.key, one.order, one.weight) for one in configured.api_keys]


def make_account(
    configured: UpstreamSettings,
    base_url: str,
    news: AccountNews | None = None,
    numbers: Iterator[int] | None = None,
    mark_key: bytes = b"",
) -> Account:
    """``numbers`` go on where those of an account of this name ended; ``mark_key`` is what its
    keys are marked with."""
    timeouts = configured.timeouts
    return build_account(
        AccountOptions(
            name=configured.name,
            base_url=base_url,
            provider=configured.prices,
            kind=configured.kind.value,
            keys=account_keys(configured),
            timeouts=Timeouts(
                connect=timeouts.connect_seconds,
                write=timeouts.write_seconds,
                first_byte=timeouts.first_byte_seconds,
                total=timeouts.total_seconds,
            ),
            headers={name: value.reveal() for name, value in configured.headers},
            proxy=configured.proxy.reveal() if configured.proxy else None,
            ca_file=str(configured.verify) if isinstance(configured.verify, Path) else None,
            max_connections=configured.max_connections,
            news=news or AccountNews(),
            numbers=count(1) if numbers is None else numbers,
            mark_key=mark_key,
        )
    )


class UpstreamNews(HealthListener):
    """How upstreams are doing, as metrics and as lines of the log. That a key is refused is an
    error: only the owner of the account can mend it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._answered: dict[tuple[str, int], tuple[Move, Move | None]] = {}

    def circuit(self, upstream: str, key: str, state: CircuitState) -> None:
        self._metrics.set("gateway_upstream_circuit_state", state, upstream=upstream, key=key)
        log.warning(
            "an upstream's circuit is another",
            extra={"upstream": upstream, "key": key, "state": state.name.lower()},
        )

    def cooled(self, upstream: str, key: str, seconds: float) -> None:
        self._metrics.add("gateway_upstream_cooldowns_total", upstream=upstream)
        log.warning(
            "an upstream asks to be left alone",
            extra={"upstream": upstream, "key": key, "seconds": round(seconds, 3)},
        )

    def disabled(self, upstream: str, key: str, why: Why, model: str, seconds: float) -> None:
        self._metrics.set(
            "gateway_upstream_key_disabled", 1, upstream=upstream, key=key, why=why.value
        )
        log.error(
            "an upstream refuses a key of this gateway; it is left alone for a while",
            extra={
                "upstream": upstream,
                "key": key,
                "why": why.value,
                "model": model or "all",
                "seconds": seconds,
            },
        )

    def enabled(self, upstream: str, key: str, why: Why) -> None:
        self._metrics.set(
            "gateway_upstream_key_disabled", 0, upstream=upstream, key=key, why=why.value
        )
        log.warning(
            "an upstream's key is left alone no more",
            extra={"upstream": upstream, "key": key, "why": why.value},
        )

    def answered(self, upstream: str, status: int, seconds: float) -> None:
        known = self._answered.get((upstream, status))
        if known is None:
            known = self._answered[upstream, status] = self._moves_of(upstream, status)
        count, took = known
        count(1)
        if took is not None:
            took(seconds)

    def _moves_of(self, upstream: str, status: int) -> tuple[Move, Move | None]:
        """What one answer of an upstream moves: its count and, where there was one, its time."""
        metrics, said = self._metrics, status_class(status)
        count = metrics.adder("gateway_upstream_requests_total", upstream=upstream, status=said)
        if not status:
            return count, None
        return count, metrics.observer("gateway_upstream_first_byte_seconds", upstream=upstream)

    def failed(self, upstream: str, kind: str) -> None:
        self._metrics.add("gateway_upstream_errors_total", upstream=upstream, **{"class": kind})

    def retried(self, upstream: str, outcome: str) -> None:
        self._metrics.add("gateway_upstream_retries_total", upstream=upstream, outcome=outcome)

    def fell_back(self, model: str, to: str) -> None:
        self._metrics.add("gateway_fallbacks_total", model=model, to=to)


def open_result_news(settings: Settings, clock: Clock, metrics: Metrics) -> ResultNews | None:
    """Who is told of asynchronous requests that are over; None where no webhook is configured, or
    there are no results. Raises ``CannotServe``."""
    results = settings.results
    if results.webhook is None or not results.enabled:
        return None
    news = ResultNews(
        # It has its own pauses, longer than those of a message.
        _webhooks(settings, "results.webhook", results.webhook, results.secret, clock, pauses=()),
        clock,
        keep_trying_seconds=results.ttl.total_seconds(),
        counted=lambda outcome: metrics.add("gateway_result_news_total", outcome=outcome),
    )
    metrics.watch("gateway_result_news_waiting", lambda: news.waiting)
    return news


def open_notifier(
    settings: Settings, clock: Clock, counted: Callable[[str], None] = lambda outcome: None
) -> Notifier | None:
    """Who hears of budgets and drifts; nobody where no webhook is configured.

    ``counted`` hears how each message went. Raises ``CannotServe``.
    """
    notify = settings.notify
    if notify.webhook is None:
        return None
    return _webhooks(
        settings, "notify.webhook", notify.webhook, notify.secret, clock, counted=counted
    )


def open_tracing(settings: Settings, metrics: Metrics) -> Spans | None:
    """Who makes spans of receipts; None where no collector is configured, and then nothing of
    OpenTelemetry is loaded. Raises ``CannotServe`` where it is not installed."""
    tracing = settings.tracing
    if tracing.otlp is None:
        return None
    try:
        trace = importlib.import_module("gateway.telemetry.trace")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("opentelemetry"):
            raise
        raise CannotServe(
            f"{settings.file}: tracing.otlp: tracing needs the extra otel, which is not "
            'installed: pip install "image-gateway[otel]"; or remove this setting'
        ) from None
    spans: Spans = trace.Spans(
        tracing.otlp,
        {name: value.reveal() for name, value in tracing.headers},
        version=version("image-gateway"),
        cost=tracing.cost,
        lost=lambda count: metrics.add("gateway_spans_dropped_total", count),
    )
    return spans


def _webhooks(
    settings: Settings,
    setting: str,
    url: Secret,
    secret: Secret | None,
    clock: Clock,
    *,
    counted: Callable[[str], None] = lambda outcome: None,
    pauses: Sequence[float] | None = None,
) -> Webhooks:
    try:
        postbox = WebPostbox(url.reveal())
    except ValueError as error:
        raise CannotServe(f"{settings.file}: {setting}: {error}") from None
    return Webhooks(
        postbox,
        secret.reveal() if secret else None,
        clock,
        counted=counted,
        pauses_seconds=PAUSES_SECONDS if pauses is None else pauses,
    )


def patience_of(settings: Settings) -> Patience:
    """How long clients wait, and what those get who come back."""
    return Patience(settings.relay.max_wait_seconds, settings.relay.on_unknown is OnUnknown.REPEAT)


def file_rules(settings: Settings) -> FileRules:
    """What holds for `/v1/files`."""
    files = settings.files
    return FileRules(
        _place(settings, files.enabled, files.upstream), files.max_bytes, files.max_total_bytes
    )


def check_rules(settings: Settings) -> CheckRules:
    """What holds for moderations and provenance."""
    moderations, provenance = settings.moderations, settings.provenance
    return CheckRules(
        _place(settings, moderations.enabled, moderations.upstream),
        _place(settings, provenance.enabled, provenance.upstream),
        settings.server.max_file_bytes,
    )


def _place(settings: Settings, enabled: bool, named: str | None) -> Place:
    """Where something is passed on to: as configured, else the first upstream that is on."""
    first = next((name for name, one in settings.upstreams.items() if one.ready), "")
    return Place(enabled, first if named is None else named)


def read_rules(settings: Settings, image_urls: bool) -> ReadRules:
    server = settings.server
    return ReadRules(
        max_json_bytes=server.max_json_bytes,
        max_form_bytes=server.max_form_bytes,
        max_file_bytes=server.max_file_bytes,
        max_pixels=server.max_pixels,
        max_side=server.max_side,
        image_urls_allowed=image_urls,
        responses=ResponseRules(
            enabled=settings.responses.enabled,
            without_image_tool=(settings.responses.without_image_tool is WithoutImageTool.ALLOW),
            max_output_tokens=settings.responses.max_output_tokens,
            max_tool_calls=settings.responses.max_tool_calls,
        ),
    )
