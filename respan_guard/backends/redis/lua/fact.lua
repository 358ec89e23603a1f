-- Compare and set a fact. ARGV: epoch, space, key, "=" or "" (whatever is there), is one expected, it, is one given, it.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local k, o, key = P .. 'k:' .. ARGV[2], P .. 'o:' .. ARGV[2], ARGV[3]
if ARGV[4] == '=' and call('HGET', k, key) ~= (ARGV[5] == '1' and ARGV[6]) then return 0 end
if ARGV[7] == '1' then
  call('HSET', k, key, ARGV[8])
  call('ZADD', o, 0, key)
else
  call('HDEL', k, key)
  call('ZREM', o, key)
end
return 1
