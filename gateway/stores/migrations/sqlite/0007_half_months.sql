-- Beside what a user did in a month, what they did in its first half, so that a stretch of days is few
-- rows. It is of the month's own row: no call writes another one.

-- Of the days 1 to 15. NULL in a day's row, and in a month's until there is something.
ALTER TABLE usage_by_user ADD COLUMN half_requests INTEGER;
ALTER TABLE usage_by_user ADD COLUMN half_images INTEGER;
ALTER TABLE usage_by_user ADD COLUMN half_cost INTEGER;
ALTER TABLE usage_by_user ADD COLUMN half_unresolved INTEGER;

-- As in 0004, with half months.
DROP TRIGGER hold_counts_for_its_user;
CREATE TRIGGER hold_counts_for_its_user AFTER UPDATE OF state, cost, outcome, drawn_images ON hold
WHEN old.state <> new.state OR old.cost <> new.cost OR old.outcome IS NOT new.outcome
  OR old.drawn_images <> new.drawn_images
BEGIN
    INSERT INTO usage_by_user (period, team, end_user, requests, images, cost, unresolved,
           half_requests, half_images, half_cost, half_unresolved)
    SELECT part.period, new.team, new.end_user, one.requests, one.images, one.cost, one.unresolved,
           part.half * one.requests, part.half * one.images, part.half * one.cost,
           part.half * one.unresolved
      FROM (SELECT (new.state IN ('P', 'X')) - (old.state IN ('P', 'X')) AS requests,
                   iif(new.state NOT IN ('P', 'X'), 0, iif(new.operation = 'response',
                       new.drawn_images, iif(new.outcome IS 'delivered', new.images, 0)))
                 - iif(old.state NOT IN ('P', 'X'), 0, iif(old.operation = 'response',
                       old.drawn_images, iif(old.outcome IS 'delivered', old.images, 0))) AS images,
                   iif(new.state IN ('P', 'X'), new.cost, 0)
                 - iif(old.state IN ('P', 'X'), old.cost, 0) AS cost,
                   (new.state = 'X') - (old.state = 'X') AS unresolved) AS one,
           (SELECT new.day AS period, NULL AS half
             UNION ALL
            SELECT substr(new.day, 1, 7), substr(new.day, 9) <= '15') AS part WHERE true
        ON CONFLICT DO UPDATE SET
           requests = requests + excluded.requests,
           images = images + excluded.images,
           cost = cost + excluded.cost,
           unresolved = unresolved + excluded.unresolved,
           half_requests = coalesce(half_requests, 0) + excluded.half_requests,
           half_images = coalesce(half_images, 0) + excluded.half_images,
           half_cost = coalesce(half_cost, 0) + excluded.half_cost,
           half_unresolved = coalesce(half_unresolved, 0) + excluded.half_unresolved;
END;
