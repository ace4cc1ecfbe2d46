"""Who asks: teams, their keys, and what each may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cached_property

from gateway.domain.compat import CompatRules
from gateway.domain.ledger import Line
from gateway.domain.money import Money
from gateway.domain.quota import MONEY_WINDOWS, Limit, Scope, Unit, Window, period, zone_of

ANY_MODEL = "*"
SPAN_SECONDS = 900
"""Days begin at such marks in every zone: within one of these spans no period of money ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates, concurrency and dollars; None is no limit. Dollars are nano-dollars.

    A ``budget`` is hard: what might pass it is refused. A ``soft_budget`` may be passed; somebody
    hears of it.
    """

    requests_per_minute: int | None = None
    images_per_minute: int | None = None
    concurrent_requests: int | None = None
    budget_day: Money | None = None
    budget_week: Money | None = None
    budget_month: Money | None = None
    budget_total: Money | None = None
    soft_budget_day: Money | None = None
    soft_budget_week: Money | None = None
    soft_budget_month: Money | None = None
    soft_budget_total: Money | None = None
    max_cost_per_request: Money | None = None

    @property
    def budgets(self) -> Mapping[Window, Money | None]:
        """The hard ones, of every window of money."""
        amounts = (self.budget_day, self.budget_week, self.budget_month, self.budget_total)
        return dict(zip(MONEY_WINDOWS, amounts, strict=True))

    @property
    def soft_budgets(self) -> Mapping[Window, Money | None]:
        """Those that only warn, of every window of money."""
        amounts = (
            self.soft_budget_day,
            self.soft_budget_week,
            self.soft_budget_month,
            self.soft_budget_total,
        )
        return dict(zip(MONEY_WINDOWS, amounts, strict=True))

    def of(self, scope: Scope, owner: str) -> tuple[Limit, ...]:
        """These limits as bounded accounts of ``owner``. Money always has all of its accounts,
        also without a limit, so that a budget set tomorrow knows what was spent today."""
        rates = (
            (Unit.REQUESTS, Window.MINUTE, self.requests_per_minute),
            (Unit.IMAGES, Window.MINUTE, self.images_per_minute),
            (Unit.SLOTS, Window.NOW, self.concurrent_requests),
        )
        soft = self.soft_budgets
        return tuple(
            Limit(scope, owner, unit, window, amount)
            for unit, window, amount in rates
            if amount is not None
        ) + tuple(
            Limit(scope, owner, Unit.MONEY, window, amount, soft[window])
            for window, amount in self.budgets.items()
        )

    @property
    def unreachable(self) -> tuple[Window, ...]:
        """The windows whose soft budget is over the hard one: nothing ever gets so far."""
        pairs = ((window, self.soft_budgets[window], hard) for window, hard in self.budgets.items())
        return tuple(
            window
            for window, soft, hard in pairs
            if soft is not None and hard is not None and soft > hard
        )

    @property
    def has_budget(self) -> bool:
        """Whether any budget is hard."""
        return any(amount is not None for amount in self.budgets.values())


@dataclass(frozen=True, slots=True)
class PerUser:
    """What each end user of a team may do, beside what the team may. ``required``: a call that
    does not name its user is refused."""

    limits: Limits = field(default_factory=Limits)
    required: bool = False

    def of(self, owner: str) -> tuple[Limit, ...]:
        """The bounded accounts of one user. Of money only those that have an amount: the books
        must not grow with every user for nothing."""
        limits = self.limits.of(Scope.USER, owner)
        return tuple(limit for limit in limits if limit.amount is not None)


@dataclass(frozen=True, slots=True)
class Team:
    """A group that shares keys, limits and a cache. ``id`` is its name: ``growth``.

    ``time_zone`` is the IANA name of the zone that its days, weeks and months begin in, and those
    of its keys.
    """

    id: str
    models: frozenset[str] = frozenset({ANY_MODEL})
    limits: Limits = field(default_factory=Limits)
    cache_enabled: bool = True
    disabled: bool = False
    declared: bool = False
    """Owned by the configuration file; commands may not change it."""
    time_zone: str = "UTC"
    weight: int = 1
    """Its share of the places, against the other teams that wait for one."""
    per_user: PerUser = field(default_factory=PerUser)

    @property
    def zone(self) -> tzinfo:
        return zone_of(self.time_zone)


@dataclass(frozen=True, slots=True)
class Key:
    """A secret's public half. ``id`` is logged and listed; the secret is nowhere."""

    id: str
    team: str
    name: str = ""
    models: frozenset[str] | None = None
    """None: whatever the team may use."""
    limits: Limits = field(default_factory=Limits)
    created: datetime | None = None
    expires: datetime | None = None
    disabled: bool = False
    revoked: datetime | None = None
    declared: bool = False
    pepper: str = ""
    """The public id of the pepper that its digest was made with; empty where nobody noted it, and
    for a key of the file."""
    compat: CompatRules | None = None
    """What is repaired of its calls, where that is not what holds for all. Only of the file's."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What the configuration file declares: its teams by name, and its keys, with their teams, by
    the digest of the secret under the current pepper."""

    teams: Mapping[str, Team] = field(default_factory=dict)
    keys: Mapping[bytes, tuple[Team, Key]] = field(default_factory=dict)


