-- Puts a task back in the queue; if it was lost too often, its job fails instead, with all other tasks of it.
-- Returns 0 when there is nothing to release, 1 queued again, 2 failed, 3 cancelled.
local task = KEYS[6]
local task_id, attempt, lost, most_losses, only_expired, progress, error = unpack(ARGV, 2)
if redis.call('HGET', task, 'state') ~= 'running' then return 0 end
if redis.call('HGET', task, 'attempt') ~= attempt then return 0 end
if only_expired == '1' then
  local expiry = redis.call('ZSCORE', LEASES, task_id)
  if expiry and tonumber(expiry) > tonumber(now) then return 0 end
end
local losses = redis.call('HINCRBY', task, 'losses', lost)
local what = is_shard(task_id) and 'shard ' .. string.match(task_id, '%d+$') or 'attempt ' .. redis.call('HGET', job, 'attempt')
local why = {'log', 'attempt_handed_back', what .. ' was handed back by a worker that stops'}
if lost == '1' then
  count(1, 'maskmerge_attempts_lost_total', tenant_of_job(), only_expired == '1' and 'lease' or 'engine')
  local loss = 'loss ' .. losses .. ' of ' .. most_losses
  why = {'log', 'attempt_lost', what .. ' lost its worker or engine process, ' .. loss}
end
if redis.call('HGET', job, 'status') == 'cancelling' then
  move(task, task_id, 'done')
  if is_any_running(task_id) then
    change_job({why})
  else
    stop_tasks(task_id)
    change_job({why, {'status', 'cancelled'}})
  end
  return 3
end
if lost == '1' and losses >= tonumber(most_losses) then
  stop_tasks(task_id)
  change_job({fields = {'error', error}, why, {'status', 'failed'}})
  return 2
end
move(task, task_id, 'queued')
if is_shard(task_id) then  -- the others go on
  change_job({why, count_rows(task_id, 0)})
  return 1
end
change_job({why, {'status', 'queued'}, {'progress', progress}})
return 1
