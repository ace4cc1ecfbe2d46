#!lua flags=allow-oom
-- What runs and what is watched in one process still does so; says which of these flights' events are wanted.
-- KEYS: for each flight the flight and the flights of its call (zset)
-- ARGV: 1 clock offset µs (tests only), 2 ms to keep a flight at least, then for each flight: rid, flown here '1' | '',
--       events wanted '1' | '', partials, how many watchers follow, these watchers
-- Returns for each flight 1: its events are wanted, 0: they are not, -1: there is no such flight.
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1])
local reply, at = {}, 3
for i = 1, #KEYS, 2 do
  local flight, watchers = KEYS[i], tonumber(ARGV[at + 4])
  local f = redis.call('HMGET', flight, 'notice', 'wants')
  if not f[1] then
    reply[#reply + 1] = -1
  else
    local said = {}
    local function say(field, value) said[#said + 1], said[#said + 2] = field, value end
    if ARGV[at + 1] == '1' then
      say('beat', now)
      say('partials', ARGV[at + 3])
    end
    if ARGV[at + 2] == '1' then say('wants', '1') end
    for w = at + 5, at + 4 + watchers do say('w:' .. ARGV[w], now) end
    if #said > 0 then redis.call('HSET', flight, unpack(said)) end
    if watchers > 0 then redis.call('ZADD', KEYS[i + 1], 'XX', 'GT', now, ARGV[at]) end
    redis.call('PEXPIRE', flight, ARGV[2], 'GT')
    reply[#reply + 1] = (f[2] or ARGV[at + 2] == '1') and 1 or 0
  end
  at = at + 5 + watchers
end
return reply
