#!lua
-- Bytes of a stream, under their offset. `size` is how many there are, `last` where they end.
-- KEYS: 1 the stream.  ARGV: 1 offset, 2 bytes, 3 how many there may be, 4 ms to keep them
local held = redis.call('HSTRLEN', KEYS[1], ARGV[1])
local about = redis.call('HMGET', KEYS[1], 'size', 'last')
local size = tonumber(about[1] or '0') + #ARGV[2] - held
if #ARGV[2] > held and size <= tonumber(ARGV[3]) then
  local last = math.max(tonumber(about[2] or '0'), ARGV[1] + #ARGV[2])
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], 'size', size, 'last', last)
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
