-- Queues a job of one of the allowed statuses again. Returns 1; 0 when it has another.
local task, due = unpack(KEYS, 6)
local task_id, allowed, progress = unpack(ARGV, 2)
if not has(allowed, redis.call('HGET', job, 'status')) then return 0 end
redis.call('HSET', task, 'state', 'queued', 'losses', 0)
redis.call('ZADD', due, 0, task_id)
start_the_time(task_id)
change_job({without = {'error', 'started_ms', 'finished_ms'}, {'status', 'queued'}, {'progress', progress}})
return 1
