"""The way out: name, address, certificate and keys of each upstream. Nothing that costs is sent."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from difflib import get_close_matches
from urllib.parse import urlsplit

from gateway.assembly import make_account, price_book
from gateway.doctor.clocks import compared, date_of
from gateway.doctor.files import place_of_keys
from gateway.doctor.finding import Check, Finding, Topic, counted, is_failed
from gateway.doctor.prices import ends, has_spoken
from gateway.domain.address import address_of, is_never_an_upstream
from gateway.domain.errors import GatewayError
from gateway.domain.price import PriceBook
from gateway.ports import Clock, Outgoing
from gateway.pricefile import PriceFileError
from gateway.relay.failover import BILLING_CODES
from gateway.settings import Kind, Settings, Timeouts, Upstream, UpstreamKey
from gateway.upstream.account import split_base_url
from gateway.upstream.glance import addresses, shake_hands
from gateway.upstream.wire import Origin

DNS_SECONDS = 4.0
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0
MAX_LIST_BYTES = 4 * 1024 * 1024
EXPIRES_SOON = timedelta(days=14)
NO_LIST = frozenset({404, 405, 501})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a key was answered. ``models`` is None where the body is no list of models, else each
    id with the day its provider names as its last. ``code`` is the error's."""

    status: int
    seconds: float
    code: str = ""
    lacks_scope: bool = False
    models: Mapping[str, date | None] | None = None
    said_date: datetime | None = None
    redirect: str = ""


async def upstream(settings: Settings, configured: Upstream, clock: Clock) -> Check:
    """One upstream: is it there, is it who it says, does it take our keys, has it our models?"""
    topic = Topic("upstream", configured.name)
    if configured.kind is Kind.SANDBOX:
        yield topic.ok("a sandbox inside the gateway: it needs no network, and draws for nothing")
        return
    if not configured.ready:
        yield topic.skipped("off: it has no key")
        return
    origin, _ = split_base_url(configured.base_url)
    ca_file = str(configured.verify) if configured.verify is not True else None
    if configured.proxy is not None:
        way, trusted = _origin_of(configured.proxy.reveal()), None
        yield topic.ok(f"goes through the forward proxy {way.authority}, which resolves its name")
    else:
        way, trusted = origin, ca_file
    met = await reach(topic, way, trusted, clock.now())
    for finding in met:
        yield finding
    if is_failed(met):
        return
    keys = configured.api_keys
    answers = await asyncio.gather(*(ask(configured, key, clock) for key in keys))
    for number, answer in enumerate(answers, 1):
        name = f"key {number}" if len(keys) == 1 else f"key {number} of {len(keys)}"
        where = place_of_keys(settings, configured.name, number)
        yield judge_answer(topic, name, where, answer)
    told = next((one for one in answers if isinstance(one, Answer) and one.models), None)
    if told is not None and told.models is not None:
        for finding in judge_models(settings, configured.name, told.models, clock.now().date()):
            yield finding
    dated = next((one for one in answers if isinstance(one, Answer) and one.said_date), None)
    if dated is not None and dated.said_date is not None:
        yield compared(
            f"upstream {configured.name}", dated.said_date, clock.now(), dated.seconds, 1.0
        )


async def reachable(topic: Topic, url: str, now: datetime) -> Check:
    """Whether news, or spans, could be posted there; nothing is."""
    for finding in await reach(topic, _origin_of(url), None, now):
        yield finding


