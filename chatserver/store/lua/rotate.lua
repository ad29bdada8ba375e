-- Put a family of refresh tokens into its next state, if it still is in the one that was judged.
--
-- KEYS  1 family  chat:{auth}:family:<session>
--       2 cutoff  chat:{auth}:ended:<user>: families begun up to then (seconds) have ended
-- ARGV  1 generation, 2 replays: the state that was judged
--       3 generation, 4 time of rotation (ms), 5 replays: the next one
-- reply {1 if done, seconds, microseconds, cutoff or 0, field, value ... of the family as it was}
local clock = redis.call('TIME')
local cutoff = tonumber(redis.call('GET', KEYS[2]) or '0')
local was = redis.call('HGETALL', KEYS[1])
local family = {}
for i = 1, #was, 2 do
  family[was[i]] = was[i + 1]
end
local done = 0
if family.generation == ARGV[1] and family.replays == ARGV[2] and family.ended == ''
  and tonumber(family.begun_at) > cutoff then
  redis.call('HSET', KEYS[1], 'generation', ARGV[3], 'rotated_at', ARGV[4], 'replays', ARGV[5])
  done = 1
end
return {done, tonumber(clock[1]), tonumber(clock[2]), cutoff, unpack(was)}
