"""How upstreams and their keys are doing: whom to ask, whom to leave alone, and for how long.

Pure state of one process: it is told what happened and answers whether a key may be asked now. Of
each upstream's key it knows three things::

    breaker      5 failures in a row of two calls at least, within 10 s: nothing is sent for 5 s,
                 doubling to 60 s
    cool-down    what a 429 asks for, or 1 s doubling to 60 s, for the model that was asked for
    quarantine   the owner's key or account is refused: 60 s doubling to 10 min; a 403 holds for
                 the one model, and is forgotten where nobody asks for that for half an hour more

Where the time of a breaker or of a quarantine is over, one real request goes out as a probe, and
what it finds lets the others follow. A breaker's probe that has not failed in 10 s has got through;
a quarantine's that nobody answers for is forgotten then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Protocol

from gateway.ports import Upstream

FAILURES = 5
FAILURE_SECONDS = 10.0
OPEN_SECONDS = 5.0
MAX_OPEN_SECONDS = 60.0
COOL_SECONDS = 1.0
MAX_COOL_SECONDS = 60.0
AT_ONCE_SECONDS = 0.5
"""What a 429 gets that asks for nothing, or for a time that is over: it is still one."""
MAX_RETRY_AFTER_SECONDS = 120.0
"""What an upstream asks for beyond it is not believed: a key must not be lost to one header."""
QUARANTINE_SECONDS = 60.0
MAX_QUARANTINE_SECONDS = 600.0
FORGET_SECONDS = 1800.0
MAX_FORBIDDEN_MODELS = 64
"""Of one key. Behind a route for every name clients choose them: it could go on for ever."""
PROBE_SECONDS = 10.0
"""An upstream that cannot be reached, or refuses, has shown it by then; a picture takes longer."""
MAX_TOKENS = 10.0
TOKENS_PER_SUCCESS = 0.1


class CircuitState(IntEnum):
    """The value of ``gateway_upstream_circuit_state``."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Why(StrEnum):
    """Why a key is in quarantine: a closed list."""

    AUTH = "auth"
    FORBIDDEN = "forbidden"
    """For one model; the key may be good for others."""
    BILLING = "billing"


class HealthListener:
    """Who hears of changes; each method does nothing unless it is overridden. ``key`` is the public
    id of a credential."""

    def circuit(self, upstream: str, key: str, state: CircuitState) -> None:
        """Its breaker is in another state."""

    def cooled(self, upstream: str, key: str, seconds: float) -> None:
        """It has asked to be left alone for so long."""

    def disabled(self, upstream: str, key: str, why: Why, model: str, seconds: float) -> None:
        """It was refused, for ``model`` alone or, where that is empty, for everything."""

    def enabled(self, upstream: str, key: str, why: Why) -> None:
        """It is in no quarantine for this any more."""

    def answered(self, upstream: str, status: int, seconds: float) -> None:
        """An attempt came to the head of an answer within so long; status 0 is none, where it may
        have been sent or could not be."""

    def failed(self, upstream: str, kind: str) -> None:
        """An attempt failed; ``kind`` is from the closed list of ``failover.Kind``."""

    def retried(self, upstream: str, outcome: str) -> None:
        """An upstream that had failed was asked again: ``answered`` or ``failed``; or was not,
        because it has had its share of retries: ``no_budget``."""

    def fell_back(self, model: str, to: str) -> None:
        """A configured model was asked in place of another."""


class Chance(Protocol):
    """``random.Random``, as far as it is used here."""

    def uniform(self, a: float, b: float, /) -> float: ...


@dataclass(slots=True)
class _Rest:
    """A time to be left alone that doubles with each repeat, and the probe that ends it."""

    first: float
    most: float
    seconds: float = 0.0
    until: float | None = None
    probe_at: float | None = None

    def begin(self, now: float) -> None:
        self.seconds = min(2 * self.seconds, self.most) if self.seconds else self.first
        self.until = now + self.seconds
        self.probe_at = None

    def end(self) -> None:
        self.seconds, self.until, self.probe_at = 0.0, None, None

    def is_forgotten(self, now: float) -> bool:
        """Whether it has been over for long, and nobody has come to probe."""
        last = max(self.until or 0.0, self.probe_at or 0.0)
        return self.until is not None and now - last > FORGET_SECONDS

    def follows(self, at: float) -> bool:
        """Whether what was sent ``at`` was sent before this rest, and says nothing of it."""
        return self.until is not None and at < self.until

    def wait(self, now: float, probe_seconds: float) -> float:
        """Seconds until a request may go out; 0 where one may, if only as a probe."""
        if self.until is None:
            return 0.0
        if self.probe_at is not None:
            return max(0.0, self.probe_at + probe_seconds - now)
        return max(0.0, self.until - now)


