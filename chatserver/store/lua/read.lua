-- Read a run of a room's log, with the log's state at that moment.
--
-- KEYS  1 meta   hash: epoch, offset
--       2 log    stream, one entry an event: id <offset>-0, field e
-- ARGV  1 epoch to mint, should the room have none: a member of an empty room needs a position
--       2 seconds that a room without events is remembered; renewed here
--       3 epoch that "after" belongs to, or "" for whichever there is
--       4 after: read onwards from here, or ""
--       5 before: read backwards from here, or "" for the end
--       6 at most so many events onwards, 7 at most so many backwards, 8 at most so many bytes
--       9 "1": when "after" is under the epoch but trimmed, read onwards from the oldest
-- Onwards when "after" can be continued without a hole, else backwards.
-- reply {epoch, top, first retained (top + 1 when empty), offset, event, offset, event ...},
--       ascending; one event always fits
local meta, log = KEYS[1], KEYS[2]
local state = redis.call('HMGET', meta, 'epoch', 'offset')
local epoch, top = state[1], tonumber(state[2] or '0')
if not epoch then
  redis.call('DEL', log)
  epoch, top = ARGV[1], 0
  redis.call('HSET', meta, 'epoch', epoch)
end
if redis.call('TTL', meta) < tonumber(ARGV[2]) then
  redis.call('EXPIRE', meta, ARGV[2])
end

local function offset_of(id)
  return tonumber(string.match(id, '^%d+'))
end

local oldest = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
local first = top + 1
if oldest[1] then
  first = offset_of(oldest[1][1])
end

local after, before = tonumber(ARGV[4]), tonumber(ARGV[5])
local onwards = after and (ARGV[3] == '' or ARGV[3] == epoch)
if onwards and ARGV[9] ~= '1' then
  onwards = after >= first - 1 and after <= top
end
local wanted = tonumber(onwards and ARGV[6] or ARGV[7])
if before == 0 then
  wanted = 0 -- before the first place; (0-0 would be no valid id
end
local room = tonumber(ARGV[8])

-- In small steps, so that a thousand large events never stand in memory to be thrown away.
local found = {}
local full = false
local id = onwards and string.format('%.0f-0', after + 1)
  or (before and string.format('(%.0f-0', before) or '+')
while #found < wanted and not full do
  local step = math.min(16, wanted - #found)
  local entries
  if onwards then
    entries = redis.call('XRANGE', log, id, '+', 'COUNT', step)
  else
    entries = redis.call('XREVRANGE', log, id, '-', 'COUNT', step)
  end
  for _, entry in ipairs(entries) do
    room = room - #entry[2][2]
    if room < 0 and #found > 0 then
      full = true
      break
    end
    found[#found + 1] = entry
  end
  full = full or #entries < step
  if not full then
    id = '(' .. entries[#entries][1]
  end
end

local reply = {epoch, top, first}
local from, to, by = 1, #found, 1
if not onwards then
  from, to, by = #found, 1, -1
end
for i = from, to, by do
  reply[#reply + 1] = offset_of(found[i][1])
  reply[#reply + 1] = found[i][2][2]
end
return reply
