"""From where, at what price: a call becomes a plan. Pure but for one look into the cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Protocol

from gateway.domain.call import Call, Change
from gateway.domain.charge import Quote
from gateway.domain.compat import Compat, merged
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    ModelRetired,
    UpstreamAccount,
)
from gateway.domain.fingerprint import fingerprint
from gateway.domain.ledger import Line
from gateway.domain.money import Money, say_dollars
from gateway.domain.owned import Anchor
from gateway.domain.price import (
    FACTOR_ONE,
    OPEN,
    Bound,
    CannotPrice,
    Confidence,
    PriceBook,
    PriceList,
    PriceRow,
    raised,
)
from gateway.domain.price_response import drawn as drawn_picture
from gateway.domain.price_response import row_of
from gateway.domain.quota import Demand, Limit, Scope
from gateway.domain.receipt import CacheResult
from gateway.domain.record import record
from gateway.domain.route import OTHER, Catalogue, Model, Pin, Target, Unpriced
from gateway.domain.team import Caller
from gateway.ports import Cache, Cached, Upstream
from gateway.relay.compat import alias_of, repaired
from gateway.relay.naming import Names, refuse_kind
from gateway.relay.offers import Offer, Offers, Place
from gateway.relay.plan_response import served, tool_beside, tool_param, with_tool
from gateway.relay.retirement import Retirements, Sunset
from gateway.relay.strict import validate_strict


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What the operator allows: ``scope`` is team, key or organization; ``ttl`` in seconds."""

    enabled: bool = True
    scope: str = "team"
    ttl_seconds: float = 86_400.0
    max_entry_bytes: int = 64 * 1024 * 1024


@record
class CacheWish:
    """What the client's ``Cache-Control`` asks for. ``max_age`` is in seconds."""

    read: bool = True
    write: bool = True
    max_age: int | None = None


@record
class Way:
    """One way to an answer: the configured model, where it is served, and what it costs there.
    ``rests``: when it was planned, each key of its upstream was to be left alone."""

    model: Model
    target: Target
    upstream: Upstream
    quote: Quote
    rests: bool = False
    call: Call | None = None
    """The call as it is repaired for this way, where that is not as for the first."""

    def call_of(self, plan: Plan) -> Call:
        """What is sent this way."""
        return plan.call if self.call is None else self.call


@record
class Routed:
    """A call whose model is known, before anything is looked up. ``call`` is repaired.
    ``enabled``: it may be looked up in the cache, and kept there under
    ``fingerprint``, which does not depend on which upstream it will be sent to. ``linked``: it
    names pictures by their addresses alone."""

    caller: Caller
    call: Call
    model: Model
    offer: Offer
    """Its model as it was on the day of that."""
    fingerprint: str
    enabled: bool
    linked: bool
    tool: Model | None = None
    """The model behind the image tool of a response."""
    anchor: Anchor | None = None
    """Where what it names by an id lives: it can go nowhere else."""


@record
class Plan:
    """One call, decided: whose, from where, at what price, and under which name it is cached.

    ``ways`` are in the order they are to be tried in: those of ``asked``, the model that was asked
    for, then those of its fallbacks. ``keep``: the answer may be put into the cache, under
    ``fingerprint``. ``rates`` are the gate's limits, ``lines`` the ledger's accounts in their
    periods. ``call`` is what is bought: with what is pinned filled in.
    """

    caller: Caller
    call: Call
    asked: Model
    ways: tuple[Way, ...]
    demand: Demand
    rates: tuple[Limit, ...]
    lines: tuple[Line, ...]
    fingerprint: str
    cache: CacheResult
    keep: bool
    at: datetime
    """The one instant that its periods and its day of usage are counted from."""
    cached: Cached | None = None
    sunsets: tuple[Sunset, ...] = ()
    """Where a model that was asked for, or the one behind the image tool, is soon served no more:
    the client is told."""
    anchor: Anchor | None = None
    """The upstream of all its ways, and the key that it goes with."""
    tool: Model | None = None
    """The model behind the image tool of a response."""

    def forget_prompt(self) -> None:
        """Once it is held for: what is still to be asked of the call is not asked of its text."""
        for way in self.ways:
            way.call_of(self).forget_prompt()

    @property
    def way(self) -> Way:
        """The first, which the call is reserved for."""
        return self.ways[0]

    @property
    def model(self) -> Model:
        return self.way.model

    @property
    def target(self) -> Target:
        return self.way.target

    @property
    def upstream(self) -> Upstream:
        return self.way.upstream

    @property
    def quote(self) -> Quote:
        return self.way.quote

    @property
    def entrances(self) -> tuple[str, ...]:
        """The upstreams that the call may go to first, in order: those of the first model that do
        not rest, or the first there is. For a crowd alone nobody is given another model."""
        if len(self.ways) == 1:
            return (self.way.upstream.name,)
        awake = [way for way in self.ways if way.model is self.model and not way.rests]
        return tuple(dict.fromkeys(way.upstream.name for way in awake or self.ways[:1]))

    def entered_at(self, upstream: str) -> Plan:
        """The same, the first way of the first model that goes there before all others."""
        if self.way.upstream.name == upstream:
            return self
        first = next(
            way for way in self.ways if way.model is self.model and way.upstream.name == upstream
        )
        ways = (first, *(way for way in self.ways if way is not first))
        demand = replace(self.demand, money=first.quote.bound.amount)
        return replace(self, ways=ways, demand=demand)


