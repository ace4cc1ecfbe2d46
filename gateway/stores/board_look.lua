#!lua flags=no-writes
-- KEYS: 1 the flight.  ARGV: 1 clock offset µs (tests only), 2 lease µs
-- Returns {notice, ended, alive, watchers, partials}, or 0: there is no such flight, or -1: it is over.
local time = redis.call('TIME')
local stale = math.max(0, time[1] * 1000000 + time[2] + ARGV[1] - tonumber(ARGV[2]))
local f, watchers = {}, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 'w:' then
    if tonumber(all[i + 1]) > stale then watchers = watchers + 1 end
  else
    f[all[i]] = all[i + 1]
  end
end
if f.gone then return -1 end
if not f.notice then return 0 end
local ended = f.ended ~= '0'
local alive = not ended and tonumber(f.beat) > stale
return {f.notice, ended and 1 or 0, alive and 1 or 0, watchers, tonumber(f.partials or '0')}
