-- Ends a shard, once. The last one of its job lets the main task wait again. Returns 1; 0 when the attempt is not current,
-- or the job is not to go on.
local task = KEYS[6]
local task_id, attempt, model, seconds, rows = unpack(ARGV, 2)
if redis.call('HGET', task, 'attempt') ~= attempt then return 0 end
local state = redis.call('HGET', task, 'state')
if redis.call('HGET', job, 'status') ~= 'running' then return 0 end
if state == 'done' then return 1 end  -- the answer got lost
if state ~= 'running' then return 0 end
move(task, task_id, 'done')
local main_id = main_of(task_id)
local main = TASK .. main_id
redis.call('HINCRBYFLOAT', main, 'seconds of ' .. model, seconds)
local change = {count_rows(task_id, rows)}
if redis.call('HINCRBY', main, 'left', -1) == 0 then
  redis.call('HSET', main, 'joined_ms', now)
  move(main, main_id, 'queued')
  change[2] = {'log', 'shards_done', 'all shards of the scoring are done'}
end
change_job(change)
return 1
