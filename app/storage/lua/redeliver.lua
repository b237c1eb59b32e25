-- Sends a delivery again, now, and with all the time for retries; a webhook that was turned off is on again.
-- Returns 0 when there is no such delivery.
local n = ARGV[2]
local delivery = deliveries .. ':' .. n
if redis.call('EXISTS', delivery) == 0 then return 0 end
enable_webhook()
redis.call('HSET', delivery, 'state', 'pending', 'since_ms', now, 'tries', 0)
send_at(n, now)
return 1
