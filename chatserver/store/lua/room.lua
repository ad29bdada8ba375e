-- A room's state, made to follow the store's own history; publish.lua and read.lua begin with it.
--
-- A store's history can fork: a replica that is promoted may lack the latest events, a file that
-- is put back may be old. Redis shows it by another replication id; a plain restart and a first
-- replica change that, too. So when it changes, the room goes on under a new epoch: log and
-- counter stay, and the old epoch is remembered with the counter, the last offset it shares with
-- this log. Up to there a position of the old epoch is as good as one of the new.
--
-- meta   hash: epoch, offset
--        history   replication id of the store when the epoch began
--        past      "<epoch> <offset> " of earlier epochs, in the order of their ends
--        log       the first epoch: a name for as long as offsets are counted on
-- log    stream, one entry an event: id <offset>-<ts>, field e; where a connection is shown a skip
--        in its place, field o: that one
local REMEMBERED = 32 -- epochs, 20 bytes each

local function place_of(id)
  local offset, ts = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(offset), tonumber(ts)
end

-- %.0f, for tostring() would turn to 1e+15.
local function exact(number)
  return string.format('%.0f', number)
end

-- Where a file of commands was cut off amid a transaction, Redis keeps what it has of that one,
-- does not carry it out, and writes on behind it. Loaded once more it is carried out, as a part of
-- the transaction that comes next: the counter may stand above the log, and an event that was
-- lost be there again, before the one that got its offset since.
-- Makes both right, and returns the counter.
local function mend(log, top)
  local first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
  if not first then
    return top
  end
  local last = place_of(redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1][1])
  if redis.call('XLEN', log) > last - place_of(first[1]) + 1 then
    local before = '0-0'
    for _, entry in ipairs(redis.call('XRANGE', log, '-', '+')) do
      if place_of(entry[1]) == place_of(before) then
        redis.call('XDEL', log, before)
      end
      before = entry[1]
    end
  end
  return last
end

-- Returns the room's state as it is now: epoch, offset, past, log.
local function enter(meta, log, fresh)
  local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
  local state = redis.call('HMGET', meta, 'epoch', 'offset', 'history', 'past', 'log')
  local epoch, top, began, past, name = unpack(state)
  if not epoch then
    -- A log without its meta belongs to another epoch: its offsets would be handed out twice.
    redis.call('DEL', log)
    redis.call('HSET', meta, 'epoch', fresh, 'offset', 0, 'history', history, 'past', '',
      'log', fresh)
    return fresh, 0, '', fresh
  end
  if began ~= history then
    top, past, name = exact(mend(log, tonumber(top or '0'))), past or '', name or epoch
    past = past .. epoch .. ' ' .. top .. ' '
    local count = select(2, string.gsub(past, '%S+ %S+ ', ''))
    if count > REMEMBERED then
      past = string.match(past, '^%S+ %S+ (.*)$')
    end
    epoch = fresh
    redis.call('HSET', meta, 'epoch', epoch, 'offset', top, 'history', history, 'past', past,
      'log', name)
  end
  return epoch, tonumber(top), past, name
end

local function now()
  local clock = redis.call('TIME')
  return clock[1] * 1000 + math.floor(clock[2] / 1000)
end

-- Drop what is older than so many seconds; returns the first offset that is left, or nil.
local function age(log, seconds)
  local oldest = now() - seconds * 1000
  local first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
  while first[1] do
    local offset, ts = place_of(first[1][1])
    if ts >= oldest then
      return offset
    end
    local run = redis.call('XRANGE', log, '-', '+', 'COUNT', 16)
    local kept = offset
    for _, entry in ipairs(run) do
      offset, ts = place_of(entry[1])
      if ts >= oldest then
        break
      end
      kept = offset + 1
    end
    redis.call('XTRIM', log, 'MINID', '=', exact(kept) .. '-0')
    first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)
  end
  return nil
end
