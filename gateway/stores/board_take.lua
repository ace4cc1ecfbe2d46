#!lua flags=allow-oom
-- Who may buy again what a flight left: the first to ask, however often it asks.  KEYS: 1 the flight.  ARGV: 1 who
if redis.call('HEXISTS', KEYS[1], 'notice') == 0 then return 0 end
redis.call('HSETNX', KEYS[1], 'taken', ARGV[1])
return redis.call('HGET', KEYS[1], 'taken') == ARGV[1] and 1 or 0
