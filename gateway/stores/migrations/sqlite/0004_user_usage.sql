-- What each end user has bought, added up as it is booked; and two indexes that do not grow with what
-- nobody asks for.

-- What one end user of a team did on one UTC day, and the same of one month. It stays when calls are
-- forgotten. Held and voided calls count nowhere, answers from the cache and adjustments neither.
CREATE TABLE usage_by_user (
    period     TEXT    NOT NULL,                                -- '2026-11-22', of the reservation; or '2026-11'
    team       TEXT    NOT NULL,
    end_user   TEXT    NOT NULL,                                -- hold.end_user; '': unknown
    requests   INTEGER NOT NULL,                                -- closed calls
    images     INTEGER NOT NULL,                                -- pictures of answers that were delivered
    cost       INTEGER NOT NULL,                                -- the sum of hold.cost
    unresolved INTEGER NOT NULL,                                -- of the requests, those in state X
    PRIMARY KEY (period, team, end_user)
) STRICT, WITHOUT ROWID;

-- Of a hold as it is less the hold as it was: in the transaction that changes it, whoever does.
CREATE TRIGGER hold_counts_for_its_user AFTER UPDATE OF state, cost, outcome, drawn_images ON hold
WHEN old.state <> new.state OR old.cost <> new.cost OR old.outcome IS NOT new.outcome
  OR old.drawn_images <> new.drawn_images
BEGIN
    INSERT INTO usage_by_user (period, team, end_user, requests, images, cost, unresolved)
    SELECT part.period, new.team, new.end_user,
           (new.state IN ('P', 'X')) - (old.state IN ('P', 'X')),
           iif(new.state NOT IN ('P', 'X'), 0, iif(new.operation = 'response', new.drawn_images,
               iif(new.outcome IS 'delivered', new.images, 0)))
         - iif(old.state NOT IN ('P', 'X'), 0, iif(old.operation = 'response', old.drawn_images,
               iif(old.outcome IS 'delivered', old.images, 0))),
           iif(new.state IN ('P', 'X'), new.cost, 0) - iif(old.state IN ('P', 'X'), old.cost, 0),
           (new.state = 'X') - (old.state = 'X')
      FROM (SELECT new.day AS period UNION ALL SELECT substr(new.day, 1, 7)) AS part WHERE true
        ON CONFLICT DO UPDATE SET
           requests = requests + excluded.requests,
           images = images + excluded.images,
           cost = cost + excluded.cost,
           unresolved = unresolved + excluded.unresolved;
END;

-- Calls by day, for what went where.
CREATE INDEX hold_day ON hold (day);
-- Holds that ask for a look, by id. A bound that was a guess ('soft') asks for none, and many are.
CREATE INDEX hold_asking ON hold (rid) WHERE state = 'X' OR flags NOT IN ('[]', '["soft"]');
DROP INDEX hold_doubtful;
-- Its sums are added up now.
DROP INDEX hold_user;
