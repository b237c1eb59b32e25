-- Ends a task, and with it its job and all other tasks of it. While others still run, a job that is cancelled goes on to be.
-- Returns 1; 0 when the attempt is not current, or the job's status does not allow it.
-- A result and a progress of '' are none; after them come what is added to the sums, as a JSON list of pairs, the number
-- of notes, the notes, and fields of the record.
local task = KEYS[6]
local task_id, attempt, allowed, status, progress, made, counts, notes = unpack(ARGV, 2, 9)
if redis.call('HGET', task, 'attempt') ~= attempt then return 0 end
local state = redis.call('HGET', task, 'state')
local before = redis.call('HGET', job, 'status')
if state == 'done' and before == status then return 1 end  -- the answer got lost
if state ~= 'running' or not has(allowed, before) then return 0 end
if status == 'succeeded' and (is_shard(task_id) or is_overdue(task_id)) then return 0 end
move(task, task_id, 'done')
if status == 'cancelled' and is_any_running(task_id) then return 1 end
stop_tasks(task_id)
local fields = 10 + notes
local change = {fields = {unpack(ARGV, fields)}, result = made ~= '' and made}
for note = 10, fields - 1 do change[#change + 1] = {'log', 'note', ARGV[note]} end
if progress ~= '' then change[#change + 1] = {'progress', progress} end
change[#change + 1] = {'status', status}
change_job(change)
local bytes = redis.call('HGET', job, 'artifact_bytes')
if bytes then redis.call('HINCRBY', STORED, redis.call('HGET', job, 'tenant') or DEFAULT_TENANT, bytes) end
for _, sum in ipairs(cjson.decode(counts)) do count(sum[2], sum[1]) end
return 1
