-- Begins every script, after the prelude. It keeps the queue: which tasks wait, whose turn it is, and how many bytes the
-- jobs of waiting and running tasks are going to write.
--
-- There is a lane for each device that a job may ask for, and one for jobs that take any. A worker takes from the lane of
-- its own device and from that one.
--
-- In each lane a tenant's waiting tasks are a sorted set of its own. Its scores are priorities, negated; equal scores are ordered by the
-- tasks' ids, which begin with the time that the job was made at. Tenants with waiting tasks are in two sorted sets: TURNS
-- orders them by the number of their running tasks, then by how long ago one was started; RANKS by the priority of their
-- first task before that. So the next task of a lane is found by two reads, however many wait.
--
-- A score has 53 bits: 5 for the priority, 12 for running tasks, 36 for the number of the start.

-- A job has one main task. While that is split, its shards do a part of its work: tasks of a stage of their own, numbered
-- from 0. The hash of the main task has the number of shards that there ever were (`shards`) and of those that are not done
-- (`left`); the last one that is done lets the main task wait again.

local MOST_COUNTED = 2 ^ 12 - 1
local ROWS_OF = 'rows of '  -- beginning of the fields of a main task that count the rows of each model

-- Makes the scripts' job that of a task, and returns the name of the task. Scripts that begin without a job have the
-- beginnings of names in place of names.
local job_names = {job, result, events, progress_events, deliveries}
local function work_on(task_id)
  local id = string.match(task_id, '^[^-]+')
  job, result, events, progress_events = job_names[1] .. id, job_names[2] .. id, job_names[3] .. id, job_names[4] .. id
  deliveries = job_names[5] .. id
  return TASK .. task_id
end

local function lane_of_job() return redis.call('HGET', job, 'device') or 'any' end

local function withhold(tenant)
  for _, lane in ipairs(LANES) do
    redis.call('ZREM', TURNS[lane], tenant)
    redis.call('ZREM', RANKS[lane], tenant)
  end
end

local function take_turn(tenant)
  withhold(tenant)
  local running = math.min(redis.call('ZCARD', RUNNING .. tenant), MOST_COUNTED)
  local turn = running * 2 ^ 36 + (redis.call('ZSCORE', TENANTS, tenant) or 0)
  for _, lane in ipairs(LANES) do
    local first = redis.call('ZRANGE', WAITING[lane] .. tenant, 0, 0, 'WITHSCORES')
    if first[1] then
      redis.call('ZADD', TURNS[lane], turn, tenant)
      redis.call('ZADD', RANKS[lane], (HIGHEST_PRIORITY + first[2]) * 2 ^ 48 + turn, tenant)
    end
  end
end

local function count_waiting(tenant)
  local waiting = 0
  for _, lane in ipairs(LANES) do waiting = waiting + redis.call('ZCARD', WAITING[lane] .. tenant) end
  return waiting
end

local function is_active(state) return state == 'queued' or state == 'running' or state == 'split' end

local function job_of(task_id) return string.match(task_id, '^[^-]+') end
local function main_of(task_id) return job_of(task_id) .. MAIN end
local function is_shard(task_id) return string.find(task_id, SHARD, 1, true) ~= nil end

-- Changes the state of a task of the job, and moves it to where tasks of this state are.
local function move(task, task_id, state)
  local tenant = redis.call('HGET', job, 'tenant') or DEFAULT_TENANT
  local before = redis.call('HGET', task, 'state')
  local was_active = is_active(before)
  if is_shard(task_id) then  -- the main task stands for what the job is going to write
    local more = (state == 'queued' and 1 or 0) - (before == 'queued' and 1 or 0)
    if more ~= 0 then redis.call('HINCRBY', SHARDS, tenant, more) end
  elseif was_active ~= is_active(state) then
    local bytes = redis.call('HGET', job, 'bytes_to_write') or 0
    redis.call('HINCRBY', RESERVED, tenant, was_active and -bytes or bytes)
  end
  redis.call('HSET', task, 'state', state)
  local waiting = WAITING[lane_of_job()] .. tenant
  redis.call('ZREM', waiting, task_id)
  redis.call('ZREM', RUNNING .. tenant, task_id)
  if state == 'queued' then
    redis.call('ZADD', TENANTS, 'NX', 0, tenant)
    redis.call('ZADD', waiting, -(redis.call('HGET', job, 'priority') or 0), task_id)
  elseif state == 'running' then
    redis.call('ZADD', RUNNING .. tenant, now, task_id)
  end
  if state ~= 'running' then redis.call('ZREM', LEASES, task_id) end
  take_turn(tenant)
