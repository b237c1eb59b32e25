-- Cancels a job that waits, and asks one that runs to stop. Returns its status after that; false when there is none.
local task = KEYS[6]
local task_id = ARGV[2]
local status = redis.call('HGET', job, 'status')
if status == 'queued' then
  move(task, task_id, 'done')
  redis.call('ZREM', deadlines, task_id)
  change_job({{'status', 'cancelled'}})
elseif status == 'running' then
  redis.call('ZREM', deadlines, task_id)
  change_job({{'status', 'cancelling'}})
end
return redis.call('HGET', job, 'status')
