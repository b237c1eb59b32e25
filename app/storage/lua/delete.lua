-- Forgets a job that ended early enough, but for why it is gone.
-- Returns 0 when there is no such job, 1 deleted, 2 it has not ended, or not as early.
local task, jobs, gone = unpack(KEYS, 6)
local job_id, latest_end, why, why_s, default_tenant = unpack(ARGV, 2)
local status = redis.call('HGET', job, 'status')
if not status then return 0 end
if not FINAL[status] then return 2 end
if tonumber(redis.call('HGET', job, 'finished_ms')) > tonumber(latest_end) then return 2 end
local named = redis.call('HGET', job, 'named')
if named then redis.call('DEL', named) end
local tenant = redis.call('HGET', job, 'tenant') or default_tenant
redis.call('SET', gone, why .. ' ' .. tenant, 'EX', why_s)
forget_deliveries()
redis.call('HINCRBY', STORED, tenant, -(redis.call('HGET', job, 'artifact_bytes') or 0))
for n = 0, (redis.call('HGET', task, 'shards') or 0) - 1 do redis.call('DEL', TASK .. job_id .. SHARD .. n) end
redis.call('DEL', task, job, result, events, progress_events)
redis.call('ZREM', jobs, job_id)
redis.call('ZREM', jobs .. ':' .. tenant, job_id)
return 1