STOOD_IN_FOR = (UpstreamAccount, ModelRetired)
"""What a fallback helps against: nothing is wrong with the request."""


class Chooser(Protocol):
    """``random.Random``, as far as it is used here."""

    def random(self) -> float: ...


def _as_priced(upstream: str, model: str) -> int:
    return FACTOR_ONE


def _well(upstream: Upstream, model: str) -> bool:
    return True


class Planner:
    """Holds what is configured; makes a plan for each call."""

    def __init__(
        self,
        catalogue: Catalogue,
        upstreams: Mapping[str, Upstream],
        prices: PriceBook,
        cache: Cache,
        policy: CachePolicy,
        passing_urls: frozenset[str] = frozenset(),
        factor_of: Callable[[str, str], int] = _as_priced,
        usable: Callable[[Upstream, str], bool] = _well,
        chooser: Chooser | None = None,
        *,
        compat: Compat | None = None,
        hosting: bool = False,
    ) -> None:
        """``passing_urls`` are the upstreams that may be given addresses of pictures;
        ``factor_of`` says by what a model's bounds are raised at an upstream, in millionths;
        ``usable`` whether an upstream can be asked for a model of its own now; ``compat`` what is
        repaired where neither a model nor a key says otherwise, and ``hosting`` whether pictures
        can be handed over by urls."""
        self._catalogue = catalogue
        self._upstreams = upstreams
        self._offers = Offers(upstreams, prices)
        self._cache = cache
        self._policy = policy
        self._passing_urls = passing_urls
        self._factor_of = factor_of
        self._usable = usable
        self._chooser = chooser or random.Random()
        self._compat = compat or Compat()
        self._hosting = hosting
        self.retirements = Retirements(catalogue, self._offers)
        self._names = Names(catalogue, self.retirements)

    def repaired(self, caller: Caller, call: Call, now: datetime) -> Call:
        """The call for a model that is configured, with what older clients send mended and what
        was left open pinned. Raises ``ModelNotFound``, ``ModelNotAllowed``, ``ModelRetired``,
        ``InvalidRequest``."""
        base, said = self._compat, caller.key.compat
        if said is not None:
            base = merged(base, said)
        model = self._names.asked(caller, call, base, now.date())
        try:
            mended = self._repaired(caller, call, model, model, model.target.model)
        except InvalidRequest:
            # Nothing is to be mended of a call for what is gone.
            gone = self.retirements.over(caller, model, now.date())
            if gone is None or model.fallbacks:
                raise
            raise gone from None
        if mended.asks is not None:
            mended = self._names.with_tool(mended, base)
        # As it came it is needed where it may yet be sent another way.
        return replace(mended, came=call) if model.others or model.fallbacks else mended

    def as_served(self, caller: Caller, call: Call, name: str, served: str) -> Call:
        """A repaired call as it was sent where the configured model ``name`` is ``served``: it may
        have stood in, and wants other repairs. The same call where that makes no difference, or is
        not known."""
        asked, other = self._catalogue.find(call.model), self._catalogue.find(name)
        if asked is None or other is None:
            return call
        try:
            return self._sent_as(caller, call, asked, other, served) or call
        except InvalidRequest:
            return call

    def _repaired(
        self, caller: Caller, call: Call, asked: Model, model: Model, served: str
    ) -> Call:
        """What the asked model pins holds wherever the call goes: its price was asked for."""
        compat = self._compat
        if model.compat is not None or caller.key.compat is not None:
            compat = merged(compat, model.compat, caller.key.compat)
        mended = repaired(call, model, compat, hosting=self._hosting, served=served)
        return mended if asked.pin is None else _pinned(mended, asked.pin)

    def _sent_as(
        self, caller: Caller, call: Call, asked: Model, model: Model, served: str
    ) -> Call | None:
        """A repaired call as ``model`` needs it where it is ``served``; None where that is as it
        is, but for the model's name. Raises ``InvalidRequest`` where it cannot be repaired for
        that."""
        came = call.came
        if came is None or call.asks is not None:
            return None
        if model.name == asked.name and served == asked.target.model:
            return None
        other = replace(
            self._repaired(caller, came, asked, model, served), inputs=call.inputs, came=came
        )
        told = (_but_model(call), call.mends, call.answer_as)
        return other if (_but_model(other), other.mends, other.answer_as) != told else None

    def route_call(
        self, caller: Caller, call: Call, now: datetime, anchor: Anchor | None = None
    ) -> Routed:
        """Which model a call, once it is repaired, is for, and by what name it is known; nothing
        is looked up. ``anchor`` is where the ids that it names live. Raises ``ModelNotFound``,
        ``ModelNotAllowed``, ``InvalidRequest``, and ``ModelRetired`` for a name that no entry
        routes; where an entry does, ``plan`` raises it, for an answer may be kept."""
        today = now.date()
        model = self._names.find(caller, call.model, today)
        tool = None
        if call.asks is not None:
            tool = self._names.tool(caller, call, lambda one: self.row(one, now), today)
        offer = self._offers.of(model, today)
        # What is gone is said to be gone, before anything that it would not have taken.
        over = offer.over
        if tool is not None and not over:
            over = self.retirements.is_over(tool, today)
        if not over:
            if call.asks is not None or offer.only_writes:
                drawing = None if tool is None else self.row(tool, now)
                refuse_kind(call, model, offer.row, drawing)
            if call.asks is not None or model.strict or model.refuse_unknown:
                _judge(call, model, tool)
        # A picture known by its address alone (it has no size) is fetched by the upstream, and
        # what stands there may change: it is passed on only where that is allowed, never cached.
        linked = bool(call.inputs) and any(picture.size_bytes == 0 for picture in call.inputs)
        if linked and not over and not any(self._passes(target) for target in model.targets):
            raise InvalidRequest(
                f"{model.name} does not take addresses of pictures on this gateway. Send the "
                "picture itself, as a data URL or a file of a multipart form.",
                code="image_url_not_allowed",
                param="image_url",
                reason="ssrf_blocked",
            )
        mark = fingerprint(
            call,
            scope=self._scope(caller),
            model_served=model.target.model,
            upstream=model.target.upstream,
        )
        enabled = self._policy.enabled and caller.team.cache_enabled and model.cache_enabled
        # Whoever talks to a model wants an answer of its own.
        enabled = enabled and not linked and call.asks is None
        return Routed(caller, call, model, offer, mark, enabled, linked, tool, anchor)

    async def plan(self, routed: Routed, wish: CacheWish, now: datetime) -> Plan:
        """A kept answer, or the ways to a new one. Raises ``InvalidRequest``, ``ModelRetired``,
        ``UpstreamAccount``."""
        caller, call, model = routed.caller, routed.call, routed.model
        cached, offer = None, routed.offer
        if routed.enabled and wish.read and not offer.over:
            cached = await self._look_up(routed.fingerprint, call, wish, now)
        rates = caller.rates
        sunsets: tuple[Sunset, ...] = ()
        if offer.last is not None or routed.tool is not None:
            drawing = None if routed.tool is None else tool_beside(routed.tool, model)
            both, today = [one for one in (model, drawing) if one], now.date()
            ending = [self.retirements.sunset(caller, one, today) for one in both]
            sunsets = tuple([sunset for sunset in ending if sunset is not None])
        if cached is not None:
            nothing = Quote(Bound(0, Confidence.HARD), PriceList({}), None)
            kept = Way(model, model.target, self._upstreams[model.target.upstream], nothing)
            return Plan(
                caller, call, model, (kept,), Demand(), rates, (), routed.fingerprint,
                CacheResult.HIT, False, now, cached, sunsets,
            )  # fmt: skip
        ways = self._ways(routed, now)
        # The first has one, where any has: nearly always.
        priced = ways[0].quote.row is not None or any(way.quote.row for way in ways)
        return Plan(
            caller=caller,
            call=call,
            asked=model,
            ways=ways,
            demand=Demand(images=call.n, money=ways[0].quote.bound.amount),
            rates=rates,
            lines=caller.lines(now),
            fingerprint=routed.fingerprint,
            cache=CacheResult.MISS if routed.enabled else CacheResult.OFF,
            keep=routed.enabled and wish.write and priced,
            at=now,
            sunsets=sunsets,
            anchor=routed.anchor,
            tool=routed.tool,
        )

    def route(self, caller: Caller, name: str, now: datetime) -> Model:
        """The model behind a name, if this caller may use it. Raises ``ModelNotFound``,
        ``ModelNotAllowed``, and ``ModelRetired`` where no entry routes what is gone."""
        return self._names.find(caller, name, now.date())

    def named(self, caller: Caller, name: str, now: datetime) -> Model:
        """The same, of a name that may be an alias."""
        compat = merged(self._compat, caller.key.compat)
        return self.route(caller, alias_of(name, self._catalogue.models, compat), now)

    def models(self, caller: Caller, now: datetime) -> list[Model]:
        """Every configured model that the caller may use and that is still served, by name."""
        return self._names.serving(caller, now.date())

    def row(self, model: Model, now: datetime) -> PriceRow | None:
        """The price of a model today: at the first of its upstreams that has one, and still serves
        it."""
        return self._offers.of(model, now.date()).row

    def _passes(self, target: Target) -> bool:
        return target.upstream in self._passing_urls

    def _ways(self, routed: Routed, now: datetime) -> tuple[Way, ...]:
        """Every way that is on, has a price and costs no more than a call may, in the order they
        are to be tried in. Raises what the first of the asked model's own is refused for where
        none of those is left; what is off or retired alone may be stood in for."""
        model = routed.model
        found, refusals = self._ways_of(routed, model, routed.offer, now)
        if not found:
            mistakes = [error for error in refusals if not isinstance(error, STOOD_IN_FOR)]
            if mistakes:
                raise mistakes[0]
        for name in model.fallbacks:
            other = self._catalogue.find(name)
            if other is None or not routed.caller.may_use(name):
                continue
            try:
                first = other.target.model
                sent = self._sent_as(routed.caller, routed.call, model, other, first)
                _judge(sent or routed.call, other, routed.tool)
            except InvalidRequest:
                continue
            offer = self._offers.of(other, now.date())
            found += self._ways_of(routed, other, offer, now)[0]
        if not found:
            raise refusals[0]
        return tuple(found)

    def _ways_of(
        self, routed: Routed, model: Model, offer: Offer, now: datetime
    ) -> tuple[list[Way], list[GatewayError]]:
        """A model's own ways, and why others of its targets are none."""
        found: list[Way] = []
        refusals: list[GatewayError] = []
        if offer.over or routed.tool is not None:
            gone = self._gone(routed, model, now.date())
            if gone is not None:
                return found, [gone]
        places: Sequence[Place] = offer.places
        if len(places) > 1:
            places = _drawn(places, self._chooser)
        for place in places:
            target, upstream, sent = place.target, place.upstream, None
            if routed.linked and not self._passes(target):
                continue
            if routed.anchor is not None and target.upstream != routed.anchor.upstream:
                continue
            if place.retired:
                retired = self.retirements.refusal(routed.caller, model, target, now.date())
                if retired is not None:
                    refusals.append(retired)
                    continue
            if not upstream.ready:
                refusals.append(_off(model, upstream))
                continue
            try:
                if routed.tool is not None:
                    target = with_tool(target, routed.tool, routed.call)
                    self._refuse_retired(routed.caller, routed.tool, target, now)
                if routed.call.came is not None:
                    sent = self._sent_as(
                        routed.caller, routed.call, routed.model, model, target.model
                    )
                quote = self._quote(routed, sent or routed.call, model, place, target, now)
            except (InvalidRequest, ModelRetired) as error:
                refusals.append(error)
            else:
                rests = not self._usable(upstream, target.model)
                found.append(Way(model, target, upstream, quote, rests, sent))
        if not found and not refusals:
            refusals.append(_elsewhere(model, routed))
        if len(found) > 1:
            found.sort(key=lambda way: way.rests)
        return found, refusals

    def _gone(self, routed: Routed, model: Model, today: date) -> ModelRetired | None:
        """Why none of a model's targets is one any more, or none of those that its image tool's
        model has beside it."""
        gone = self.retirements.over(routed.caller, model, today)
        ask = routed.call.asks
        if gone is not None or routed.tool is None or ask is None or ask.tool is None:
            return gone
        drawing = tool_beside(routed.tool, model)
        gone = None if drawing is None else self.retirements.over(routed.caller, drawing, today)
        if gone is not None:
            gone.param = tool_param(ask.tool)
        return gone

    def _refuse_retired(self, caller: Caller, tool: Model, target: Target, now: datetime) -> None:
        """Raises ``ModelRetired`` where what the tool would draw with is not served any more."""
        drawing = replace(target, model=target.tool)
        retired = self.retirements.refusal(caller, tool, drawing, now.date())
        if retired is not None:
            retired.param = "tools"
            raise retired

    def _scope(self, caller: Caller) -> str:
        match self._policy.scope:
            case "key":
                return f"key:{caller.key.id}"
            case "organization":
                return "organization"
            case _:
                return f"team:{caller.team.id}"

    async def _look_up(
        self, mark: str, call: Call, wish: CacheWish, now: datetime
    ) -> Cached | None:
        cached = await self._cache.get(mark)
        if cached is None:
            return None
        age = (now - cached.meta.stored_at).total_seconds()
        limits = [self._policy.ttl_seconds]
        if wish.max_age is not None:
            limits.append(wish.max_age)
        # A stream has no agreed form for several pictures, so only one is replayed as one event.
        fits = not call.stream or cached.meta.streamable
        return cached if fits and age <= min(limits) else None

    def _quote(
        self, routed: Routed, sent: Call, model: Model, place: Place, target: Target, now: datetime
    ) -> Quote:
        """``target`` is that of ``place``, with the name of its tool."""
        caller, call = routed.caller, sent if sent.asks is None else served(sent, target)
        prices, row = place.prices, place.row
        most = caller.max_cost_per_request
        picture = prices.find(target.tool) if target.tool else None
        draws = "" if routed.tool is None else routed.tool.name
        if row is None:
            return Quote(
                self._unpriced_bound(caller, model, most, now.date()), prices, None, draws=draws
            )
        if routed.tool is not None and picture is None:
            bound = self._unpriced_bound(caller, routed.tool, most, now.date())
            return Quote(bound, prices, None, draws=draws)
        try:
            row = row if call.asks is None else row_of(row, picture)
            base = row.price.bound(call, prices)
        except CannotPrice as error:
            raise InvalidRequest(
                f"{error} That is for the gateway's operator to do.",
                code="model_not_priced",
                param=error.param,
                reason="unpriced",
            ) from error
        factor = self._factor_of(target.upstream, target.model)
        bound = base if factor <= FACTOR_ONE else raised(base, factor)
        quote = Quote(bound, prices, row, base.amount, factor, draws)
        if most is not None and quote.bound.amount > most:
            raise _too_dear(caller, call, quote, most)
        return quote

    def _unpriced_bound(
        self, caller: Caller, model: Model, most: Money | None, today: date
    ) -> Bound:
        if model.unpriced is Unpriced.REFUSE:
            hint = ""
            if model.label == OTHER and (near := self._names.hint(caller, model.name, today)):
                hint = f"{near} GET /v1/models lists yours."
            raise InvalidRequest(
                f"{model.name} has no price on this gateway, so nothing is bought.{hint} "
                "Ask the gateway's operator to add one.",
                code="model_not_priced",
                param="model",
                reason="unpriced",
            )
        if most is None and caller.has_budget:
            raise InvalidRequest(
                f"{model.name} has no price on this gateway, and team {caller.team.id} has a hard "
                "budget. Ask the gateway's operator for a price, or for max_cost_per_request.",
                code="model_not_priced",
                param="model",
                reason="unpriced",
            )
        return Bound(most or 0, Confidence.SOFT)


