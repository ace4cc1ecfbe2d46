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

Five = tuple[str, int, int, int, int]
"""A name, then posted and pending, each as kept and as summed."""


def discrepancies(
    usage: Sequence[int], balances: Iterable[Five], journal: Iterable[Five]
) -> list[Discrepancy]:
    """What differs. ``usage`` is the row of ``AUDIT_USAGE``, ``balances`` and ``journal`` are rows
    by account and by rid. Sums may be of a type of their own (PostgreSQL's numeric)."""
    kept, summed = usage
    pairs = [("cost of all days", kept, summed)]
    for named, rows in (("{}", balances), ("{} in the journal", journal)):
        for name, posted, posted_sum, pending, pending_sum in rows:
            what = named.format(name)
            pairs.append((f"posted of {what}", posted, posted_sum))
            pairs.append((f"pending of {what}", pending, pending_sum))
    return [Discrepancy(what, int(one), int(other)) for what, one, other in pairs if one != other]
