-- Counts waiting tasks of tenants that have their turn, and stops at a number.
local most = tonumber(ARGV[2])
local count = 0
for _, tenant in ipairs(redis.call('ZRANGE', TURNS, 0, most - 1)) do
  count = count + redis.call('ZCARD', WAITING .. tenant)
  if count >= most then return most end
end
return count