def drawn(weights: Sequence[int], chooser: Chooser) -> Iterable[int]:
    """The places of ``weights``, each drawn from those that are left, by its weight."""
    left = list(range(len(weights)))
    while len(left) > 1:
        point = chooser.random() * sum(weights[place] for place in left)
        for place in left:
            point -= weights[place]
            if point < 0:
                break
        left.remove(place)
        yield place
    yield from left


def _drawn(places: Sequence[Place], chooser: Chooser) -> Sequence[Place]:
    """By order, and those of one order as they are drawn."""
    found: list[Place] = []
    for order in sorted({place.target.order for place in places}):
        equal = [place for place in places if place.target.order == order]
        found += (equal[at] for at in drawn([place.target.weight for place in equal], chooser))
    return found


def _judge(call: Call, model: Model, tool: Model | None) -> None:
    """What a model of the operator's does not take; of a response that is the one that draws, and
    the pictures are the other's to read. Raises ``InvalidRequest``."""
    if call.asks is not None:
        if tool is None:
            return
        call, model = replace(drawn_picture(call), inputs=()), tool
    if model.strict:
        validate_strict(call, model.target.model)
    if model.refuse_unknown and call.unknown:
        name = min(call.unknown)[:64]
        raise InvalidRequest(
            f"Unknown parameter: '{name}'. {model.name} takes only what this gateway knows "
            "the price of. Remove it.",
            code="unknown_parameter",
            param=name,
            reason="unpriced",
        )


