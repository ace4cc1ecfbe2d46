-- The table of sqlite/0004. What it has of the time before is added by functions, day by day, each in
-- a transaction of its own (postgres_schema), so that no call waits for all of it.

-- What one end user of a team did on one UTC day, and the same of one month. It stays when calls are
-- forgotten. Held and voided calls count nowhere, answers from the cache and adjustments neither.
CREATE TABLE usage_by_user (
    period     TEXT   COLLATE "C" NOT NULL,                     -- '2026-11-22', of the reservation; or '2026-11'
    team       TEXT   COLLATE "C" NOT NULL,
    end_user   TEXT   COLLATE "C" NOT NULL,                     -- hold.end_user; '': unknown
    requests   BIGINT NOT NULL,                                 -- closed calls
    images     BIGINT NOT NULL,                                 -- pictures of answers that were delivered
    cost       BIGINT NOT NULL,                                 -- the sum of hold.cost
    unresolved BIGINT NOT NULL,                                 -- of the requests, those in state X
    PRIMARY KEY (period, team, end_user)
) WITH (fillfactor = 70);

-- Of holds as they are less the holds as they were: in the transaction that changes them, whoever does;
-- releases before this one do not know of it, and need no right to the table. Rows are taken in order.
CREATE FUNCTION holds_count_for_their_users() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved)
    SELECT part.period, team, end_user,
           sum(sign), sum(sign * drawn), sum(sign * cost), sum(sign * expired)
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
           LATERAL (VALUES (day), (substr(day, 1, 7))) AS part (period)
     GROUP BY part.period, team, end_user
    HAVING sum(sign) <> 0 OR sum(sign * drawn) <> 0 OR sum(sign * cost) <> 0
        OR sum(sign * expired) <> 0
     ORDER BY part.period, team, end_user
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests,
           images = kept.images + excluded.images,
           cost = kept.cost + excluded.cost,
           unresolved = kept.unresolved + excluded.unresolved;
    RETURN NULL;
END
$$;
CREATE TRIGGER holds_count_for_their_users AFTER UPDATE ON hold
    REFERENCING OLD TABLE AS before NEW TABLE AS after
    FOR EACH STATEMENT EXECUTE FUNCTION holds_count_for_their_users();

-- Adds what a day's holds have that their users have not: everything the first time, nothing after it.
-- One statement sees one state of both tables, so calls may be settled meanwhile.
CREATE FUNCTION count_users_of_day(which TEXT) RETURNS void LANGUAGE sql AS $$
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved)
    SELECT which, team, end_user, sum(requests), sum(images), sum(cost), sum(unresolved) FROM (
           SELECT team, end_user, 1 AS requests,
                  CASE WHEN operation = 'response' THEN drawn_images
                       WHEN outcome = 'delivered' THEN images ELSE 0 END AS images,
                  cost, CASE state WHEN 'X' THEN 1 ELSE 0 END AS unresolved
             FROM hold WHERE day = which AND state IN ('P', 'X')
            UNION ALL
           SELECT team, end_user, -requests, -images, -cost, -unresolved
             FROM usage_by_user WHERE period = which
           ) AS part
     GROUP BY team, end_user
    HAVING sum(requests) <> 0 OR sum(images) <> 0 OR sum(cost) <> 0 OR sum(unresolved) <> 0
     ORDER BY team, end_user
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests,
           images = kept.images + excluded.images,
           cost = kept.cost + excluded.cost,
           unresolved = kept.unresolved + excluded.unresolved
$$;

-- Adds the calls of a day that were forgotten: nobody knows whose they were.
CREATE FUNCTION count_forgotten_of_day(which TEXT) RETURNS void LANGUAGE sql AS $$
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved)
    SELECT which, team, '', sum(requests), 0, sum(cost), 0 FROM (
           SELECT team, requests - cached_requests AS requests, cost
             FROM usage_daily WHERE day = which
            UNION ALL
           SELECT team, 0, -amount FROM adjustment WHERE day = which AND rid IS NULL
            UNION ALL
           SELECT team, -requests, -cost FROM usage_by_user WHERE period = which
           ) AS part
     GROUP BY team HAVING sum(requests) <> 0 OR sum(cost) <> 0
     ORDER BY team
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests, cost = kept.cost + excluded.cost
$$;

-- Adds what the days of a month have that the month has not.
CREATE FUNCTION count_users_of_month(which TEXT) RETURNS void LANGUAGE sql AS $$
    INSERT INTO usage_by_user AS kept (period, team, end_user, requests, images, cost, unresolved)
    SELECT which, team, end_user, sum(requests), sum(images), sum(cost), sum(unresolved) FROM (
           SELECT team, end_user, requests, images, cost, unresolved
             FROM usage_by_user WHERE period BETWEEN which || '-01' AND which || '-31'
            UNION ALL
           SELECT team, end_user, -requests, -images, -cost, -unresolved
             FROM usage_by_user WHERE period = which
           ) AS part
     GROUP BY team, end_user
    HAVING sum(requests) <> 0 OR sum(images) <> 0 OR sum(cost) <> 0 OR sum(unresolved) <> 0
     ORDER BY team, end_user
        ON CONFLICT (period, team, end_user) DO UPDATE SET
           requests = kept.requests + excluded.requests,
           images = kept.images + excluded.images,
           cost = kept.cost + excluded.cost,
           unresolved = kept.unresolved + excluded.unresolved
$$;
