-- Ends a job whose deadline has passed; one that is being cancelled goes on to be. Returns 1 when it was ended, else 0.
local task_id, error = unpack(ARGV, 2)
if not is_overdue(task_id) then return 0 end
redis.call('ZREM', deadlines, task_id)
local status = redis.call('HGET', job, 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
stop_tasks(task_id)
change_job({fields = {'error', error}, {'status', 'failed'}})
return 1