async def reach(topic: Topic, origin: Origin, ca_file: str | None, now: datetime) -> list[Finding]:
    """The name, the address and the certificate of an origin."""
    try:
        async with asyncio.timeout(DNS_SECONDS):
            found = await addresses(origin)
    except TimeoutError:
        return [
            topic.fail(
                f"{origin.host} is not resolved within {DNS_SECONDS:g} s",
                "look at the name servers of this machine: /etc/resolv.conf, a firewall on port 53",
            )
        ]
    except (OSError, UnicodeError):
        return [
            topic.fail(
                f"the name {origin.host} does not resolve",
                "mend its spelling in the url, or the DNS of this machine",
            )
        ]
    if refused := [one for one in found if _is_never_an_upstream(one)]:
        return [
            topic.fail(
                f"{origin.host} resolves to {refused[0]}, which is link-local, or a cloud's "
                "metadata service",
                "mend the DNS, or the url: keys must not be sent there",
            )
        ]
    try:
        met = await shake_hands(origin, ca_file, CONNECT_SECONDS)
    except ssl.SSLCertVerificationError as error:
        return [topic.fail(_said_of(error, origin), _fix_of(error, ca_file))]
    except ssl.SSLError as error:
        why = (error.reason or "no TLS").lower().replace("_", " ")
        return [
            topic.fail(
                f"{origin.authority} does not speak TLS as it should: {why}",
                "is the port right, and is it https there?",
            )
        ]
    except TimeoutError:
        return [
            topic.fail(
                f"{origin.authority} ({found[0]}) does not connect within {CONNECT_SECONDS:g} s",
                "let this machine out to it: firewall, NetworkPolicy, security group, route",
            )
        ]
    except ConnectionRefusedError:
        return [
            topic.fail(
                f"{origin.authority} ({found[0]}) refuses connections: nobody listens on port "
                f"{origin.port}",
                "start it, or mend the port in the url",
            )
        ]
    except OSError as error:
        return [
            topic.fail(
                f"{origin.authority} ({found[0]}) cannot be reached: {error.strerror or error}",
                "let this machine out to it: firewall, NetworkPolicy, security group, route",
            )
        ]
    where = f"{origin.authority} ({_described(found)}) connects in {met.seconds * 1000:.0f} ms"
    if met.expires is None:
        return [topic.ok(where)]
    left = met.expires - now
    if left < EXPIRES_SOON:
        return [
            topic.warn(
                f"{where}; its certificate ends in {counted(left.days, 'day')}, on "
                f"{met.expires:%Y-%m-%d}",
                "renew it, or ask who runs it to: from then on no call is sent",
            )
        ]
    return [topic.ok(f"{where}, {met.protocol}, certificate good for {counted(left.days, 'day')}")]


async def ask(configured: Upstream, key: UpstreamKey, clock: Clock) -> Answer | str:
    """The answer to a call that costs nothing, or why there is none."""
    seconds = min(ANSWER_SECONDS, configured.timeouts.total_seconds)
    brief = Timeouts(
        connect_seconds=CONNECT_SECONDS,
        write_seconds=CONNECT_SECONDS,
        first_byte_seconds=seconds,
        total_seconds=seconds,
    )
    alone = replace(configured, api_keys=(key,), timeouts=brief)
    account = make_account(alone, alone.base_url)
    began = clock.monotonic()
    try:
        reply = await account.send(
            Outgoing("GET", "/models", (("accept", "application/json"),)),
            account.credentials[0].id,
        )
        took = clock.monotonic() - began
        body = bytearray()
        try:
            async for chunk in reply.chunks():
                body += chunk
                if len(body) > MAX_LIST_BYTES:
                    break
        finally:
            await reply.aclose()
        return _read(reply.status, took, reply.headers, bytes(body))
    except GatewayError as error:
        return str(getattr(error, "reason", "") or "no answer")
    finally:
        await account.aclose()


def judge_answer(topic: Topic, name: str, where: str, answer: Answer | str) -> Finding:
    """What the answer to a key says of it."""
    if isinstance(answer, str):
        return topic.fail(
            f"{name}: no answer to GET /models ({answer})",
            "try again; if it stays so, ask the provider, or whoever runs the way to it",
        )
    code = f" {answer.code}" if answer.code else ""
    said = f"{name}: {answer.status}{code} from GET /models"
    if answer.status == 402 or answer.code in BILLING_CODES:
        return topic.fail(f"{said}: its account cannot pay", f"pay the provider, or change {where}")
    if answer.status in (401, 403) and answer.lacks_scope:
        return topic.warn(
            f"{name}: known, but it may not list models; whether it may draw cannot be seen for "
            "nothing",
            f"allow it to read models at the provider ({where}), or draw one picture by hand",
        )
    if answer.status in (401, 403):
        return topic.fail(f"{said}: it is refused", f"put a valid key into {where}")
    if answer.status in NO_LIST:
        return topic.skipped(
            f"{name}: {answer.status} from GET /models: no list of models there, so that the key "
            "cannot be tried for nothing; a provider that has one has it under another path than "
            f"upstreams.{topic.subject}.base_url says"
        )
    if answer.status == 429:
        return topic.warn(
            f"{said}: it is at its rate limit now", "ask the provider for more, or add a key"
        )
    if answer.redirect or 300 <= answer.status < 400:
        return topic.fail(
            f"{name}: {answer.status} from GET /models: redirects are never followed",
            f"write the address that it leads to into upstreams.{topic.subject}.base_url",
        )
    if answer.status >= 500:
        return topic.warn(f"{said}: the provider fails", "try again in a minute")
    if answer.status != 200:
        return topic.warn(f"{said}", f"look at upstreams.{topic.subject}.base_url")
    if answer.models is None:
        return topic.warn(
            f"{name}: 200 from GET /models, but that is no list of models",
            f"is upstreams.{topic.subject}.base_url right? It usually ends in /v1",
        )
    return topic.ok(f"{name} accepted (GET /models, {answer.seconds * 1000:.0f} ms)")


