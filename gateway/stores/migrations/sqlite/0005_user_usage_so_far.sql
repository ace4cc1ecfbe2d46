-- What was bought before usage_by_user was there, from the holds and the days. Harmless where it is
-- run again, and a backup of a release before this one is restored with it.

DELETE FROM usage_by_user;

INSERT INTO usage_by_user (period, team, end_user, requests, images, cost, unresolved)
SELECT day, team, end_user, count(*),
       sum(CASE WHEN operation = 'response' THEN drawn_images
                WHEN outcome = 'delivered' THEN images ELSE 0 END),
       sum(cost), sum(state = 'X')
  FROM hold WHERE state IN ('P', 'X') GROUP BY day, team, end_user;

-- Calls that were forgotten are in their day alone: nobody knows whose they were.
INSERT INTO usage_by_user (period, team, end_user, requests, images, cost, unresolved)
SELECT day, team, '', sum(requests), 0, sum(cost), 0 FROM (
       SELECT day, team, requests - cached_requests AS requests, cost FROM usage_daily
        UNION ALL
       SELECT day, team, 0, -amount FROM adjustment WHERE rid IS NULL
        UNION ALL
       SELECT period, team, -requests, -cost FROM usage_by_user
       ) GROUP BY day, team HAVING sum(requests) <> 0 OR sum(cost) <> 0
    ON CONFLICT DO UPDATE SET
       requests = requests + excluded.requests, cost = cost + excluded.cost;

INSERT INTO usage_by_user (period, team, end_user, requests, images, cost, unresolved)
SELECT substr(period, 1, 7), team, end_user, sum(requests), sum(images), sum(cost), sum(unresolved)
  FROM usage_by_user WHERE length(period) = 10 GROUP BY 1, 2, 3;
