-- Append one event to a room's log and tell everyone, in one step: the log's order is the order
-- on the wire. Begins with room.lua.
--
-- KEYS  1 meta, 2 log (room.lua)
--       3 record (optional) what an earlier send with the same key got: "<log> <offset> <ts>"
-- ARGV  1 head, 2 tail   the event's JSON before and after its offset and ts
--       3 epoch to mint, should a new one begin
--       4 events to retain, 5 seconds to retain them, 6 seconds that the room is remembered
--       7 PUBLISH or, on a cluster, SPUBLISH
--       8 channel, 9 origin (a connection that is shown a skip instead, or "-")
--       10 milliseconds to remember the key
-- reply {epoch, offset, ts, duplicate: 0 or 1}
local meta, log, record = KEYS[1], KEYS[2], KEYS[3]
local epoch, top, _, name = enter(meta, log, ARGV[3])

if record then
  local known = redis.call('GET', record)
  if known then
    local at, offset, ts = string.match(known, '^(%S+) (%d+) (%d+)$')
    if at == name then
      -- Written again, so that a WAIT behind it waits for the replicas to have what came first.
      redis.call('SET', record, known, 'KEEPTTL')
      return {epoch, tonumber(offset), tonumber(ts), 1}
    end
  end
end

local offset = top + 1
local ts = now()
local place = exact(offset)
redis.call('HSET', meta, 'offset', place) -- never HINCRBY, which done twice is another: see mend()
local event = ARGV[1] .. place .. ',"ts":' .. exact(ts) .. ARGV[2]

local id = place .. '-' .. exact(ts)
if ARGV[9] == '-' then
  redis.call('XADD', log, 'MAXLEN', '=', ARGV[4], id, 'e', event)
else
  redis.call('XADD', log, 'MAXLEN', '=', ARGV[4], id, 'e', event, 'o', ARGV[9])
end
if offset % 16 == 0 then
  age(log, ARGV[5]) -- now and then, for whoever reads sees to it anyway
end
redis.call('EXPIRE', log, ARGV[5])
redis.call('EXPIRE', meta, ARGV[6])
if record then
  redis.call('SET', record, name .. ' ' .. place .. ' ' .. exact(ts), 'PX', ARGV[10])
end
redis.call(ARGV[7], ARGV[8], epoch .. ' ' .. place .. ' ' .. ARGV[9] .. ' ' .. event)
return {epoch, offset, ts, 0}
