#!lua
-- The last step of a put, or all of one that is small: the last piece, the meta, the time to live, and the name under
-- which it is found. Once more, after a lost reply, changes nothing: the meta names its put.
-- KEYS: 1 staging hash, 2 the entry.  ARGV: 1 meta, 2 ms to live, then, where there is a last piece: 3 field, 4 bytes
-- pcall: what is in the entry's place may be no hash.
if redis.pcall('HGET', KEYS[2], 'meta') == ARGV[1] then return 1 end
redis.call('HSET', KEYS[1], 'meta', ARGV[1], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('RENAME', KEYS[1], KEYS[2])
return 1
