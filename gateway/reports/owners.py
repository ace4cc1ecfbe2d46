"""Whom the watch over budgets looks at: who has spent, and bit by bit everybody else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from gateway.domain.ledger import Entry
from gateway.domain.quota import Scope
from gateway.domain.team import Declared, Key, Team
from gateway.ports import Directory

Name: TypeAlias = tuple[Scope, str]
"""Of a team or of a key."""
Owner: TypeAlias = tuple[Team, Key | None]
"""A key with its team, or a team."""


def name_of(owner: Owner) -> Name:
    team, key = owner
    return (Scope.TEAM, team.id) if key is None else (Scope.KEY, key.id)


class Spenders:
    """Whose accounts this process has moved in the ledger, until somebody takes them."""

    def __init__(self) -> None:
        self._accounts: set[tuple[str, ...]] = set()

    def heard(self, entry: Entry) -> None:
        """A hold has ended. What costs nothing takes nobody past a mark; what was booked already
        may be what the ledger's lost answer was about."""
        if entry.cost:
            self._accounts.add(entry.accounts)

    def take(self) -> set[tuple[str, ...]]:
        """The accounts of each, as its holds name them."""
        accounts, self._accounts = self._accounts, set()
        return accounts

    def give_back(self, accounts: set[tuple[str, ...]]) -> None:
        self._accounts |= accounts


def owners_of(accounts: Iterable[str]) -> set[Name]:
    """``team:growth|d|2026-11-22`` is of team growth; users are not watched, nor whoever else a
    newer release keeps accounts of."""
    owners = set()
    for account in accounts:
        scope, _, owner = account.rsplit("|", 2)[0].partition(":")
        if scope in (Scope.TEAM, Scope.KEY):
            owners.add((Scope(scope), owner))
    return owners


class Owners:
    """The teams and keys of the file and of the directory, as they are when they are asked for."""

    def __init__(self, directory: Directory, declared: Callable[[], Declared]) -> None:
        """``declared`` are those of the file, as of now."""
        self._directory = directory
        self._declared = declared
        self._read = Declared()
        self._by_name: dict[Name, Owner] = {}
        self._round = 0
        self._file: Sequence[Owner] | None = None
        self._teams_after: str | None = ""
        self._keys_after = ""

    async def named(self, names: Collection[Name]) -> list[Owner]:
        """Those of these names that there are. Raises ``LedgerUnavailable``."""
        wanted = set(names)
        file = self._of_the_file()
        found = [file[name] for name in wanted if name in file]
        wanted.difference_update(file)
        if teams := [name for scope, name in wanted if scope is Scope.TEAM]:
            found += [(team, None) for team in await self._directory.teams_named(teams)]
        if keys := [name for scope, name in wanted if scope is Scope.KEY]:
            found += await self._directory.keys_named(keys)
        return found

    async def next(self, most: int) -> Sequence[Owner]:
        """So many of all at most, behind those that were asked for last; none at the end of a
        round, behind which the next one begins. Raises ``LedgerUnavailable``, and can be asked
        again."""
        if self._file is None:
            self._file = list(self._of_the_file().values())
        if self._file:
            page, self._file = self._file[:most], self._file[most:]
            return page
        # A round may begin while a page is read: that one is not where the new one stands.
        began = self._round
        if self._teams_after is not None:
            teams = await self._directory.teams_behind(self._teams_after, most)
            if began == self._round:
                self._teams_after = teams[-1].id if teams else None
            if teams:
                return [(team, None) for team in teams]
        keys = await self._directory.keys_behind(self._keys_after, most)
        if not keys:
            self.begin_anew()
        elif began == self._round:
            self._keys_after = keys[-1][1].id
        return keys

    def begin_anew(self) -> None:
        """A round."""
        self._round += 1
        self._file, self._teams_after, self._keys_after = None, "", ""

    def _of_the_file(self) -> dict[Name, Owner]:
        declared = self._declared()
        if declared is not self._read:
            teams: list[Owner] = [(team, None) for team in declared.teams.values()]
            owners = [*teams, *declared.keys.values()]
            self._by_name = {name_of(owner): owner for owner in owners}
            self._read = declared
        return self._by_name
