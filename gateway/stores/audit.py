"""Adding the books up a second way (I2 of money.md): what both databases are asked, and what it
shows. Only how a list of accounts is taken apart differs, and stands with each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.domain.books import Discrepancy

AUDIT_USAGE = """
SELECT (SELECT coalesce(sum(cost), 0) FROM usage_daily),
       (SELECT coalesce(sum(cost), 0) FROM hold)
     + (SELECT coalesce(sum(amount), 0) FROM adjustment WHERE rid IS NULL)
     + (SELECT coalesce(sum(posted), 0) FROM rolled_up WHERE account = '')
"""
"""What all days cost, and what their parts add up to: one row."""

AUDIT_JOURNAL = """
SELECT rid, cost, coalesce(journalled.posted, 0),
       CASE state WHEN 'H' THEN bound ELSE 0 END, coalesce(journalled.pending, 0)
  FROM hold LEFT JOIN (
       SELECT rid, sum(posted) AS posted, sum(pending) AS pending FROM journal GROUP BY rid
       ) AS journalled USING (rid)
 WHERE cost <> coalesce(journalled.posted, 0)
    OR CASE state WHEN 'H' THEN bound ELSE 0 END <> coalesce(journalled.pending, 0)
 ORDER BY rid
"""
"""Holds that differ from their journal: rid, then posted and pending, each kept and summed."""

AUDIT_USERS = """
SELECT period || ' ' || team, sum(day_cost), sum(cost), sum(day_requests), sum(requests) FROM (
       SELECT period, team, cost, requests, 0 AS day_cost, 0 AS day_requests
         FROM usage_by_user WHERE length(period) = 10
        UNION ALL
       SELECT day, team, 0, 0, cost, requests - cached_requests FROM usage_daily
        UNION ALL
       SELECT day, team, amount, 0, 0, 0 FROM adjustment WHERE rid IS NULL
       ) AS part
 GROUP BY period, team
HAVING sum(day_cost) <> sum(cost) OR sum(day_requests) <> sum(requests)
 ORDER BY period, team
"""
"""Days of a team that differ from what its users did: a name, then cost and requests, each of the
day and of the users."""

AUDIT_MONTHS = """
SELECT month || ' ' || team || ' ' || end_user,
       sum(month_cost), sum(cost), sum(month_requests), sum(requests) FROM (
       SELECT substr(period, 1, 7) AS month, team, end_user, cost, requests,
              0 AS month_cost, 0 AS month_requests
         FROM usage_by_user WHERE length(period) = 10
        UNION ALL
       SELECT period, team, end_user, 0, 0, cost, requests
         FROM usage_by_user WHERE length(period) = 7
       ) AS part
 GROUP BY month, team, end_user
HAVING sum(month_cost) <> sum(cost) OR sum(month_requests) <> sum(requests)
 ORDER BY month, team, end_user
"""
"""Months of a user that differ from their days."""

AUDIT_HALVES = """
SELECT month || ' ' || team || ' ' || end_user,
       sum(half_cost), sum(cost), sum(half_requests), sum(requests) FROM (
       SELECT substr(period, 1, 7) AS month, team, end_user, cost, requests,
              0 AS half_cost, 0 AS half_requests
         FROM usage_by_user WHERE length(period) = 10 AND substr(period, 9) <= '15'
        UNION ALL
       SELECT period, team, end_user, 0, 0, coalesce(half_cost, 0), coalesce(half_requests, 0)
         FROM usage_by_user WHERE length(period) = 7
       ) AS part
 GROUP BY month, team, end_user
HAVING sum(half_cost) <> sum(cost) OR sum(half_requests) <> sum(requests)
 ORDER BY month, team, end_user
"""
"""The same of first halves of months. A backup has none."""

Five = tuple[str, int, int, int, int]
"""A name, then two sums, each as kept and as summed."""


def discrepancies(
    usage: Sequence[int],
    balances: Iterable[Five],
    journal: Iterable[Five],
    users: Iterable[Five],
    months: Iterable[Five],
    halves: Iterable[Five] = (),
) -> list[Discrepancy]:
    """What differs. ``usage`` is the row of ``AUDIT_USAGE``, ``balances`` and ``journal`` are rows
    by account and by rid, ``users``, ``months`` and ``halves`` those of ``AUDIT_USERS``,
    ``AUDIT_MONTHS`` and ``AUDIT_HALVES``. Sums may be of a type of their own (PostgreSQL's
    numeric)."""
    kept, summed = usage
    pairs = [("cost of all days", kept, summed)]
    for one, other, named, rows in (
        ("posted", "pending", "{}", balances),
        ("posted", "pending", "{} in the journal", journal),
        ("cost", "requests", "{} and its users", users),
        ("cost", "requests", "{} and its days", months),
        ("cost", "requests", "{}, days 1 to 15, and these days", halves),
    ):
        for name, *sums in rows:
            what = named.format(name)
            pairs.append((f"{one} of {what}", sums[0], sums[1]))
            pairs.append((f"{other} of {what}", sums[2], sums[3]))
    return [Discrepancy(what, int(one), int(other)) for what, one, other in pairs if one != other]
