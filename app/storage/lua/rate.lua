-- Takes one from a bucket that holds so many and is filled at an even pace (GCRA). Kept is the time at which it is full.
-- ARGV: how many it holds, milliseconds in which an empty one fills up.
-- Returns 1 or 0, how many are left, and the seconds until there is one more and until it is full.
local most, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local gap = window / most
local full = math.min(math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now), now + window)
local allowed = full + gap <= now + window + 0.001  -- a thousandth, since fractions of a gap are rounded
if allowed then
  full = full + gap
  redis.call('SET', KEYS[1], string.format('%.3f', full), 'PX', math.max(1, math.ceil(full - now)))
end
local left = math.max(0, math.floor((now + window - full) / gap + 0.001))
local wait = left > 0 and 0 or full + gap - window - now
return {allowed and 1 or 0, left, math.ceil(wait / 1000), math.ceil((full - now) / 1000)}
