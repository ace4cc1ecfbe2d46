#!lua
-- One piece of an answer that is still being put, under a key that nobody reads.
-- KEYS: 1 staging hash.  ARGV: 1 field, 2 bytes, 3 ms that an unfinished put may live
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
