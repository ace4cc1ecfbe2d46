#!lua flags=allow-oom
-- Frees the slots of calls.  KEYS[i] holds the slot of ARGV[i]; a key may come more than once.
for i = 1, #KEYS do redis.call('ZREM', KEYS[i], ARGV[i]) end
return 1