@dataclass(slots=True)
class _Cool:
    """How long a key is left alone for one model, and how long it was the last time that nobody
    said for how long."""

    seconds: float = 0.0
    until: float = 0.0


@dataclass(slots=True)
class _Key:
    """What is known of one credential. ``failures`` are when, and of which call; ``cool`` and
    ``refused`` are by model, where ``refused`` has an empty one for all."""

    failures: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=FAILURES))
    breaker: _Rest = field(default_factory=lambda: _Rest(OPEN_SECONDS, MAX_OPEN_SECONDS))
    state: CircuitState = CircuitState.CLOSED
    cool: dict[str, _Cool] = field(default_factory=dict)
    refused: dict[str, tuple[_Rest, Why]] = field(default_factory=dict)

    def is_failing(self, now: float) -> bool:
        """Whether its last failures are enough to open its breaker."""
        if len(self.failures) < FAILURES or now - self.failures[0][0] > FAILURE_SECONDS:
            return False
        whose = {who for _, who in self.failures}
        return "" in whose or len(whose) > 1

    def rests(self, model: str) -> list[_Rest]:
        """Those that stand between a request for ``model`` and this key."""
        found = [self.breaker] if self.breaker.until is not None else []
        return found + [self.refused[name][0] for name in ("", model) if name in self.refused]


@dataclass(slots=True)
class Ticket:
    """The leave to send one request with a key. Whoever has it says how it ended, once."""

    upstream: str
    credential: str
    model: str
    at: float
    probe: bool = False


