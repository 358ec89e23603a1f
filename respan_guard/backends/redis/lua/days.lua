-- Sums of all customers by day. ARGV: epoch, first day, day after the last. Answers day and rows of "FIELD:MODEL", sum.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local found = {}
for _, day in ipairs(call('ZRANGEBYSCORE', P .. 'days', ARGV[2], '(' .. ARGV[3])) do
  found[#found + 1] = { day, call('HGETALL', P .. 'g:' .. day) }
end
return found
