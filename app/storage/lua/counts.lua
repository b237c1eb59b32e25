-- Counts the waiting and running tasks of each tenant that has any, by reads whose number follows from that of tenants.
-- Returns a list for each: tenant, number waiting, oldest waiting task ('' for none), number running, first start of these
-- ('' for none).
local found = {}
for _, tenant in ipairs(redis.call('ZRANGE', TENANTS, 0, -1)) do
  local waiting, running = redis.call('ZCARD', WAITING .. tenant), redis.call('ZCARD', RUNNING .. tenant)
  if waiting + running > 0 then
    local oldest, priority = '', '-inf'
    while priority do  -- of each priority, the first task is the oldest
      local first = redis.call('ZRANGEBYSCORE', WAITING .. tenant, priority, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if first[1] and (oldest == '' or first[1] < oldest) then oldest = first[1] end
      priority = first[2] and '(' .. first[2]
    end
    local started = redis.call('ZRANGE', RUNNING .. tenant, 0, 0, 'WITHSCORES')[2] or ''
    found[#found + 1] = {tenant, waiting, oldest, running, started}
  end
end
return found