end

-- Returns the ids of all tasks of the job of a task that are in a state.
local function tasks_in(state, task_id)
  local found, main = {}, main_of(task_id)
  for n = -1, (redis.call('HGET', TASK .. main, 'shards') or 0) - 1 do
    local id = n < 0 and main or job_of(task_id) .. SHARD .. n
    if redis.call('HGET', TASK .. id, 'state') == state then found[#found + 1] = id end
  end
  return found
end

local function is_any_running(task_id) return #tasks_in('running', task_id) > 0 end

local function stop_those_in(state, task_id)
  for _, id in ipairs(tasks_in(state, task_id)) do move(TASK .. id, id, 'done') end
end

local function stop_waiting(task_id) stop_those_in('queued', task_id) end

-- Ends all tasks of the job of a task. Workers that run one hear that it is not theirs any more.
local function stop_tasks(task_id)
  for _, state in ipairs({'queued', 'running', 'split'}) do stop_those_in(state, task_id) end
  redis.call('ZREM', deadlines, main_of(task_id))
end

-- Counts the rows that a shard has gone through, and tells the job's progress by those of all shards.
local function count_rows(task_id, rows)
  local main = TASK .. main_of(task_id)
  local more = rows - (redis.call('HGET', TASK .. task_id, 'rows') or 0)
  redis.call('HSET', TASK .. task_id, 'rows', rows)
  local done = redis.call('HINCRBY', main, 'rows', more)
  local model = redis.call('HGET', TASK .. task_id, 'model')  -- of releases before, shards have none, and jobs no models
  if model then redis.call('HINCRBY', main, ROWS_OF .. model, more) end
  local models = cjson.decode(redis.call('HGET', main, 'models') or '{}')
  for name, of in pairs(models) do of.done = tonumber(redis.call('HGET', main, ROWS_OF .. name)) end
  local phase = cjson.decode(redis.call('HGET', main, 'phase'))
  local share = phase.total > 0 and math.min(1, done / phase.total) or 0
  local before = cjson.decode(redis.call('HGET', job, 'progress')).fraction
  local fraction = math.max(before, math.floor((phase.start + phase.span * share) * 10000) / 10000)
  local eta = cjson.null
  if fraction >= phase.least then
    local taken = (now - redis.call('HGET', job, 'started_ms')) / 1000
    eta = math.floor(taken / fraction * (1 - fraction) * 10) / 10
  end
  return {'progress', cjson.encode({
    phase = 'scoring', done = done, total = phase.total, unit = 'examples', fraction = fraction, eta_seconds = eta,
    models = models,
  })}
end

local function reserved_in_all()
  local sum = 0
  for _, bytes in ipairs(redis.call('HVALS', RESERVED)) do sum = sum + bytes end
  return sum
end

-- Says what stands against one more waiting task of a tenant, or against so many more bytes: 'queue', 'storage' or 'disk',
-- and how many there are already; nil if nothing does. A limit of '' is none; `beside` are stored bytes that are counted
-- elsewhere.
local function refusal(tenant, bytes, most_waiting, most_stored, beside, room)
  local waiting = count_waiting(tenant) - (redis.call('HGET', SHARDS, tenant) or 0)
  if most_waiting ~= '' and waiting >= tonumber(most_waiting) then return {'queue', waiting} end
  local used = (redis.call('HGET', RESERVED, tenant) or 0) + (redis.call('HGET', STORED, tenant) or 0) + beside
  if most_stored ~= '' and bytes > 0 and used + bytes > tonumber(most_stored) then return {'storage', used} end
  local reserved = reserved_in_all()
  if room ~= '' and reserved + bytes > tonumber(room) then return {'disk', reserved} end
end
