-- What was revoked since an entry, with what tells whether this is still the same store.
--
-- KEYS  1 stream        chat:{auth}:revocations
--       2 incarnation   a random name: another one means that the store came back empty
-- ARGV  1 id of the last entry known, "0-0" for all; 2 incarnation to set where there is none
--       3 at most so many entries
-- reply {seconds, microseconds, incarnation, id of the stream's latest entry or "0-0",
--        {id, {field, value ...}} ...}
local clock = redis.call('TIME')
redis.call('SET', KEYS[2], ARGV[2], 'NX')
local latest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local reply = {
  tonumber(clock[1]), tonumber(clock[2]), redis.call('GET', KEYS[2]),
  latest[1] and latest[1][1] or '0-0',
}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[3])) do
  reply[#reply + 1] = entry
end
return reply
