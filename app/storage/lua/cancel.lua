-- Cancels a job of which no task runs, and asks others to stop. Returns its status after that; false when there is none.
local task_id = ARGV[2]
local status = redis.call('HGET', job, 'status')
if status == 'queued' or status == 'running' then
  redis.call('ZREM', deadlines, task_id)
  if is_any_running(task_id) then
    change_job({{'status', 'cancelling'}})
    stop_waiting(task_id)
  else
    stop_tasks(task_id)
    change_job({{'status', 'cancelled'}})
  end
end
return redis.call('HGET', job, 'status')
