-- Extends a lease, and records progress unless it is ''; that of a shard is its number of rows. Returns the job's status; false when the attempt is not current.
local task = KEYS[6]
local task_id, attempt, lease_ms, progress = unpack(ARGV, 2)
if redis.call('HGET', task, 'state') ~= 'running' then return false end
if redis.call('HGET', task, 'attempt') ~= attempt then return false end
redis.call('ZADD', LEASES, now + lease_ms, task_id)
if progress ~= '' then change_job({is_shard(task_id) and count_rows(task_id, progress) or {'progress', progress}}) end
return redis.call('HGET', job, 'status')
