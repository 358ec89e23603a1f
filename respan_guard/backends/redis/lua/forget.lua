-- Forget counts of refusals of before a minute, but not those of hours. ARGV: epoch, minute, most to forget at once. Answers how many went.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local rows = call('ZRANGEBYSCORE', P .. 'refused', '-inf', '(' .. ARGV[2], 'LIMIT', 0, ARGV[3])
for _, row in ipairs(rows) do
  call('ZREM', P .. 'refused', row)
  call('ZREM', P .. 'r:' .. cjson.decode(row)[1], row)
  call('HDEL', P .. 'refusals', row)
end
return #rows