class Health:
    """Of all upstreams, in one process. ``now`` is a clock's seconds."""

    def __init__(
        self,
        now: Callable[[], float],
        chance: Chance,
        listener: HealthListener | None = None,
        probe_seconds: float = PROBE_SECONDS,
    ) -> None:
        self._now = now
        self._chance = chance
        self._probe_seconds = probe_seconds
        self._keys: dict[tuple[str, str], _Key] = {}
        self._kept: dict[str, frozenset[str]] = {}
        self._tokens: dict[str, float] = {}
        self.listener = listener or HealthListener()

    def wait(self, upstream: str, credential: str, model: str) -> float:
        """Seconds until a request for ``model`` may go out with this key; 0 where one may."""
        key = self._keys.get((upstream, credential))
        if key is None:
            return 0.0
        now = self._now()
        self._look_at_probe(upstream, credential, key, now)
        waits = [rest.wait(now, self._probe_seconds) for rest in key.rests(model)]
        if model in key.cool:
            waits.append(key.cool[model].until - now)
        return max((0.0, *waits))

    def quarantined(self, upstream: str, credential: str, model: str) -> Why | None:
        """Why the key is refused for ``model``, until a probe has shown otherwise."""
        key = self._keys.get((upstream, credential))
        found = [] if key is None else [key.refused[n][1] for n in ("", model) if n in key.refused]
        return found[0] if found else None

    def usable(self, upstream: Upstream, model: str) -> bool:
        """Whether one of an upstream's keys may be used for ``model`` now."""
        # No generator: that takes as long as all else that is asked of a way which works.
        for one in upstream.credentials:
            if not self.wait(upstream.name, one.id, model):
                break
        else:
            return False
        return True

    def admit(self, upstream: str, credential: str, model: str) -> Ticket | None:
        """Leave to send a request, or None where the key is to be left alone. Where it is the
        probe of a breaker or of a quarantine, nobody else gets leave until it has ended."""
        now = self._now()
        key = self._keys.get((upstream, credential))
        if key is None:
            # Nothing was ever against it: nearly every key, nearly all the time.
            return Ticket(upstream, credential, model, now)
        if self.wait(upstream, credential, model) > 0:
            return None
        rests = key.rests(model)
        for rest in rests:
            rest.probe_at = now
        if key.breaker.until is not None:
            self._turn(upstream, credential, key, CircuitState.HALF_OPEN)
        return Ticket(upstream, credential, model, now, bool(rests))

    def succeeded(self, ticket: Ticket) -> None:
        """The upstream answered as it should: the key is well, and has earned a bit of a retry."""
        tokens = self._tokens.get(ticket.upstream, MAX_TOKENS)
        if tokens < MAX_TOKENS:
            self._tokens[ticket.upstream] = min(MAX_TOKENS, tokens + TOKENS_PER_SUCCESS)
        if (ticket.upstream, ticket.credential) in self._keys:
            self._take(ticket, paid=True)

    def alive(self, ticket: Ticket) -> None:
        """The upstream took the key and judged the request, whatever it said of that."""
        self._take(ticket, paid=False)

    def failed(self, ticket: Ticket, who: str = "") -> None:
        """It could not be reached, or failed by itself: enough of these open its breaker. ``who``
        names the call where that may be what it failed of: one call alone is not enough."""
        key, now = self._key(ticket), self._now()
        if key is None:
            return
        self._free_quarantine(key, ticket)
        if key.breaker.until is not None:
            if ticket.probe and not key.breaker.follows(ticket.at):
                self._open(ticket, key, now)
            return
        key.failures.append((now, who))
        if key.is_failing(now):
            key.failures.clear()
            self._open(ticket, key, now)

    def limited(self, ticket: Ticket, retry_after_seconds: float | None) -> None:
        """It asked to be left alone (429), for so long, or without saying for how long. That is
        for one model: the limits of others are their own."""
        key, now = self._key(ticket), self._now()
        if key is None:
            return
        self._answers(ticket, key, paid=False)
        for model in [name for name, one in key.cool.items() if _is_past(one, now)]:
            del key.cool[model]
        cool = key.cool.setdefault(ticket.model, _Cool())
        if retry_after_seconds is not None:
            said = retry_after_seconds if retry_after_seconds > 0 else AT_ONCE_SECONDS
            seconds = min(said, MAX_RETRY_AFTER_SECONDS)
        else:
            # Of many that were under way together only the first doubles it.
            if ticket.at >= cool.until:
                doubled = min(2 * cool.seconds, MAX_COOL_SECONDS)
                cool.seconds = doubled or COOL_SECONDS
            seconds = self._chance.uniform(cool.seconds / 2, cool.seconds)
        cool.until = max(cool.until, now + seconds)
        self.listener.cooled(ticket.upstream, ticket.credential, seconds)

    def refused(self, ticket: Ticket, why: Why) -> None:
        """The owner's key or account was refused: for one model where it is forbidden, else for
        all."""
        key, now = self._key(ticket), self._now()
        if key is None:
            return
        model = ticket.model if why is Why.FORBIDDEN else ""
        fresh = _Rest(QUARANTINE_SECONDS, MAX_QUARANTINE_SECONDS)
        rest, before = key.refused.get(model, (fresh, why))
        if not rest.follows(ticket.at):
            # Of many that were under way together only the first counts.
            if before is not why:
                self._enable(ticket.upstream, ticket.credential, key, model)
            rest.begin(now)
            key.refused.pop(model, None)  # the newest is the last
            key.refused[model] = (rest, why)
            self.listener.disabled(ticket.upstream, ticket.credential, why, model, rest.seconds)
            self._forget(ticket.upstream, ticket.credential, key, now)
        if ticket.probe:
            # That is an answer: the upstream is there again.
            self._close(ticket.upstream, ticket.credential, key, ticket.at)

    def unsure(self, ticket: Ticket) -> None:
        """It was sent, and nothing is known of the key from how it ended."""
        key = self._keys.get((ticket.upstream, ticket.credential))
        if key is None:
            return
        self._free_quarantine(key, ticket)
        if ticket.probe and key.breaker.until is not None and not key.breaker.follows(ticket.at):
            # Whoever swallows requests has not come back.
            self._open(ticket, key, self._now())

    def unused(self, ticket: Ticket) -> None:
        """It was not sent after all: the next one may be the probe."""
        key = self._keys.get((ticket.upstream, ticket.credential))
        if key is not None and ticket.probe:
            for rest in key.rests(ticket.model):
                rest.probe_at = None
            if key.breaker.until is not None:
                self._turn(ticket.upstream, ticket.credential, key, CircuitState.OPEN)

    def take_retry(self, upstream: str) -> bool:
        """Whether an upstream that has failed may be asked again: it has so many retries, and
        earns a tenth of one with each success, so that a dead one is hardly asked twice."""
        tokens = self._tokens.get(upstream, MAX_TOKENS)
        if tokens < 1:
            self.listener.retried(upstream, "no_budget")
            return False
        self._tokens[upstream] = tokens - 1
        return True

    def look(self) -> None:
        """To be called now and then: forgets the models that nobody asks for any more."""
        now = self._now()
        for (upstream, credential), key in self._keys.items():
            self._forget(upstream, credential, key, now)

    def keep(self, upstream: str, credentials: Iterable[str]) -> None:
        """These are its keys now: what is known of others is forgotten, and what is heard of
        them later is not listened to."""
        left = self._kept[upstream] = frozenset(credentials)
        for name, credential in list(self._keys):
            if name == upstream and credential not in left:
                key = self._keys.pop((name, credential))
                self._turn(name, credential, key, CircuitState.CLOSED)
                for model in list(key.refused):
                    self._enable(name, credential, key, model)

    def _key(self, ticket: Ticket) -> _Key | None:
        """None where the key is its upstream's no more."""
        kept = self._kept.get(ticket.upstream)
        if kept is not None and ticket.credential not in kept:
            return None
        return self._keys.setdefault((ticket.upstream, ticket.credential), _Key())

    def _take(self, ticket: Ticket, *, paid: bool) -> None:
        key = self._keys.get((ticket.upstream, ticket.credential))
        if key is None:
            return
        self._answers(ticket, key, paid=paid)
        cool = key.cool.get(ticket.model)
        if cool is not None and ticket.at >= cool.until:
            del key.cool[ticket.model]

    def _answers(self, ticket: Ticket, key: _Key, *, paid: bool) -> None:
        """What a probe has shown. Others began before the rest that they would end, and who was
        not served has not shown that there is money again."""
        key.failures.clear()
        if not ticket.probe:
            return
        self._close(ticket.upstream, ticket.credential, key, ticket.at)
        for model in ("", ticket.model):
            rest, why = key.refused.get(model, (None, None))
            if rest is None or rest.follows(ticket.at):
                continue
            if why is Why.BILLING and not paid:
                rest.probe_at = None
            else:
                self._enable(ticket.upstream, ticket.credential, key, model)

    def _look_at_probe(self, upstream: str, credential: str, key: _Key, now: float) -> None:
        """A breaker is about who can be reached. What is under way for so long has been."""
        probe_at = key.breaker.probe_at
        if probe_at is not None and now - probe_at >= self._probe_seconds:
            self._close(upstream, credential, key, probe_at)

    def _close(self, upstream: str, credential: str, key: _Key, at: float) -> None:
        if not key.breaker.follows(at):
            key.breaker.end()
            self._turn(upstream, credential, key, CircuitState.CLOSED)

    def _open(self, ticket: Ticket, key: _Key, now: float) -> None:
        key.breaker.begin(now)
        self._turn(ticket.upstream, ticket.credential, key, CircuitState.OPEN)

    def _turn(self, upstream: str, credential: str, key: _Key, state: CircuitState) -> None:
        if key.state is not state:
            key.state = state
            self.listener.circuit(upstream, credential, state)

    def _enable(self, upstream: str, credential: str, key: _Key, model: str) -> None:
        found = key.refused.pop(model, None)
        if found is not None and all(why is not found[1] for _, why in key.refused.values()):
            self.listener.enabled(upstream, credential, found[1])

    def _forget(self, upstream: str, credential: str, key: _Key, now: float) -> None:
        """Only what holds for one model: a key that is refused for all waits for its owner."""
        models = [model for model in key.refused if model]
        for number, model in enumerate(models, start=1):
            crowded_out = len(models) - number >= MAX_FORBIDDEN_MODELS
            if crowded_out or key.refused[model][0].is_forgotten(now):
                self._enable(upstream, credential, key, model)

    def _free_quarantine(self, key: _Key, ticket: Ticket) -> None:
        """A probe that says nothing of the key leaves the quarantine to the next one."""
        if ticket.probe:
            for model in ("", ticket.model):
                if model in key.refused:
                    key.refused[model][0].probe_at = None


def _is_past(cool: _Cool, now: float) -> bool:
    """So long ago that the next one begins anew."""
    return now - cool.until > MAX_COOL_SECONDS
