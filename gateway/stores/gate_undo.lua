#!lua flags=allow-oom
-- Gives back what gate.lua took, once: the marker says whether rates are still to be refunded.
-- KEYS: 1 the call's marker, then one per limit.  ARGV: 1 rid, 2 clock offset µs, then per limit: 's'|'r', amount, demand
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2] + ARGV[2]
local refund = redis.call('DEL', KEYS[1]) == 1
for i = 2, #KEYS do
  local at = 3 + (i - 2) * 3
  local amount, demand = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  if ARGV[at] == 's' then
    redis.call('ZREM', KEYS[i], ARGV[1])
  elseif refund and amount > 0 and demand > 0 then
    local tat = tonumber(redis.call('GET', KEYS[i]) or '0') - demand * math.ceil(60000000 / amount)
    if tat > now then
      redis.call('SET', KEYS[i], string.format('%.0f', tat), 'PX', string.format('%.0f', math.ceil((tat - now) / 1000)))
    else
      redis.call('DEL', KEYS[i])
    end
  end
end
return 1
