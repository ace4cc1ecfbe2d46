#!lua flags=allow-oom
-- Renews the leases of running calls; one that lapsed, or was flushed, comes back: its call still runs.
-- KEYS[i] holds the slot of ARGV[i + 2]; a key may come more than once.  ARGV: 1 clock offset µs, 2 lease µs
local time = redis.call('TIME')
local lease = tonumber(ARGV[2])
local ends = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1] + lease)
for i = 1, #KEYS do
  redis.call('ZADD', KEYS[i], ends, ARGV[i + 2])
  redis.call('PEXPIRE', KEYS[i], string.format('%.0f', lease * 4 / 1000))
end
return 1