def _but_model(call: Call) -> tuple[Change, ...]:
    return tuple(change for change in call.changes if change.name != "model")


def _elsewhere(model: Model, routed: Routed) -> InvalidRequest:
    """What a call is told whose model is not served where the ids that it names live."""
    param = routed.call.references[0].param if routed.call.references else "id"
    there = routed.anchor.upstream if routed.anchor is not None else "another one"
    others = ", ".join(dict.fromkeys(target.upstream for target in model.targets))
    return InvalidRequest(
        f"'{param}' lives at the upstream {there}, and {model.name} is served by {others}. Send "
        f"the picture itself, or ask for a model that {there} serves.",
        code="file_elsewhere",
        param=param,
        reason="invalid_param",
    )


def _off(model: Model, upstream: Upstream) -> UpstreamAccount:
    return UpstreamAccount(
        f"This gateway has no key for its upstream {upstream.name} yet, so {model.name} is "
        f"off. The gateway's operator has to put one into upstreams.{upstream.name}.api_keys.",
        code="upstream_off",
        reason="upstream_off",
    )


def _pinned(call: Call, pin: Pin | None) -> Call:
    """The call with what its client left open filled in. What was said is never touched."""
    if pin is None or call.asks is not None:
        return call
    wanted = (("size", call.size, pin.size), ("quality", call.quality, pin.quality))
    filled = {name: value for name, given, value in wanted if given in OPEN}
    if not filled:
        return call
    return replace(
        call,
        size=filled.get("size", call.size),
        quality=filled.get("quality", call.quality),
        parameters={**call.parameters, **filled},
        changes=(
            *call.changes,
            *(Change(name, call.parameters.get(name), value) for name, value in filled.items()),
        ),
    )


