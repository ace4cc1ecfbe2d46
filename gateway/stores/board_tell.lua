#!lua flags=allow-oom
-- What a process knows of a flight, told as often as it likes: nothing is counted twice, nothing taken back.
-- KEYS: 1 the flight, 2 the flights of its call (zset), 3 since when this Redis remembers
-- ARGV: 1 clock offset µs (tests only), 2 lease µs, 3 rid, 4 notice ('': somebody else's flight), 5 its age µs,
--       6 'runs' | 'ended' | 'void' (ended, and nobody joins it), 7 delivered '1' | '', 8 who took it over, or '',
--       9 ms to keep it while it runs, 10 ms once it has ended, 11 ms to know that it is gone, 12 who flies it,
--       13 how many watchers follow, these watchers (entered only with a new flight), then those that have left
-- A flight is a hash: notice, worker, started, beat, ended (µs, 0: it runs), joinable, delivered, partials, wants,
-- taken, and for each watcher w:<name> = its last beat. Where nobody can join or watches it, `gone` is all that is
-- left, so that a command which comes late does not raise the dead.
-- The zset has it at its newest watcher's beat, or, where the last one left, at its start - 2^52: orphans first.
-- Returns since when, which has no end: where it changes, everything was forgotten.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ARGV[1]
local stale = math.max(0, now - tonumber(ARGV[2]))
local flight, index, rid = KEYS[1], KEYS[2], ARGV[3]
local staying = tonumber(ARGV[13])

local function int(n) return string.format('%.0f', n) end

local since = redis.call('GET', KEYS[3])
if not since then
  since = int(now)
  redis.call('SET', KEYS[3], since)
end

local known = redis.call('HMGET', flight, 'notice', 'gone')
if known[2] then return since end
if not known[1] then
  if ARGV[4] == '' then return since end
  redis.call('HSET', flight, 'notice', ARGV[4], 'worker', ARGV[12], 'started', int(now - ARGV[5]), 'beat', int(now),
    'ended', '0')
  redis.call('PEXPIRE', flight, ARGV[9])
  for i = 14, 13 + staying do redis.call('HSET', flight, 'w:' .. ARGV[i], int(now)) end
end
for i = 14 + staying, #ARGV do redis.call('HDEL', flight, 'w:' .. ARGV[i]) end
if ARGV[7] == '1' then redis.call('HSET', flight, 'delivered', '1') end
if ARGV[8] ~= '' then redis.call('HSETNX', flight, 'taken', ARGV[8]) end
if ARGV[6] ~= 'runs' and redis.call('HGET', flight, 'ended') == '0' then
  redis.call('HSET', flight, 'ended', int(now), 'joinable', ARGV[6] == 'ended' and '1' or '0')
  redis.call('PEXPIRE', flight, ARGV[10])
end

local f, watched = {}, 0
local all = redis.call('HGETALL', flight)
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 'w:' then
    watched = math.max(watched, tonumber(all[i + 1]))
  else
    f[all[i]] = all[i + 1]
  end
end
if not f.delivered and f.joinable ~= '0' then
  redis.call('ZADD', index, int(watched > 0 and watched or f.started - 4503599627370496), rid)
  redis.call('PEXPIRE', index, int(ARGV[9] + ARGV[10]))
else
  redis.call('ZREM', index, rid)
  if f.ended ~= '0' and watched <= stale then
    redis.call('DEL', flight)
    redis.call('HSET', flight, 'gone', '1')
    redis.call('PEXPIRE', flight, ARGV[11])
  end
end
return since
