-- Change the rights of a session's next tokens, and let its sockets know.
--
-- KEYS  1 family  chat:{auth}:family:<session>
--       2 stream  chat:{auth}:revocations
-- ARGV  1 session, 2 channel
--       3 "1" to set roles, 4 roles; 5 "1" to set rooms, 6 rooms (JSON, or "" for none)
--       7 milliseconds that the stream reaches back
--       8 PUBLISH or, on a cluster, SPUBLISH
-- reply {field, value ... of the family}, empty if there is none or it has ended
local ended = redis.call('HGET', KEYS[1], 'ended')
if ended ~= '' then
  return {}
end
if ARGV[3] == '1' then
  redis.call('HSET', KEYS[1], 'roles', ARGV[4])
end
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[1], 'rooms', ARGV[6])
end
local id = redis.call('XADD', KEYS[2], '*', 'kind', 'rights', 'value', ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[7])
redis.call(ARGV[8], ARGV[2], id)
return redis.call('HGETALL', KEYS[1])