def cheaper(call: Call, quote: Quote) -> tuple[str, Money] | None:
    """A way to ask for the same call that costs less: the first of a few that saves by half."""
    if quote.row is None:
        return None
    for quality in ("low", "medium"):
        if call.quality == quality:
            return None
        size = "1024x1024" if call.size == "auto" else call.size
        other = replace(call, quality=quality, size=size)
        try:
            base = quote.row.price.bound(other, quote.prices)
        except CannotPrice:
            continue
        bound = raised(base, quote.factor).amount
        if 0 < 2 * bound <= quote.bound.amount:
            words = f"quality={quality}" if size == call.size else f"{size}, quality={quality}"
            return words, bound
    return None


def say_cheaper(call: Call, quote: Quote, left: Money) -> str:
    """A way to ask for the same call within what is left, as a sentence after another, or
    nothing."""
    less = cheaper(call, quote)
    if less is None or less[1] > left:
        return ""
    return f" Cheaper now: {less[0]} (at most {say_dollars(less[1])})."


def say_owner(scope: Scope, caller: Caller) -> str:
    """Whose a limit is, at the beginning of a sentence."""
    if scope is Scope.USER:
        return f"User {caller.user} of team {caller.team.id}"
    if scope is Scope.KEY:
        return f"Key {caller.key.name or caller.key.id} of team {caller.team.id}"
    return f"Team {caller.team.id}"


def _too_dear(caller: Caller, call: Call, quote: Quote, most: Money) -> InvalidRequest:
    own = caller.key.limits.max_cost_per_request == most
    whose = say_owner(Scope.KEY if own else Scope.TEAM, caller)
    advice = say_cheaper(call, quote, most)
    return InvalidRequest(
        f"This request could cost up to {say_dollars(quote.bound.amount)}, and "
        f"{whose[0].lower()}{whose[1:]} allows {say_dollars(most)} a request."
        f"{advice or ' Ask for fewer pictures, a smaller size or a lower quality.'}",
        code="max_cost_exceeded",
        reason="max_cost_exceeded",
    )
