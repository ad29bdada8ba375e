-- Append one event to a room's log and tell everyone, in one step: the log's order is the order
-- on the wire.
--
-- KEYS  1 meta   hash: epoch, offset
--       2 log    stream, one entry an event: id <offset>-0, field e
--       3 record (optional) what an earlier send with the same key got: "<epoch> <offset> <ts>"
-- ARGV  1 head, 2 tail   the event's JSON before and after its offset and ts
--       3 epoch to mint, should the room have none
--       4 events to retain, 5 seconds to retain them
--       6 channel, 7 origin (a connection that is shown a skip instead, or "-")
--       8 milliseconds to remember the key
-- reply {epoch, offset, ts, duplicate: 0 or 1}
local meta, log, record = KEYS[1], KEYS[2], KEYS[3]

local epoch = redis.call('HGET', meta, 'epoch')
if not epoch then
  -- A log without its meta belongs to another epoch: its offsets would be handed out twice.
  redis.call('DEL', log)
  epoch = ARGV[3]
  redis.call('HSET', meta, 'epoch', epoch)
end

if record then
  local known = redis.call('GET', record)
  if known then
    local at, offset, ts = string.match(known, '^(%S+) (%d+) (%d+)$')
    if at == epoch then
      return {epoch, tonumber(offset), tonumber(ts), 1}
    end
  end
end

local offset = redis.call('HINCRBY', meta, 'offset', 1)
local clock = redis.call('TIME')
local ts = clock[1] * 1000 + math.floor(clock[2] / 1000)
-- %.0f, for tostring() would turn to 1e+15.
local place = string.format('%.0f', offset)
local event = ARGV[1] .. place .. string.format(',"ts":%.0f', ts) .. ARGV[2]

redis.call('XADD', log, 'MAXLEN', '=', ARGV[4], place .. '-0', 'e', event)
redis.call('EXPIRE', log, ARGV[5])
redis.call('EXPIRE', meta, ARGV[5])
if record then
  redis.call('SET', record, string.format('%s %s %.0f', epoch, place, ts), 'PX', ARGV[8])
end
redis.call('PUBLISH', ARGV[6], epoch .. ' ' .. place .. ' ' .. ARGV[7] .. ' ' .. event)
return {epoch, offset, ts, 0}
