-- Begins every script. KEYS: job, result, events, progress events, deadlines, then the script's own; the last is
-- the job's deliveries.
-- ARGV: the time in milliseconds, then the script's own.
--
-- An event is numbered by the record's revision and added where the record is changed, so it is as durable and as
-- ordered as the write, and whoever has seen event n has seen the record up to revision n. Progress has a stream of its
-- own, because it alone comes without end and may be cut.
--
-- What a webhook is told of a change is recorded where the record is changed too, so that it is never lost. A delivery
-- waits in its receiver's queue, by the time from which it may be sent.
--
-- Names in capitals come from scripts.py.

local job, result, events, progress_events, deadlines = unpack(KEYS)
local deliveries = KEYS[#KEYS]
local now = ARGV[1]

-- Adds to a sum of app/observability/metrics.py, in the script that makes what is counted happen: so it counts once.
local function count(by, ...)
  redis.call('HINCRBYFLOAT', SUMS, table.concat({...}, ' '), by)
end

local function tenant_of_job()
  return redis.call('HGET', job, 'tenant') or DEFAULT_TENANT
end

local function add(stream, ...)
  redis.call('XADD', stream, redis.call('HINCRBY', job, 'revision', 1), 'at', now, ...)
end

-- Each kind of event with the change that it tells of.
local news = {}

function news.status(status)
  redis.call('HSET', job, 'status', status)
  if FINAL[status] then
    redis.call('HSET', job, 'finished_ms', now)
    local kind = redis.call('HGET', job, 'kind') or DEFAULT_KIND
    count(1, 'maskmerge_jobs_finished_total', tenant_of_job(), kind, status)
    redis.call('EXPIRE', progress_events, PROGRESS_KEPT_S)
  elseif status == 'queued' then
    redis.call('PERSIST', progress_events)
  end
  local error = redis.call('HGET', job, 'error') or ''
  if status == 'failed' then
    count(1, 'maskmerge_job_failures_total', tenant_of_job(), cjson.decode(error).code)
  end
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

-- What a webhook is told when a job enters a state. Of the others it hears nothing.
local TOLD = {running = 'job.started', succeeded = 'job.succeeded', failed = 'job.failed', cancelled = 'job.cancelled'}

local function queue_of(delivery)
  return RECEIVERS .. ':' .. redis.call('HGET', delivery, 'receiver')
end

local function send_at(n, due_ms)
  local delivery = deliveries .. ':' .. n
  redis.call('ZADD', queue_of(delivery), due_ms, delivery)
  redis.call('ZADD', RECEIVERS, 'LT', due_ms, redis.call('HGET', delivery, 'receiver'))
end

local function send_no_more(n)
  local delivery = deliveries .. ':' .. n
  redis.call('ZREM', queue_of(delivery), delivery)
end

local function forget_delivery(n)
  local delivery = deliveries .. ':' .. n
  send_no_more(n)
  redis.call('DEL', delivery, delivery .. ':attempts')
  redis.call('ZREM', deliveries, n)
end

local function forget_deliveries()
  for _, n in ipairs(redis.call('ZRANGE', deliveries, 0, -1)) do forget_delivery(n) end
end

-- Of progress, one delivery waits at a time, and a later one is due only after the webhook's interval.
local function is_progress_due(webhook)
  local told_ms, last = unpack(redis.call('HMGET', job, 'progress_told_ms', 'progress_delivery'))
  if not told_ms then return true end
  return now - told_ms >= webhook.progress_ms and redis.call('HGET', deliveries .. ':' .. last, 'state') ~= 'pending'
end

-- Records that the job's webhook is to be told an event, with the job in short as it is now.
local function tell(event)
  local stored, gone = unpack(redis.call('HMGET', job, 'webhook', 'webhook_gone_ms'))
  if not stored or gone then return end
  local webhook = cjson.decode(stored)
  local is_wanted = false
  for _, wanted in ipairs(webhook.events) do is_wanted = is_wanted or wanted == event end
  if not is_wanted or (event == 'job.progress' and not is_progress_due(webhook)) then return end
  local snapshot = {}
  for i, value in ipairs(redis.call('HMGET', job, unpack(SUMMARY_FIELDS))) do
    if value then snapshot[SUMMARY_FIELDS[i]] = value end
  end
  local n = redis.call('HINCRBY', job, 'deliveries', 1)
  redis.call('HSET', deliveries .. ':' .. n, 'event', event, 'receiver', webhook.receiver, 'state', 'pending',
    'created_ms', now, 'since_ms', now, 'tries', 0, 'claims', 0, 'snapshot', cjson.encode(snapshot))
  redis.call('ZADD', deliveries, n, n)
  send_at(n, now)
  if event == 'job.progress' then redis.call('HSET', job, 'progress_told_ms', now, 'progress_delivery', n) end
  if redis.call('ZCARD', deliveries) <= DELIVERIES_KEPT then return end
  local kept = redis.call('ZRANGE', deliveries, 0, -1)
  for _, oldest in ipairs(kept) do
    if redis.call('HGET', deliveries .. ':' .. oldest, 'state') ~= 'pending' then return forget_delivery(oldest) end
  end
  forget_delivery(kept[1])
  news.log('delivery_dropped', 'delivery ' .. kept[1] .. ' was dropped: ' .. DELIVERIES_KEPT .. ' newer ones wait')
end

-- Tells the job's webhook nothing more, since its receiver is gone for good.
local function disable_webhook()
  redis.call('HSET', job, 'webhook_gone_ms', now)
  for _, n in ipairs(redis.call('ZRANGE', deliveries, 0, -1)) do
    if redis.call('HGET', deliveries .. ':' .. n, 'state') == 'pending' then
      redis.call('HSET', deliveries .. ':' .. n, 'state', 'disabled')
      send_no_more(n)
    end
  end
end

local function enable_webhook()
  redis.call('HDEL', job, 'webhook_gone_ms')
end

-- The one function by which a script changes what belongs to a job, whether it works on the job or on one of its tasks.
-- `change` lists events in their order, as {'status', 'running'}; before them, fields of the record named in `without`
-- are removed, and its `fields` and its `result` written. The webhook is told of a change when all of it is written.
local function change_job(change)
  if change.without then redis.call('HDEL', job, unpack(change.without)) end
  if change.fields and #change.fields > 0 then redis.call('HSET', job, unpack(change.fields)) end
  if change.result then redis.call('SET', result, change.result) end
  local status, progress
  for _, event in ipairs(change) do
    news[event[1]](unpack(event, 2))
    if event[1] == 'status' then status = event[2] elseif event[1] == 'progress' then progress = 'job.progress' end
  end
  local told = progress
  if status then told = TOLD[status] end
  if told then tell(told) end
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
