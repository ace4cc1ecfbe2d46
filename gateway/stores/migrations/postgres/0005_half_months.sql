-- The columns of sqlite/0007: beside what a user did in a month, what they did in its first half, so
-- that a stretch of days is few rows. They are of the month's own row: no call writes another one.

-- Whoever has changed a hold is waited for, and whoever is about to waits: a call that the functions
-- below do not count is in the sums that are made of the time before.
LOCK TABLE hold IN SHARE ROW EXCLUSIVE MODE;

-- Of the days 1 to 15. NULL in a day's row, and in a month's until there is something.
ALTER TABLE usage_by_user
    ADD COLUMN half_requests   BIGINT,
    ADD COLUMN half_images     BIGINT,
    ADD COLUMN half_cost       BIGINT,
    ADD COLUMN half_unresolved BIGINT;

-- As in 0003, with half months.
CREATE OR REPLACE FUNCTION holds_count_for_their_users() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved,
           half_requests, half_images, half_cost, half_unresolved)
    SELECT part.period, team, end_user,
           sum(sign), sum(sign * drawn), sum(sign * cost), sum(sign * expired),
           sum(part.half * sign), sum(part.half * sign * drawn), sum(part.half * sign * cost),
           sum(part.half * sign * expired)
      FROM (SELECT 1 AS sign, day, team, end_user, cost, CASE state WHEN 'X' THEN 1 ELSE 0 END,
                   CASE WHEN operation = 'response' THEN drawn_images
                        WHEN outcome = 'delivered' THEN images ELSE 0 END
              FROM after WHERE state IN ('P', 'X')
             UNION ALL
            SELECT -1, day, team, end_user, cost, CASE state WHEN 'X' THEN 1 ELSE 0 END,
                   CASE WHEN operation = 'response' THEN drawn_images
                        WHEN outcome = 'delivered' THEN images ELSE 0 END
              FROM before WHERE state IN ('P', 'X')
           ) AS one (sign, day, team, end_user, cost, expired, drawn),
           LATERAL (VALUES (day, NULL),
                           (substr(day, 1, 7), CASE WHEN substr(day, 9) <= '15' THEN 1 ELSE 0 END)
                   ) AS part (period, half)
     GROUP BY part.period, team, end_user
    HAVING sum(sign) <> 0 OR sum(sign * drawn) <> 0 OR sum(sign * cost) <> 0
        OR sum(sign * expired) <> 0 OR sum(part.half * sign) <> 0
        OR sum(part.half * sign * drawn) <> 0 OR sum(part.half * sign * cost) <> 0
        OR sum(part.half * sign * expired) <> 0
     ORDER BY part.period, team, end_user
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests,
           images = kept.images + excluded.images,
           cost = kept.cost + excluded.cost,
           unresolved = kept.unresolved + excluded.unresolved,
           half_requests = coalesce(kept.half_requests, 0) + excluded.half_requests,
           half_images = coalesce(kept.half_images, 0) + excluded.half_images,
           half_cost = coalesce(kept.half_cost, 0) + excluded.half_cost,
           half_unresolved = coalesce(kept.half_unresolved, 0) + excluded.half_unresolved;
    RETURN NULL;
END
$$;

-- Adds what the days of a month have that the month, or its first half, has not: everything the first
-- time, nothing after it. One statement sees one state of all rows, so calls may be settled meanwhile.
CREATE OR REPLACE FUNCTION count_users_of_month(which TEXT) RETURNS void LANGUAGE sql AS $$
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved,
           half_requests, half_images, half_cost, half_unresolved)
    SELECT which, team, end_user, sum(requests), sum(images), sum(cost), sum(unresolved),
           sum(half_requests), sum(half_images), sum(half_cost), sum(half_unresolved) FROM (
           SELECT team, end_user, requests, images, cost, unresolved, early * requests,
                  early * images, early * cost, early * unresolved
             FROM usage_by_user, LATERAL (
                  SELECT CASE WHEN period <= which || '-15' THEN 1 ELSE 0 END) AS day (early)
            WHERE period BETWEEN which || '-01' AND which || '-31'
            UNION ALL
           SELECT team, end_user, -requests, -images, -cost, -unresolved,
                  -coalesce(half_requests, 0), -coalesce(half_images, 0), -coalesce(half_cost, 0),
                  -coalesce(half_unresolved, 0)
             FROM usage_by_user WHERE period = which
           ) AS part (team, end_user, requests, images, cost, unresolved,
                      half_requests, half_images, half_cost, half_unresolved)
     GROUP BY team, end_user
    HAVING sum(requests) <> 0 OR sum(images) <> 0 OR sum(cost) <> 0 OR sum(unresolved) <> 0
        OR sum(half_requests) <> 0 OR sum(half_images) <> 0 OR sum(half_cost) <> 0
        OR sum(half_unresolved) <> 0
     ORDER BY team, end_user
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests,
           images = kept.images + excluded.images,
           cost = kept.cost + excluded.cost,
           unresolved = kept.unresolved + excluded.unresolved,
           half_requests = coalesce(kept.half_requests, 0) + excluded.half_requests,
           half_images = coalesce(kept.half_images, 0) + excluded.half_images,
           half_cost = coalesce(kept.half_cost, 0) + excluded.half_cost,
           half_unresolved = coalesce(kept.half_unresolved, 0) + excluded.half_unresolved
$$;
