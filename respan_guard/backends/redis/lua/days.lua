-- Sums of all customers together. ARGV: epoch, "days" and "g:" or "hours" and "t:", first time, time after the last, "1" to
-- count the customers of days. Answers for each time: it, rows of model, sums; the number of customers.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local found = {}
for _, at in ipairs(call('ZRANGEBYSCORE', P .. ARGV[2], ARGV[4], '(' .. ARGV[5])) do
  local rows, given = call('HGETALL', P .. ARGV[3] .. at), {}
  for i = 1, #rows, 2 do given[#given + 1] = { rows[i], unpacked(rows[i + 1]) } end
  found[#found + 1] = { at, given, ARGV[6] == '1' and call('SCARD', P .. 'd:' .. at) or 0 }
end
return found
