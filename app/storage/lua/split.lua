-- Splits the work of a job's main task: shards take its place in the queue, and the attempt ends. Returns 1; 0 when the
-- attempt is not current, or its job is not to go on. Of each shard, ARGV has its model and
-- number of rows, the checkpoint that it reads, and its work.
local task = KEYS[6]
local task_id, attempt, phase, models, batch_tokens = unpack(ARGV, 2, 6)
if redis.call('HGET', task, 'split_by') == attempt then return 1 end  -- the answer got lost
if redis.call('HGET', task, 'attempt') ~= attempt or redis.call('HGET', task, 'state') ~= 'running' then return 0 end
if redis.call('HGET', job, 'status') ~= 'running' then return 0 end
local shards = (#ARGV - 6) / 4
local most = math.max(shards, redis.call('HGET', task, 'shards') or 0)
redis.call('HSET', task, 'split_by', attempt, 'split_ms', now, 'shards', most, 'left', shards,
  'phase', phase, 'models', models, 'batch_tokens', batch_tokens)
local rows = 0
for model, of in pairs(cjson.decode(models)) do
  rows = rows + of.done
  redis.call('HSET', task, ROWS_OF .. model, of.done)
end
redis.call('HSET', task, 'rows', rows)
move(task, task_id, 'split')
for n = 0, shards - 1 do
  local id = job_of(task_id) .. SHARD .. n
  redis.call('HSETNX', TASK .. id, 'attempt', 0)
  redis.call('HSET', TASK .. id, 'model', ARGV[7 + 4 * n], 'rows_in_all', ARGV[8 + 4 * n], 'holds', ARGV[9 + 4 * n],
    'work', ARGV[10 + 4 * n], 'losses', 0, 'rows', 0)
  move(TASK .. id, id, 'queued')
end
change_job({{'log', 'scoring_cut', 'scoring is cut into ' .. shards .. ' shards'}})
return 1
