#!lua
-- Whether scripts that write are run: one command of each kind that the others use, and nothing stays.
-- KEYS: 1 a key that nobody else uses. ARGV: 1 ms that it lives at most
redis.call('TIME')
for _, write in ipairs({{'SET', KEYS[1], '1'}, {'HSET', KEYS[1], 'f', '1'}, {'ZADD', KEYS[1], 1, 'm'}}) do
  redis.call('DEL', KEYS[1])
  redis.call(unpack(write))
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return redis.call('DEL', KEYS[1])
