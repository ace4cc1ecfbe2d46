-- The first half of each month, of its days. Harmless where it is run again: no backup has it, and
-- whatever is restored is restored with it.

UPDATE usage_by_user
   SET half_requests = early.requests, half_images = early.images, half_cost = early.cost,
       half_unresolved = early.unresolved
  FROM (SELECT substr(period, 1, 7) AS month, team, end_user, sum(requests) AS requests,
               sum(images) AS images, sum(cost) AS cost, sum(unresolved) AS unresolved
          FROM usage_by_user WHERE length(period) = 10 AND substr(period, 9) <= '15'
         GROUP BY 1, 2, 3) AS early
 WHERE usage_by_user.period = early.month AND usage_by_user.team = early.team
   AND usage_by_user.end_user = early.end_user;
