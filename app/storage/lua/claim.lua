-- Starts an attempt at the task that is next among those that a worker of `device` may do. Returns the task's id and the
-- attempt's number; false when none may start.
-- `limits` has the most running tasks of a tenant, and of any other under '*'; 0 is no limit. Of a job's shards, one of the
-- checkpoint that the worker `holds` is next.
local claim = KEYS[6]
local lease_ms, worker, progress, limits, remembered_s, holds, device = unpack(ARGV, 2)
local before = redis.call('GET', claim)
if before then return before end  -- the answer to this claim got lost
limits = cjson.decode(limits)

-- Returns the shard to take among those of one job that wait first: one of the held checkpoint, or else the last of them, so
-- that workers which hold others begin at different checkpoints.
local function best_shard(waiting, first)
  local chosen = first
  for _, id in ipairs(redis.call('ZRANGE', waiting, 0, SHARDS_SEEN - 1)) do
    if job_of(id) ~= job_of(first) or not is_shard(id) then break end
    chosen = id
    if redis.call('HGET', TASK .. id, 'holds') == holds then break end
  end
  return chosen
end

-- Tells of an attempt at a job's main task. When all shards are done, the attempt that was split goes on.
local function begin(task, number)
  if redis.call('HGET', task, 'left') == '0' then
    redis.call('HDEL', task, 'left')
    redis.call('HSET', task, 'continues', number)
    return
  end
  local attempt = redis.call('HGET', job, 'attempt') + 1
  change_job({
    fields = {'attempt', attempt, 'started_ms', now},
    {'status', 'running'},
    {'log', 'attempt_started', 'attempt ' .. attempt .. ' starts on worker ' .. worker},
    {'progress', progress},
  })
end

-- Returns whether a list of numbers and names comes before another, by the first place in which they differ.
local function is_before(one, other)
  for i = 1, #one do
    if one[i] ~= other[i] then return one[i] < other[i] end
  end
  return false
end

-- Returns the tenant that is first in an order, its task that is next, and the set in which this waits.
local function next_in(order)
  local best, waiting
  for _, lane in ipairs({'any', device}) do
    local tenant, place = unpack(redis.call('ZRANGE', order[lane], 0, 0, 'WITHSCORES'))
    if tenant then
      local task_id, priority = unpack(redis.call('ZRANGE', WAITING[lane] .. tenant, 0, 0, 'WITHSCORES'))
      local found = {tonumber(place), tenant, tonumber(priority or 0), task_id or ''}
      if not best or is_before(found, best) then best, waiting = found, WAITING[lane] .. tenant end
    end
  end
  if best then return best[2], best[4], waiting end
end

local start = 1 + (redis.call('ZREVRANGE', TENANTS, 0, 0, 'WITHSCORES')[2] or 0)
local order = start % TURN_EVERY == 0 and TURNS or RANKS
while true do
  local tenant, task_id, waiting = next_in(order)
  if not tenant then return false end
  local most = limits[tenant] or limits['*']
  if most > 0 and redis.call('ZCARD', RUNNING .. tenant) >= most then
    withhold(tenant)  -- it has its turn again when one of its tasks ends
  elseif task_id == '' then
    take_turn(tenant)
  else
    if is_shard(task_id) then task_id = best_shard(waiting, task_id) end
    local task = work_on(task_id)
    local is_wanted = has(',queued,running,', redis.call('HGET', job, 'status'))
    if is_wanted and redis.call('HGET', task, 'state') == 'queued' and not is_overdue(main_of(task_id)) then
      redis.call('ZADD', TENANTS, start, tenant)
      move(task, task_id, 'running')
      local attempt = redis.call('HINCRBY', task, 'attempt', 1)
      redis.call('HSET', task, 'worker', worker)
      redis.call('ZADD', LEASES, now + lease_ms, task_id)
      if not is_shard(task_id) then begin(task, attempt) end
      count(1, 'maskmerge_attempts_started_total', tenant)
      local claimed = task_id .. ' ' .. attempt
      redis.call('SET', claim, claimed, 'EX', remembered_s)
      return claimed
    end
    -- A task past its deadline is ended by `time_out`. Any other was moved by a process of the last release.
    redis.call('ZREM', waiting, task_id)
    take_turn(tenant)
  end
end
