-- Begins every script. KEYS: job, result, events, progress events, deadlines, then the script's own.
-- ARGV: the time in milliseconds, then the script's own.
--
-- An event is numbered by the record's revision and added where the record is changed, so it is as durable and as
-- ordered as the write, and whoever has seen event n has seen the record up to revision n. Progress has a stream of its
-- own, because it alone comes without end and may be cut.
--
-- FINAL, PROGRESS_KEPT and PROGRESS_KEPT_S come from scripts.py.

local job, result, events, progress_events, deadlines = unpack(KEYS)
local now = ARGV[1]

local function add(stream, ...)
  redis.call('XADD', stream, redis.call('HINCRBY', job, 'revision', 1), 'at', now, ...)
end

-- Each kind of event with the change that it tells of.
local news = {}

function news.status(status)
  redis.call('HSET', job, 'status', status)
  if FINAL[status] then
    redis.call('HSET', job, 'finished_ms', now)
    redis.call('EXPIRE', progress_events, PROGRESS_KEPT_S)
  elseif status == 'queued' then
    redis.call('PERSIST', progress_events)
  end
  local error = redis.call('HGET', job, 'error') or ''
  add(events, 'event', 'status', 'status', status, 'attempt', redis.call('HGET', job, 'attempt'), 'error', error)
end

function news.log(code, message)
  add(events, 'event', 'log', 'code', code, 'attempt', redis.call('HGET', job, 'attempt'), 'message', message)
end

function news.progress(progress)
  if redis.call('HGET', job, 'progress') == progress then return end
  redis.call('HSET', job, 'progress', progress)
  add(progress_events, 'event', 'progress', 'progress', progress)
  redis.call('XTRIM', progress_events, 'MAXLEN', '~', PROGRESS_KEPT)
end

-- The one function by which a script changes what belongs to a job, whether it works on the job or on one of its tasks.
-- `change` lists events in their order, as {'status', 'running'}; before them, fields of the record named in `without`
-- are removed, and its `fields` and its `result` written.
local function change_job(change)
  if change.without then redis.call('HDEL', job, unpack(change.without)) end
  if change.fields and #change.fields > 0 then redis.call('HSET', job, unpack(change.fields)) end
  if change.result then redis.call('SET', result, change.result) end
  for _, event in ipairs(change) do news[event[1]](unpack(event, 2)) end
end

local function start_the_time(task)
  local deadline_ms = redis.call('HGET', job, 'deadline_ms')
  if deadline_ms then redis.call('ZADD', deadlines, now + deadline_ms, task) end
end

local function is_overdue(task)
  local deadline = redis.call('ZSCORE', deadlines, task)
  return deadline and tonumber(deadline) <= tonumber(now)
end

-- Whether a list of statuses, written as ,a,b, has this one.
local function has(list, status)
  return status and string.find(list, ',' .. status .. ',', 1, true)
end