@dataclass(frozen=True)
class Caller:
    """A known key and its team: who stands at the door. ``user`` is the end user of its call, as a
    hash (``user.user_id``), once the call is read and says so.

    A key's calls share one of these as long as nothing changes, so what follows from it is worked
    out once.
    """

    team: Team
    key: Key
    user: str = ""
    records_user: bool = True

    def may_use(self, model: str) -> bool:
        """Whether both the team and the key allow the model's configured name."""
        team, key = self.team.models, self.key.models
        if model not in team and ANY_MODEL not in team:
            return False
        return key is None or model in key or ANY_MODEL in key

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """Every account a call of this caller draws on: its user's, the key's, then the team's."""
        user = self.team.per_user.of(f"{self.team.id}/{self.user}") if self.user else ()
        key = self.key.limits.of(Scope.KEY, self.key.id)
        return user + key + self.team.limits.of(Scope.TEAM, self.team.id)

    @cached_property
    def rates(self) -> tuple[Limit, ...]:
        """Those of them that the gate keeps."""
        return tuple(limit for limit in self.limits if limit.unit is not Unit.MONEY)

    def lines(self, now: datetime) -> tuple[Line, ...]:
        """Every account of money among them, in the periods that run at ``now`` (aware)."""
        span = int(now.timestamp()) // SPAN_SECONDS
        lines = self._lines.get(span)
        if lines is None:
            self._lines.clear()
            lines = self._lines[span] = money_lines(self.limits, now, self.team.zone)
        return lines

    @cached_property
    def _lines(self) -> dict[int, tuple[Line, ...]]:
        """Those of the span that was last asked for."""
        return {}

    @property
    def recorded_user(self) -> str:
        """Whom the books and the log may name; empty for nobody."""
        return self.user if self.records_user else ""

    @cached_property
    def max_cost_per_request(self) -> Money | None:
        bounds = (self.key.limits.max_cost_per_request, self.team.limits.max_cost_per_request)
        return min((bound for bound in bounds if bound is not None), default=None)

    @cached_property
    def has_budget(self) -> bool:
        budgets = [self.key.limits.has_budget, self.team.limits.has_budget]
        return any(budgets) or (bool(self.user) and self.team.per_user.limits.has_budget)


def money_lines(limits: Iterable[Limit], now: datetime, zone: tzinfo) -> tuple[Line, ...]:
    """The accounts of money among ``limits``, in the periods that run at ``now`` in ``zone``."""
    return tuple(
        Line(limit, period(limit.window, now, zone)) for limit in limits if limit.unit is Unit.MONEY
    )
