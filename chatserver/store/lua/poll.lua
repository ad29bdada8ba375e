-- What was revoked since an entry; and this worker's lease on being believed, for that it asks.
--
-- KEYS  1 stream        chat:{auth}:revocations
--       2 incarnation   a random name: another one means that the store came back empty
--       3 workers       hash: worker -> "<renewed, ms> <last entry applied> <about it>"
--       4 ... counters  chat:{auth}:closed:<entry>, hash: worker -> connections that it closed
-- ARGV  1 id of the last entry applied, "0-0" for none; 2 incarnation to set where there is none
--       3 at most so many entries; 4 worker, 5 about it; 6 milliseconds that a lease lasts
--       7 seconds that a counter lasts; 8 ... what to count, one for each counter
-- reply {seconds, microseconds, incarnation, replication id of the store (room.lua says what it
--        shows), 1 if there was no living lease of this worker, {id, {field, value ...}} ...}
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local incarnation = redis.call('GET', KEYS[2])
if not incarnation then
  incarnation = ARGV[2]
  redis.call('SET', KEYS[2], incarnation)
end

-- The counts before the lease: who sees the entry applied must see what was closed for it.
for i = 4, #KEYS do
  redis.call('HSET', KEYS[i], ARGV[4], ARGV[i + 4])
  redis.call('EXPIRE', KEYS[i], ARGV[7])
end
local lease = redis.call('HGET', KEYS[3], ARGV[4])
local renewed = lease and tonumber(string.match(lease, '^%d+'))
local lapsed = (not renewed or renewed + ARGV[6] <= now) and 1 or 0
if lapsed == 1 then
  -- Rare enough to sweep up after those who died.
  local all = redis.call('HGETALL', KEYS[3])
  for i = 1, #all, 2 do
    if tonumber(string.match(all[i + 1], '^%d+')) + 20 * ARGV[6] < now then
      redis.call('HDEL', KEYS[3], all[i])
    end
  end
end
redis.call('HSET', KEYS[3], ARGV[4], string.format('%.0f %s %s', now, ARGV[1], ARGV[5]))

local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local reply = {tonumber(clock[1]), tonumber(clock[2]), incarnation, history, lapsed}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[3])) do
  reply[#reply + 1] = entry
end
return reply
