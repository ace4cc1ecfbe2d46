#!lua
-- One call against all its limits, all or nothing.
-- KEYS: 1 the call's marker, 2 since when this Redis counts (µs), then one per limit: a TAT (string, µs) or the
--       slots (zset rid -> lease end, µs)
-- ARGV: 1 rid, 2 clock offset µs (tests only), 3 lease µs, 4 marker ms, then per limit: 's'|'r', amount, demand
-- Returns {1, since, level...}: granted, or granted before; a level is the slots in use or the µs the TAT is ahead.
--      or {0, since, i, wait µs}: limit i refuses for longest; -1: it can never fit.
-- `since` has no end: where it changes, everything was forgotten.
-- Every number is an integer below 2^53, so Lua's doubles are exact.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ARGV[2]
local lease, remembered = tonumber(ARGV[3]), ARGV[4]
local MINUTE, SLOT_WAIT = 60000000, 1000000

local function int(n) return string.format('%.0f', n) end

local since = tonumber(redis.call('GET', KEYS[2]) or '0')
if since == 0 then
  since = now
  redis.call('SET', KEYS[2], int(now))
end

local repeated = redis.call('EXISTS', KEYS[1]) == 1
local limits, worst, culprit = {}, 0, 0
for i = 3, #KEYS do
  local at = 5 + (i - 3) * 3
  local l = {key = KEYS[i], kind = ARGV[at], amount = tonumber(ARGV[at + 1]), demand = tonumber(ARGV[at + 2])}
  local wait = 0
  if l.kind == 's' then
    redis.call('ZREMRANGEBYSCORE', l.key, '-inf', int(now))
    repeated = repeated or redis.call('ZSCORE', l.key, ARGV[1]) ~= false
    l.level = redis.call('ZCARD', l.key)
    if l.demand > 0 and l.level + l.demand > l.amount then wait = SLOT_WAIT end
  else
    l.each = l.amount > 0 and math.ceil(MINUTE / l.amount) or 0
    local tat = tonumber(redis.call('GET', l.key) or '0')
    -- A clock that went back (failover) must not lock anybody out for longer than a full minute's worth.
    l.level = math.max(0, math.min(tat - now, l.amount * l.each))
    if l.demand > 0 then wait = math.max(0, l.level + (l.demand - l.amount) * l.each) end
  end
  if l.demand > l.amount and l.demand > 0 then wait = math.huge end
  if wait > worst then worst, culprit = wait, i - 2 end
  limits[#limits + 1] = l
end

if not repeated then
  if worst == math.huge then return {0, since, culprit, -1} end
  if worst > 0 then return {0, since, culprit, worst} end
  redis.call('SET', KEYS[1], '1', 'PX', remembered)
end

local reply = {1, since}
for _, l in ipairs(limits) do
  if not repeated and l.demand > 0 then
    if l.kind == 's' then
      redis.call('ZADD', l.key, int(now + lease), ARGV[1])
      redis.call('PEXPIRE', l.key, int(lease * 4 / 1000))
      l.level = l.level + 1
    else
      l.level = l.level + l.demand * l.each
      redis.call('SET', l.key, int(now + l.level), 'PX', int(math.ceil(l.level / 1000)))
    end
  end
  reply[#reply + 1] = l.level
end
return reply
