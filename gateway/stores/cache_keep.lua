#!lua
-- The last step of a put: the meta, the time to live, and the name under which it is found.
-- KEYS: 1 staging hash, 2 the entry.  ARGV: 1 meta, 2 ms to live
redis.call('HSET', KEYS[1], 'meta', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('RENAME', KEYS[1], KEYS[2])
return 1
