-- Takes the delivery to a receiver that has been due for longest. Whoever took it has the time of a lease to settle it;
-- then it is due again. KEYS: receivers. ARGV: the time, the receiver, the lease in milliseconds.
-- Returns the delivery's name and the number of this claim; false when none is due.
local now, receiver, lease_ms = unpack(ARGV)
local queue = KEYS[1] .. ':' .. receiver
local delivery = redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'LIMIT', 0, 1)[1]
local claim = delivery and redis.call('HINCRBY', delivery, 'claims', 1)
if delivery then redis.call('ZADD', queue, now + lease_ms, delivery) end
local first = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
if first[2] then redis.call('ZADD', KEYS[1], first[2], receiver) else redis.call('ZREM', KEYS[1], receiver) end
return delivery and {delivery, claim}
