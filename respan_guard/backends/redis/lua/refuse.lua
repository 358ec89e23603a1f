-- Add counts of refusals. ARGV: epoch, then customer, minute, row as JSON, reason, count of each.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
for i = 2, #ARGV, 5 do
  local customer, minute, row, reason, count = unpack(ARGV, i, i + 4)
  local hour = math.floor(minute / 60)
  call('ZADD', P .. 'refused', minute, row)
  call('ZADD', P .. 'r:' .. customer, minute, row)
  call('HINCRBY', P .. 'refusals', row, count)
  call('HINCRBY', P .. 'f:' .. hour, reason, count)
  call('ZADD', P .. 'refused-hours', hour, hour)
end
return 1
