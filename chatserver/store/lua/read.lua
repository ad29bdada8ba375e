-- Read a run of a room's log, with the log's state at that moment. Begins with room.lua.
--
-- KEYS  1 meta, 2 log (room.lua)
-- ARGV  1 epoch to mint, should a new one begin: a member of an empty room needs a position
--       2 seconds that a room without events is remembered; renewed here
--       3 seconds to retain events
--       4 epoch that "after" belongs to, or "" for whichever there is
--       5 after: read onwards from here, or ""
--       6 before: read backwards from here, or "" for the end
--       7 at most so many events onwards, 8 at most so many backwards, 9 at most so many bytes
--       10 "1": where "after" cannot be continued, but its epoch is known, read onwards from the
--          nearest place that the log has
--       11 at most so many events are replayed from "after", or "" where this opens no replay. One
--          that does begins with this reading: of the latest events it has the beginning, not the
--          end, where they are too many bytes
-- Onwards when "after" can be continued without a hole, else backwards.
-- reply {epoch, top, first retained (top + 1 when empty), the last offset that the epoch asked for
--        shares with this log (-1 for an unknown epoch), offset, event, origin or "", offset,
--        event, origin or "" ...}, ascending; one event always fits
local meta, log = KEYS[1], KEYS[2]
local epoch, top, past = enter(meta, log, ARGV[1])
if redis.call('TTL', meta) < tonumber(ARGV[2]) then
  redis.call('EXPIRE', meta, ARGV[2])
end
local first = age(log, ARGV[3]) or top + 1

local shared = -1
if ARGV[4] == '' or ARGV[4] == epoch then
  shared = top
else
  for old, last in string.gmatch(past, '(%S+) (%S+) ') do
    if old == ARGV[4] then
      shared = tonumber(last)
    end
  end
end

local after, before, replay = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[11])
local onwards = after and shared >= 0
if onwards and ARGV[10] == '1' then
  after = math.max(math.min(after, shared), first - 1)
elseif onwards then
  onwards = after >= first - 1 and after <= shared and not (replay and top - after > replay)
end
local wanted = tonumber(onwards and ARGV[7] or ARGV[8])
if replay and not onwards then
  onwards, after = true, math.max(top - wanted, first - 1)
end
if before == 0 then
  wanted = 0 -- before the first place; (0-0 would be no valid id
end
local room = tonumber(ARGV[9])

-- In small steps, so that a thousand large events never stand in memory to be thrown away.
local found = {}
local full = false
local id = onwards and exact(after + 1) .. '-0' or (before and '(' .. exact(before) .. '-0') or '+'
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

local reply = {epoch, top, first, shared}
local from, to, by = 1, #found, 1
if not onwards then
  from, to, by = #found, 1, -1
end
for i = from, to, by do
  local entry = found[i]
  reply[#reply + 1] = place_of(entry[1])
  reply[#reply + 1] = entry[2][2]
  reply[#reply + 1] = entry[2][4] or ''
end
return reply