def judge_models(
    settings: Settings, upstream: str, served: Mapping[str, date | None], today: date
) -> Iterator[Finding]:
    """Configured models that the provider does not list, or says that it ends. Of those that the
    price list says so of, with what takes their place, it says nothing again; only that one ends
    earlier."""
    try:
        book = price_book(settings)
    except PriceFileError:
        book = PriceBook(())
    missing = gone = 0
    for model in settings.catalogue.models.values():
        for target in model.targets:
            if target.upstream != upstream:
                continue
            known = has_spoken(settings, book, target, today)
            if target.model not in served and known is not None:
                gone += 1
                continue
            if target.model not in served:
                missing += 1
                near = get_close_matches(target.model, list(served), n=1)
                asked = f"did you mean {near[0]}? " if near else ""
                yield Topic("models", model.name).warn(
                    f"{upstream} does not list {target.model}",
                    f"{asked}Mend models.{model.name}, or ask the provider to open it to this key",
                )
                continue
            day = served[target.model]
            if day is not None and known is not None and known <= day:
                continue
            found = ends(model.name, target.model, upstream, day, today) if day else None
            if found is not None:
                yield found
    if not missing:
        but = " but those that have ended, or end soon" if gone else ""
        yield Topic("upstream", upstream).ok(
            f"lists {counted(len(served), 'model')}, and all that are configured{but}"
        )


def _read(status: int, seconds: float, headers: Mapping[str, str], body: bytes) -> Answer:
    said_date = date_of(headers.get("date", ""))
    answer = Answer(status, seconds, said_date=said_date, redirect=headers.get("location", ""))
    try:
        found = json.loads(body)
    except ValueError:
        return answer
    if not isinstance(found, dict):
        return answer
    error = found.get("error")
    if isinstance(error, dict):
        code = str(error.get("code") or error.get("type") or "")
        return replace(
            answer,
            # Never its message, which may hold a part of the key.
            code=code if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", code) else "",
            lacks_scope="missing scopes" in str(error.get("message", "")).lower(),
        )
    rows = found.get("data")
    if status != 200 or not isinstance(rows, list):
        return answer
    return replace(answer, models=_models(rows))


def _models(rows: Sequence[object]) -> Mapping[str, date | None]:
    found: dict[str, date | None] = {}
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            try:
                found[row["id"]] = date.fromisoformat(str(row.get("shutdown_date")))
            except ValueError:
                found[row["id"]] = None
    return found


def _origin_of(url: str) -> Origin:
    parts = urlsplit(url)
    tls = parts.scheme.lower() == "https"
    host = (parts.hostname or "").encode("idna").decode("ascii")
    return Origin(tls, host, parts.port or (443 if tls else 80))


def _is_never_an_upstream(text: str) -> bool:
    address = address_of(text)
    return address is not None and is_never_an_upstream(address)


def _described(found: Sequence[str]) -> str:
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    inside = "" if ipaddress.ip_address(found[0].partition("%")[0]).is_global else ", private"
    return f"{found[0]}{more}{inside}"


def _said_of(error: ssl.SSLCertVerificationError, origin: Origin) -> str:
    return f"the certificate of {origin.authority} is refused: {error.verify_message.rstrip('.')}"


EXPIRED, NOT_YET = 10, 9
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and its opposite."""


def _fix_of(error: ssl.SSLCertVerificationError, ca_file: str | None) -> str:
    if error.verify_code == NOT_YET:
        return "look at the clock of this machine, and at the certificate's first day"
    if error.verify_code == EXPIRED:
        return (
            "renew it, or ask who runs the upstream to; if it is new, look at this machine's clock"
        )
    if "mismatch" in error.verify_message:
        return "write the name that is in the certificate into base_url, or have the server mended"
    if ca_file:
        return f"{ca_file} does not hold who signed it: put that authority in there"
    return "if a company's own authority signed it, give its file: verify: /path/ca.pem"
