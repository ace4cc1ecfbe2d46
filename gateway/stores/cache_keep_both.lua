#!lua
-- Two small entries with the same bytes, each in one piece. Once more, after a lost reply, changes nothing: the meta
-- names its put.
-- KEYS: the entries.  ARGV: 1 field, 2 bytes, then for each entry: meta, ms to live
for i, entry in ipairs(KEYS) do
  local meta = ARGV[1 + 2 * i]
  -- pcall: what is in the entry's place may be no hash.
  if redis.pcall('HGET', entry, 'meta') ~= meta then
    redis.call('UNLINK', entry)
    redis.call('HSET', entry, 'meta', meta, ARGV[1], ARGV[2])
    redis.call('PEXPIRE', entry, ARGV[2 + 2 * i])
  end
end
return 1
