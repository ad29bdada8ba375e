-- Revoke a session, a user's tokens up to now, or one token: the key that anyone can check, the
-- end of the refresh tokens, the stream that workers catch up from, the message that wakes them,
-- in one step.
--
-- KEYS  1 record   chat:{auth}:revoked:<kind>:<value>; of a user it holds the cutoff (seconds)
--       2 stream   chat:{auth}:revocations
--       3 what ends with it, beside access tokens: of a session its family, of a user the cutoff
--         of families (chat:{auth}:ended:<user>); of a token the record again
-- ARGV  1 kind, 2 value, 3 seconds to remember, 4 channel
--       5 cutoff, or "" for the store's clock: given when an entry is written back
--       6 milliseconds that the stream reaches back; 7 seconds that a refresh token lives
--       8 PUBLISH or, on a cluster, SPUBLISH
-- reply {the entry's id, cutoff}
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local cutoff = 0
if ARGV[1] == 'user' then
  local before = tonumber(redis.call('GET', KEYS[3]) or '0')
  cutoff = tonumber(ARGV[5]) or tonumber(clock[1])
  if ARGV[5] == '' and before >= cutoff then
    -- Revoked in this second already: a login since then is a second ahead of the clock.
    cutoff = cutoff + 1
  end
  -- Never back: an older entry that is written back must not reopen what was closed since.
  cutoff = math.max(cutoff, before)
end
local text = string.format('%.0f', cutoff)
local lasting = math.max(tonumber(ARGV[3]), redis.call('TTL', KEYS[1]))
redis.call('SET', KEYS[1], text, 'EX', lasting)
if ARGV[1] == 'user' then
  redis.call('SET', KEYS[3], text, 'EX', ARGV[7])
elseif ARGV[1] == 'session' and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HSET', KEYS[3], 'ended', '1')
end
local id = redis.call('XADD', KEYS[2], 'MINID', '~', string.format('%.0f', now - ARGV[6]), '*',
  'kind', ARGV[1], 'value', ARGV[2], 'cutoff', text,
  'until', string.format('%.0f', clock[1] + lasting))
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call(ARGV[8], ARGV[4], id)
return {id, cutoff}
