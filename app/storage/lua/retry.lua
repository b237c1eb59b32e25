-- Queues a job of one of the allowed statuses again. Returns 1; 0 when it has another; or, as a list, what stands against it,
-- as `refusal` says it.
local task = KEYS[6]
local task_id, allowed, progress, tenant, most_waiting, most_stored, beside, room = unpack(ARGV, 2)
if not has(allowed, redis.call('HGET', job, 'status')) then return 0 end
local bytes = tonumber(redis.call('HGET', job, 'bytes_to_write') or 0)
local refused = refusal(tenant, bytes, most_waiting, most_stored, beside, room)
if refused then return refused end
redis.call('HSET', task, 'losses', 0)
redis.call('HDEL', task, 'left')
move(task, task_id, 'queued')
start_the_time(task_id)
change_job({without = {'error', 'started_ms', 'finished_ms'}, {'status', 'queued'}, {'progress', progress}})
return 1
