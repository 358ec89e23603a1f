-- Sums of customers by day and model. ARGV: epoch, first day, day after the last, numbers of customers. Answers for each
-- its identifier and rows of day, model and sums.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local first, last, found = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for at = 4, #ARGV do
  local rows, given = call('HGETALL', P .. 's:' .. ARGV[at]), {}
  for i = 1, #rows, 2 do
    local colon = string.find(rows[i], ':', 1, true)
    local day = tonumber(string.sub(rows[i], 1, colon - 1))
    if day >= first and day < last then
      given[#given + 1] = { day, string.sub(rows[i], colon + 1), unpacked(rows[i + 1]) }
    end
  end
  found[#found + 1] = { call('HGET', P .. 'names', ARGV[at]), given }
end
return found
