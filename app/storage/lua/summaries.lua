-- Reads some fields of the newest jobs before one, without their requests and results, in one go.
-- KEYS: jobs. ARGV: where to begin, how many, the prefix of records, fields.
-- Returns ids, each followed by the values of its fields.
local begin, count, prefix = unpack(ARGV, 1, 3)
local found = {}
for _, id in ipairs(redis.call('ZREVRANGEBYLEX', KEYS[1], begin, '-', 'LIMIT', 0, count)) do
  found[#found + 1] = id
  found[#found + 1] = redis.call('HMGET', prefix .. id, unpack(ARGV, 4))
end
return found
