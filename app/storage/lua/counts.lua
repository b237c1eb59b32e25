-- Counts the waiting and running tasks of each tenant that has any, by reads whose number follows from that of tenants.
-- Returns a list for each: tenant, oldest waiting task ('' for none), number running, first start of these ('' for none), and
-- the numbers waiting in the lanes.
local found = {}
for _, tenant in ipairs(redis.call('ZRANGE', TENANTS, 0, -1)) do
  local running = redis.call('ZCARD', RUNNING .. tenant)
  if count_waiting(tenant) + running > 0 then
    local oldest, waiting = '', {}
    for _, lane in ipairs(LANES) do
      local tasks, priority = WAITING[lane] .. tenant, '-inf'
      waiting[#waiting + 1] = redis.call('ZCARD', tasks)
      while priority do  -- of each priority, the first task is the oldest
        local first = redis.call('ZRANGEBYSCORE', tasks, priority, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
        if first[1] and (oldest == '' or first[1] < oldest) then oldest = first[1] end
        priority = first[2] and '(' .. first[2]
      end
    end
    local started = redis.call('ZRANGE', RUNNING .. tenant, 0, 0, 'WITHSCORES')[2] or ''
    found[#found + 1] = {tenant, oldest, running, started, unpack(waiting)}
  end
end
return found
