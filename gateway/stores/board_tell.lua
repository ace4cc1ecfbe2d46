#!lua flags=allow-oom
-- What a process knows of flights, told as often as it likes: nothing is counted twice, nothing taken back.
-- KEYS: 1 since when this Redis remembers, then for each flight: it, the flights of its call (zset)
-- ARGV: 1 clock offset µs (tests only), 2 lease µs, 3 ms to keep one while it runs, 4 ms once it has ended,
--       5 ms to know that it is gone, 6 who flies them, then for each flight:
--       1 rid, 2 notice ('': somebody else's flight; '-': told before), 3 its age µs,
--       4 'runs' | 'ended' | 'void' (ended, and nobody joins it), 5 delivered '1' | '', 6 who took it over, or '',
--       7 how many watchers follow, 8 how many have left, these watchers (entered only with a new flight), those that left
-- A flight is a hash: notice, worker, started, beat, ended (µs, 0: it runs), joinable, delivered, partials, wants,
-- taken, and for each watcher w:<name> = its last beat. Where nobody can join or watches it, `gone` is all that is
-- left, so that a command which comes late does not raise the dead.
-- The zset has it at its newest watcher's beat, or, where the last one left, at its start - 2^52: orphans first.
-- Returns {since when, which of them are not known and came without their notice...}. `since` has no end: where it
-- changes, everything was forgotten.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ARGV[1]
local stale = math.max(0, now - tonumber(ARGV[2]))

local function int(n) return string.format('%.0f', n) end

local since = redis.call('GET', KEYS[1])
if not since then
  since = int(now)
  redis.call('SET', KEYS[1], since)
end

-- Whether it is known now, or need not be.
local function tell(flight, index, at)
  local rid, notice, state = ARGV[at], ARGV[at + 1], ARGV[at + 3]
  local staying, left = ARGV[at + 6], ARGV[at + 7]
  local known = redis.call('HMGET', flight, 'notice', 'gone')
  if known[2] then return true end
  if not known[1] then
    if notice == '' or notice == '-' then return notice == '' end
    redis.call('HSET', flight, 'notice', notice, 'worker', ARGV[6], 'started', int(now - ARGV[at + 2]), 'beat', int(now),
      'ended', '0')
    redis.call('PEXPIRE', flight, ARGV[3])
    for i = at + 8, at + 7 + staying do redis.call('HSET', flight, 'w:' .. ARGV[i], int(now)) end
  end
  for i = at + 8 + staying, at + 7 + staying + left do redis.call('HDEL', flight, 'w:' .. ARGV[i]) end
  if ARGV[at + 4] == '1' then redis.call('HSET', flight, 'delivered', '1') end
  if ARGV[at + 5] ~= '' then redis.call('HSETNX', flight, 'taken', ARGV[at + 5]) end
  if state ~= 'runs' and redis.call('HGET', flight, 'ended') == '0' then
    redis.call('HSET', flight, 'ended', int(now), 'joinable', state == 'ended' and '1' or '0')
    redis.call('PEXPIRE', flight, ARGV[4])
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
    redis.call('PEXPIRE', index, int(ARGV[3] + ARGV[4]))
  else
    redis.call('ZREM', index, rid)
    if f.ended ~= '0' and watched <= stale then
      redis.call('DEL', flight)
      redis.call('HSET', flight, 'gone', '1')
      redis.call('PEXPIRE', flight, ARGV[5])
    end
  end
  return true
end

local reply, at = {since}, 7
for i = 2, #KEYS, 2 do
  if not tell(KEYS[i], KEYS[i + 1], at) then reply[#reply + 1] = i / 2 end
  at = at + 8 + ARGV[at + 6] + ARGV[at + 7]
end
return reply
