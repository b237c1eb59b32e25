-- Creates a queued job with its task. Returns false, or what the idempotency key remembers.
local jobs, jobs_of_tenant, task, idempotency = unpack(KEYS, 6)
local job_id, task_id, remembered, remembered_s = unpack(ARGV, 2, 5)
if redis.call('EXISTS', job) == 1 then return false end
if remembered ~= '' then
  local before = redis.call('GET', idempotency)
  if before then return before end
  redis.call('SET', idempotency, remembered)
  if tonumber(remembered_s) > 0 then redis.call('EXPIRE', idempotency, remembered_s) end
end
redis.call('ZADD', jobs, 0, job_id)
redis.call('ZADD', jobs_of_tenant, 0, job_id)
redis.call('HSET', task, 'attempt', 0, 'losses', 0)
change_job({fields = {unpack(ARGV, 6)}, {'status', 'queued'}})
move(task, task_id, 'queued')
start_the_time(task_id)
return false
