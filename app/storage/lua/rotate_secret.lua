-- Adds a secret. KEYS: the signer's secrets, by the time until which each signs.
-- ARGV: the time, the secret, the time until which former ones sign at most, how many may sign.
-- Returns 0 when too many would sign, 1 when it is the only one, 2 when former ones sign too.
local now, secret, until_ms, most = unpack(ARGV)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if tonumber(until_ms) > tonumber(now) and redis.call('ZCARD', KEYS[1]) >= tonumber(most) then return 0 end
for _, former in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  redis.call('ZADD', KEYS[1], 'LT', until_ms, former)
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], '+inf', secret)
return redis.call('ZCARD', KEYS[1]) > 1 and 2 or 1
