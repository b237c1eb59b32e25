-- Counts bytes that are stored for a tenant, or with less than 0, that no longer are. Returns false, or what stands against
-- it, as `refusal` says it.
local tenant, bytes, most_stored, room = unpack(ARGV, 2)
local refused = tonumber(bytes) > 0 and refusal(tenant, tonumber(bytes), '', most_stored, room)
if refused then return refused end
redis.call('HINCRBY', STORED, tenant, bytes)
return false
