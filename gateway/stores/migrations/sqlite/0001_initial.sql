-- Money is int64 nano-dollars. Times are int64 microseconds since 1970-01-01 UTC.
-- STRICT: a sum that leaves int64 becomes a REAL, which no column here accepts.

-- "gtwy": the file is ours, so that no other program's database is ever migrated.
PRAGMA application_id = 1735686009;

-- One account in one period. Nothing is ever reset: a new period is a new row.
CREATE TABLE balance (
    account TEXT    NOT NULL PRIMARY KEY,                       -- 'team:growth|d|2026-11-22'
    posted  INTEGER NOT NULL DEFAULT 0,                         -- spent
    pending INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0)     -- held by running calls
) STRICT, WITHOUT ROWID;

-- One call that may cost money, from its reservation to its end. Rows are kept.
CREATE TABLE hold (
    rid             TEXT    NOT NULL PRIMARY KEY,               -- the request's id
    state           TEXT    NOT NULL CHECK (state IN ('H', 'P', 'V', 'X')),  -- held posted voided expired
    bound           INTEGER NOT NULL CHECK (bound >= 0),        -- the most it can cost: what is held
    cost            INTEGER NOT NULL DEFAULT 0 CHECK (cost >= 0),  -- what is posted; 0 while H
    accounts        TEXT    NOT NULL,                           -- JSON list of balance.account, fixed at reserve
    team            TEXT    NOT NULL,
    key_id          TEXT    NOT NULL,
    model           TEXT    NOT NULL,                           -- as the configuration names it
    operation       TEXT    NOT NULL,                           -- 'generation' or 'edit'
    upstream        TEXT    NOT NULL,                           -- the configured upstream's name
    images          INTEGER NOT NULL,                           -- pictures asked for
    price_id        TEXT    NOT NULL,                           -- the price row that bounds and settles it
    fingerprint     TEXT    NOT NULL,                           -- of the request, guards the idempotency key
    idempotency_key TEXT,                                       -- NULL: none, moved on, or older than 24 h
    worker          TEXT    NOT NULL,                           -- the process that runs the call
    at              INTEGER NOT NULL,                           -- when it was reserved
    day             TEXT    NOT NULL,                           -- UTC day of at: its row in usage_daily
    lease_ends      INTEGER NOT NULL,                           -- from when a sweep may expire it
    outcome         TEXT,                                       -- 'delivered', 'unknown', ...; NULL while H
    basis           TEXT,                                       -- 'usage', 'estimated', 'none'; NULL while H
    flags           TEXT    NOT NULL DEFAULT '[]'               -- JSON list: 'unpriced', 'no_usage', ...
) STRICT, WITHOUT ROWID;

-- One key of a team stands for at most one call.
CREATE UNIQUE INDEX hold_idempotency ON hold (team, idempotency_key) WHERE idempotency_key IS NOT NULL;
-- Idempotency keys by age, for the sweep that clears them.
CREATE INDEX hold_idempotency_age ON hold (at) WHERE idempotency_key IS NOT NULL;
-- Open holds by the end of their lease, for the sweep and the count.
CREATE INDEX hold_open ON hold (lease_ends) WHERE state = 'H';
-- Expired holds with their cost, for the sum of what is unresolved.
CREATE INDEX hold_unresolved ON hold (cost) WHERE state = 'X';

-- One row an event, for ever. The sums of its two amounts over a hold are the hold.
CREATE TABLE journal (
    seq     INTEGER NOT NULL PRIMARY KEY,                       -- the order of commits
    at      INTEGER,                                            -- when; NULL where the caller named no time
    rid     TEXT    NOT NULL,                                   -- hold.rid
    kind    TEXT    NOT NULL CHECK (kind IN ('H', 'P', 'V', 'X')),  -- the state it led to
    pending INTEGER NOT NULL,                                   -- added to balance.pending of its accounts
    posted  INTEGER NOT NULL,                                   -- added to balance.posted of its accounts
    detail  TEXT    NOT NULL DEFAULT '{}'                       -- JSON: outcome, basis, images, usage, flags
) STRICT;

CREATE TRIGGER journal_is_never_updated BEFORE UPDATE ON journal
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER journal_is_never_deleted BEFORE DELETE ON journal
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;

-- What one team, key and model did on one UTC day. Held and voided calls count nowhere.
CREATE TABLE usage_daily (
    day             TEXT    NOT NULL,                           -- '2026-11-22', of the reservation
    team            TEXT    NOT NULL,
    key_id          TEXT    NOT NULL,
    model           TEXT    NOT NULL,
    requests        INTEGER NOT NULL,                           -- closed calls and replays
    images          INTEGER NOT NULL,                           -- pictures delivered
    cached_requests INTEGER NOT NULL,                           -- of the requests, answered from the cache
    text_in         INTEGER NOT NULL,                           -- tokens
    image_in        INTEGER NOT NULL,                           -- tokens
    text_out        INTEGER NOT NULL,                           -- tokens
    image_out       INTEGER NOT NULL,                           -- tokens
    cost            INTEGER NOT NULL,                           -- the sum of hold.cost
    avoided         INTEGER NOT NULL,                           -- what the replays would have cost
    unresolved      INTEGER NOT NULL,                           -- of the requests, those in state X
    unresolved_cost INTEGER NOT NULL,                           -- of the cost, theirs
    flagged         INTEGER NOT NULL,                           -- of the requests, those whose cost may be wrong
    PRIMARY KEY (day, team, key_id, model)
) STRICT, WITHOUT ROWID;

-- Teams made by a command. Those declared in the configuration file never come here.
CREATE TABLE team (
    id            TEXT    NOT NULL PRIMARY KEY,                 -- its name
    models        TEXT    NOT NULL,                             -- JSON list of configured names, '*' for any
    limits        TEXT    NOT NULL,                             -- JSON object: the fields of domain.team.Limits
    cache_enabled INTEGER NOT NULL CHECK (cache_enabled IN (0, 1)),
    disabled      INTEGER NOT NULL CHECK (disabled IN (0, 1))
) STRICT, WITHOUT ROWID;

-- Keys made by a command. The secret is nowhere.
CREATE TABLE key (
    id       TEXT    NOT NULL PRIMARY KEY,                      -- public: logged and listed
    digest   BLOB    NOT NULL UNIQUE,                           -- HMAC of the secret
    team     TEXT    NOT NULL REFERENCES team (id),
    name     TEXT    NOT NULL,                                  -- for people
    models   TEXT,                                              -- JSON list; NULL: whatever the team may use
    limits   TEXT    NOT NULL,                                  -- JSON object: the fields of domain.team.Limits
    created  INTEGER,
    expires  INTEGER,                                           -- NULL: never
    disabled INTEGER NOT NULL CHECK (disabled IN (0, 1)),
    revoked  INTEGER                                            -- NULL: still good
) STRICT, WITHOUT ROWID;
