-- Counts waiting tasks of tenants that have their turn in a lane, and stops at a number.
local most, lane = tonumber(ARGV[2]), ARGV[3]
local count = 0
for _, tenant in ipairs(redis.call('ZRANGE', TURNS[lane], 0, most - 1)) do
  count = count + redis.call('ZCARD', WAITING[lane] .. tenant)
  if count >= most then return most end
end
return count
