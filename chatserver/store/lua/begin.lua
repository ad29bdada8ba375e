-- Begin a session: the family of its refresh tokens.
--
-- KEYS  1 family  chat:{auth}:family:<session>
--       2 cutoff  chat:{auth}:ended:<user>: families begun up to then (seconds) have ended
-- ARGV  1 user, 2 roles, 3 rooms (JSON, or "" for none), 4 seconds until its last token expires
-- reply {seconds at which it begins, 0}, or {0, milliseconds after which to try again}
local clock = redis.call('TIME')
local cutoff = tonumber(redis.call('GET', KEYS[2]) or '0')
if cutoff > tonumber(clock[1]) then
  -- Revoked twice in this second. What begins is never more than a second ahead of the clock.
  return {0, (cutoff - clock[1]) * 1000 - math.floor(clock[2] / 1000) + 1}
end
-- A revocation of the user covers its whole second: a login right after it comes later.
local begun = math.max(tonumber(clock[1]), cutoff + 1)
local expires = begun + ARGV[4]
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'user', ARGV[1], 'roles', ARGV[2], 'rooms', ARGV[3],
  'begun_at', string.format('%.0f', begun), 'expires_at', string.format('%.0f', expires),
  'generation', '1', 'rotated_at', string.format('%.0f', begun * 1000), 'replays', '0',
  'ended', '')
-- A day more, in which an old token is told that it has expired.
redis.call('EXPIREAT', KEYS[1], string.format('%.0f', expires + 86400))
return {begun, 0}
