-- Creates a queued job with its task. Returns false; what the idempotency key remembers; or, as a list, what stands against
-- it, as `refusal` says it.
local jobs, jobs_of_tenant, task, idempotency = unpack(KEYS, 6)
local job_id, task_id, remembered, remembered_s, tenant, bytes, most_waiting, most_stored, beside, room = unpack(ARGV, 2, 11)
if redis.call('EXISTS', job) == 1 then return false end
local before = remembered ~= '' and redis.call('GET', idempotency)
if before then return before end
local refused = refusal(tenant, tonumber(bytes), most_waiting, most_stored, beside, room)
if refused then return refused end
if remembered ~= '' then
  redis.call('SET', idempotency, remembered)
  if tonumber(remembered_s) > 0 then redis.call('EXPIRE', idempotency, remembered_s) end
end
redis.call('ZADD', jobs, 0, job_id)
redis.call('ZADD', jobs_of_tenant, 0, job_id)
redis.call('HSET', task, 'attempt', 0, 'losses', 0)
change_job({fields = {unpack(ARGV, 12)}, {'status', 'queued'}})
move(task, task_id, 'queued')
count(1, 'maskmerge_jobs_accepted_total', tenant_of_job(), redis.call('HGET', job, 'kind'))
start_the_time(task_id)
return false
