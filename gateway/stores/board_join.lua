#!lua flags=allow-oom
-- Finds a flight of a call, and counts the caller among its watchers. The same watcher again gets the same flight.
-- KEYS: 1 the flights of the call (zset), 2 what this watcher joined, 3 since when this Redis remembers
-- ARGV: 1 clock offset µs (tests only), 2 lease µs, 3 what a flight's key begins with (same slot), 4 the watcher,
--       5 orphans only '1' | '', 6 µs that a running one is joined, 7 µs that an ended one is, 8 ms to know the watcher
-- Returns {since}, or {since, notice}.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ARGV[1]
local stale = math.max(0, now - tonumber(ARGV[2]))

local function int(n) return string.format('%.0f', n) end

local since = redis.call('GET', KEYS[3])
if not since then
  since = int(now)
  redis.call('SET', KEYS[3], since)
end

local before = redis.call('GET', KEYS[2])
if before then return {since, redis.call('HGET', ARGV[3] .. before, 'notice')} end

-- The oldest between two scores. Of more than a hundred, that of the first hundred.
local function pick(from, to)
  local found, oldest, notice
  for _, rid in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], from, to, 'LIMIT', 0, 100)) do
    local f = redis.call('HMGET', ARGV[3] .. rid, 'notice', 'started', 'ended')
    local started, ended = tonumber(f[2] or '0'), tonumber(f[3] or '0')
    local over = ended > 0 and ended + ARGV[7] <= now or ended == 0 and started + ARGV[6] <= now
    if over then
      redis.call('ZREM', KEYS[1], rid)
    elseif not oldest or started < oldest then
      found, oldest, notice = rid, started, f[1]
    end
  end
  return found, notice
end

local rid, notice = pick('-inf', int(stale))
if not rid and ARGV[5] ~= '1' then rid, notice = pick('(' .. int(stale), '+inf') end
if not rid then return {since} end
redis.call('HSET', ARGV[3] .. rid, 'w:' .. ARGV[4], int(now))
redis.call('ZADD', KEYS[1], int(now), rid)
redis.call('SET', KEYS[2], rid, 'PX', ARGV[8])
return {since, notice}
