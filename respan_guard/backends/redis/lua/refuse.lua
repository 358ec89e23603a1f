-- Add counts of refusals. ARGV: epoch, then customer, minute, row as JSON, count of each.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
for i = 2, #ARGV, 4 do
  call('ZADD', P .. 'refused', ARGV[i + 1], ARGV[i + 2])
  call('ZADD', P .. 'r:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  call('HINCRBY', P .. 'refusals', ARGV[i + 2], ARGV[i + 3])
end
return 1
