"""The end users of calls: found in what the client says, and known from then on by a hash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from gateway.domain.call import Call
from gateway.domain.errors import InvalidRequest
from gateway.domain.keys import Peppers, derived
from gateway.domain.team import Caller
from gateway.domain.user import UserPolicy, said_user, user_id

MAX_REMEMBERED = 1000


class Users:
    """Says for whom a caller calls. The hashes are made with a key derived from the pepper, so
    they are the same in every process; behind a rotation's last step everybody is new."""

    def __init__(self, peppers: Peppers, policy: UserPolicy) -> None:
        self.replace(peppers, policy)

    def replace(self, peppers: Peppers, policy: UserPolicy) -> None:
        """From now on these hold."""
        self._key = derived(peppers, "end users")
        self._policy = policy
        self._callers: OrderedDict[tuple[str, str], Caller] = OrderedDict()

    def named(self, caller: Caller, call: Call, hints: Mapping[str, str]) -> Caller:
        """The caller, with the end user of this call. Raises ``InvalidRequest`` where the team's
        calls need one and this has none."""
        said = said_user(self._policy.sources, call.parameters, hints)
        if said:
            return self._as(caller, said)
        if caller.team.per_user.required:
            raise InvalidRequest(
                f"Team {caller.team.id} has limits for each of its users, and this request does "
                "not say whose it is. Send safety_identifier: any text that is the same for all "
                "requests of one user. Only a hash of it is kept here.",
                code="user_required",
                param="safety_identifier",
                reason="user_required",
            )
        return caller

    def hinted(self, caller: Caller, hints: Mapping[str, str]) -> Caller:
        """The caller, with the end user that its headers name, if any: what is only passed on is
        not read, and needs none."""
        said = said_user(self._policy.sources, {}, hints)
        return self._as(caller, said) if said else caller

    def _as(self, caller: Caller, said: str) -> Caller:
        """The same one for all calls of a user, as for those of a key (``KeyRing``)."""
        user = user_id(self._key, caller.team.id, said)
        known = self._callers.get((caller.key.id, user))
        if known is not None and known.key is caller.key and known.team is caller.team:
            return known
        named = replace(caller, user=user, records_user=self._policy.record)
        self._callers[caller.key.id, user] = named
        while len(self._callers) > MAX_REMEMBERED:
            self._callers.popitem(last=False)
        return named
