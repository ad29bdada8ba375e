-- Register a connection of a user, if there may be one more; or again, if it has its place still.
--
-- KEYS  1 connections  chat:{auth}:user:<user>, hash: "<worker>/<connection>" ->
--                      "<since, ms> <address> <session>"
--       2 workers      hash: worker -> "<renewed, ms> ..."
-- ARGV  1 field, 2 since and address, 3 session
--       4 connections that a user may have; 5 milliseconds that a lease lasts
--       6 seconds that a registration lasts (a connection's is renewed with its token)
--       7 field of one that gives up its place if it is there, or ''
--       8 "1": again. Without a place it gets another, unless one of its session is there
-- reply {1} if it is registered, or {0, field, value ...}: all that stand in its way
local function register()
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3])
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  return {1}
end

if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return register()
end
if ARGV[7] ~= '' and redis.call('HDEL', KEYS[1], ARGV[7]) == 1 then
  return register()
end
if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[4]) then
  return register()
end
-- A worker that is gone must lock nobody out.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local workers = redis.call('HGETALL', KEYS[2])
local alive = {}
for i = 1, #workers, 2 do
  alive[workers[i]] = tonumber(string.match(workers[i + 1], '^%d+')) + ARGV[5] > now
end
local all = redis.call('HGETALL', KEYS[1])
local left = {0}
for i = 1, #all, 2 do
  if alive[string.match(all[i], '^[^/]+')] then
    left[#left + 1] = all[i]
    left[#left + 1] = all[i + 1]
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
if (#left - 1) / 2 < tonumber(ARGV[4]) then
  return register()
end
if ARGV[8] == '1' then
  for i = 3, #left, 2 do
    if string.match(left[i], '^%S+ %S+ (.*)$') == ARGV[3] then
      return left
    end
  end
  -- Its worker was taken for dead, and others came meanwhile: nobody has taken its place.
  return register()
end
return left
