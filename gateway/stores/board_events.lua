#!lua flags=no-writes
-- The bytes of a stream from an offset on, up to where some are missing.
-- KEYS: 1 the stream.  ARGV: 1 offset, 2 how many bytes are enough
local at, enough, pieces = tonumber(ARGV[1]), tonumber(ARGV[2]), {}
local last = tonumber(redis.call('HGET', KEYS[1], 'last') or '0')

-- The rest of a piece that begins before `at`.
local function within()
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local from = tonumber(field)
    if from and from < at and from + redis.call('HSTRLEN', KEYS[1], field) > at then
      return string.sub(redis.call('HGET', KEYS[1], field), at - from + 1)
    end
  end
end

while at < last and enough > 0 do
  local piece = redis.call('HGET', KEYS[1], string.format('%.0f', at)) or within()
  if not piece then break end
  pieces[#pieces + 1] = piece
  at, enough = at + #piece, enough - #piece
end
return pieces
