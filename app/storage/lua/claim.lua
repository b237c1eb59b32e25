-- Starts an attempt. Returns its number; 0 when the task is not waiting.
local task, due, leases = unpack(KEYS, 6)
local task_id, lease_ms, worker, progress = unpack(ARGV, 2)
local state = redis.call('HGET', task, 'state')
if state == 'running' and redis.call('HGET', task, 'worker') == worker then
  redis.call('ZADD', leases, now + lease_ms, task_id)  -- the answer to its claim got lost
  return tonumber(redis.call('HGET', task, 'attempt'))
end
if state ~= 'queued' then return 0 end
if redis.call('HGET', job, 'status') ~= 'queued' or is_overdue(task_id) then return 0 end
local attempt = redis.call('HINCRBY', task, 'attempt', 1)
redis.call('HSET', task, 'state', 'running', 'worker', worker)
redis.call('ZREM', due, task_id)
redis.call('ZADD', leases, now + lease_ms, task_id)
change_job({
  fields = {'attempt', attempt, 'started_ms', now},
  {'status', 'running'},
  {'log', 'attempt_started', 'attempt ' .. attempt .. ' starts on worker ' .. worker},
  {'progress', progress},
})
return attempt
