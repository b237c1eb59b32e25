-- Moves tasks that processes of the last release made to wait to where tasks wait now. Returns how many it looked at.
local due = KEYS[6]
local most = ARGV[2]
local found = redis.call('ZRANGE', due, 0, most - 1)
for _, task_id in ipairs(found) do
  local task = work_on(task_id)
  if redis.call('HGET', task, 'state') == 'queued' then move(task, task_id, 'queued') end
  redis.call('ZREM', due, task_id)
end
return #found
