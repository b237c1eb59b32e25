-- Puts a task back in the queue; if it was lost too often, its job fails instead.
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
local why = {'log', 'attempt_handed_back', 'attempt ' .. attempt .. ' was handed back by a worker that stops'}
if lost == '1' then
  count(1, 'maskmerge_attempts_lost_total', tenant_of_job(), only_expired == '1' and 'lease' or 'engine')
  local loss = 'loss ' .. losses .. ' of ' .. most_losses
  why = {'log', 'attempt_lost', 'attempt ' .. attempt .. ' lost its worker or engine process, ' .. loss}
end
if redis.call('HGET', job, 'status') == 'cancelling' then
  move(task, task_id, 'done')
  change_job({why, {'status', 'cancelled'}})
  return 3
end
if lost == '1' and losses >= tonumber(most_losses) then
  move(task, task_id, 'done')
  redis.call('ZREM', deadlines, task_id)
  change_job({fields = {'error', error}, why, {'status', 'failed'}})
  return 2
end
move(task, task_id, 'queued')
change_job({why, {'status', 'queued'}, {'progress', progress}})
return 1
