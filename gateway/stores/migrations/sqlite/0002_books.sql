-- Corrections and adjustments (kind A), raised bounds (kind B), and deletion of what has been
-- rolled up. SQLite cannot change a CHECK, so the journal is made anew with its rows.

-- Closed holds that were reserved before this instant may be forgotten. One row; it only grows.
CREATE TABLE retention (
    one    INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    before INTEGER NOT NULL                                     -- microseconds
) STRICT;
CREATE TRIGGER retention_only_grows BEFORE UPDATE ON retention WHEN new.before < old.before
BEGIN SELECT RAISE(ABORT, 'what may be forgotten only grows'); END;

DROP TRIGGER journal_is_never_updated;
DROP TRIGGER journal_is_never_deleted;
ALTER TABLE journal RENAME TO journal_before;

-- One row an event. The sums of its two amounts over a hold are the hold.
CREATE TABLE journal (
    seq     INTEGER NOT NULL PRIMARY KEY,                       -- the order of commits
    at      INTEGER,                                            -- when; NULL where the caller named no time
    rid     TEXT    NOT NULL,                                   -- hold.rid, or adjustment.id
    kind    TEXT    NOT NULL CHECK (kind IN ('H', 'P', 'V', 'X', 'A', 'B')),  -- the state it led to; A: corrected or adjusted; B: bound raised
    pending INTEGER NOT NULL,                                   -- added to balance.pending of its accounts
    posted  INTEGER NOT NULL,                                   -- added to balance.posted of its accounts
    detail  TEXT    NOT NULL DEFAULT '{}'                       -- JSON: outcome, basis, images, usage, flags; reason, actor, id
) STRICT;
INSERT INTO journal SELECT seq, at, rid, kind, pending, posted, detail FROM journal_before;
DROP TABLE journal_before;
-- A call's events, for who looks it up.
CREATE INDEX journal_rid ON journal (rid);

CREATE TRIGGER journal_is_never_updated BEFORE UPDATE ON journal
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
-- But with its hold, once that may be forgotten. Adjustments belong to no hold: they stay.
CREATE TRIGGER journal_is_never_deleted BEFORE DELETE ON journal
WHEN NOT EXISTS (SELECT 1 FROM hold, retention
                  WHERE hold.rid = old.rid AND hold.state IN ('P', 'V') AND hold.at < retention.before)
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;

-- What a person or a reconciliation said. Corrections of one call have its rid, and their amount is
-- in hold.cost too; an adjustment of a day has none, and is a part of each balance by itself.
CREATE TABLE adjustment (
    id       TEXT    NOT NULL PRIMARY KEY,
    at       INTEGER NOT NULL,
    rid      TEXT,                                              -- hold.rid; NULL: belongs to no call
    team     TEXT    NOT NULL,
    key_id   TEXT    NOT NULL,                                  -- '' where it belongs to no call
    model    TEXT    NOT NULL,
    day      TEXT    NOT NULL,                                  -- its row in usage_daily
    accounts TEXT    NOT NULL,                                  -- JSON list of balance.account
    amount   INTEGER NOT NULL,                                  -- signed: what it added to posted
    reason   TEXT    NOT NULL,
    actor    TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

-- What forgotten holds had posted, so that each balance still adds up. One row an account; the
-- row of the account '' is all of them once, so that the usage of all days still adds up.
CREATE TABLE rolled_up (
    account TEXT    NOT NULL PRIMARY KEY,
    posted  INTEGER NOT NULL,
    holds   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
-- Closed holds by age, for who forgets them.
CREATE INDEX hold_closed ON hold (at) WHERE state IN ('P', 'V');
-- Holds that ask for a look, by id.
CREATE INDEX hold_doubtful ON hold (rid) WHERE state = 'X' OR flags <> '[]';
-- Open holds by who runs them, for the sweep after a worker died.
CREATE INDEX hold_worker ON hold (worker) WHERE state = 'H';

-- Who runs calls here, and when it was last seen.
CREATE TABLE worker (
    id      TEXT    NOT NULL PRIMARY KEY,
    beat_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Which mark of an account somebody was told of, so that it is said once.
CREATE TABLE notice (
    account    TEXT    NOT NULL,
    mark       TEXT    NOT NULL,                                -- 'budget:80', 'soft_budget:100', ...
    claimed_at INTEGER NOT NULL,
    sent_at    INTEGER,                                         -- NULL: being sent, or its sender died
    PRIMARY KEY (account, mark)
) STRICT, WITHOUT ROWID;

-- By how much the bounds of a model are raised, because calls have cost more than them.
CREATE TABLE bound_factor (
    upstream   TEXT    NOT NULL,
    model      TEXT    NOT NULL,                                -- as the upstream names it
    millionths INTEGER NOT NULL CHECK (millionths > 0),
    PRIMARY KEY (upstream, model)
) STRICT, WITHOUT ROWID;

-- The ids of keys that the configuration declares, by the digest under each pepper they had.
CREATE TABLE declared_key (
    digest BLOB NOT NULL PRIMARY KEY,
    id     TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Which pepper a key's digest was made with, by its public id; '' for those of an earlier release,
-- until they are used.
ALTER TABLE key ADD COLUMN pepper TEXT NOT NULL DEFAULT '';

-- IANA name of the zone that the team's days begin in.
ALTER TABLE team ADD COLUMN time_zone TEXT NOT NULL DEFAULT 'UTC';
