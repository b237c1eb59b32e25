-- Records an attempt at a delivery. A next attempt of '' is none. Returns 0 when the claim is not the current one.
local n, claim, attempt, most_attempts, state, next_ms, is_gone = unpack(ARGV, 2)
local delivery = deliveries .. ':' .. n
if redis.call('HGET', delivery, 'claims') ~= claim then return 0 end
redis.call('RPUSH', delivery .. ':attempts', attempt)
redis.call('LTRIM', delivery .. ':attempts', -most_attempts, -1)
redis.call('HINCRBY', delivery, 'tries', 1)
if is_gone == '1' then disable_webhook() end
if state == 'pending' and redis.call('HGET', job, 'webhook_gone_ms') then state = 'disabled' end
redis.call('HSET', delivery, 'state', state)
if state == 'pending' then send_at(n, next_ms) else send_no_more(n) end
count(1, 'maskmerge_webhook_attempts_total', state)
return 1
