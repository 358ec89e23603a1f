-- Holds of customers. ARGV: epoch, numbers of customers. Answers for each its identifier and rows.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local found = {}
for at = 2, #ARGV do
  local rows, given = call('HGETALL', P .. 'h:' .. ARGV[at]), {}
  for i = 1, #rows, 2 do
    local h = unpacked(rows[i + 1])
    given[#given + 1] = { rows[i], h[1], h[2], h[3], h[4], h[5], h[6] }
  end
  found[#found + 1] = { call('HGET', P .. 'names', ARGV[at]), given }
end
return found
