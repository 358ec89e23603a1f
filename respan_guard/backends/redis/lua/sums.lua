-- Sums of customers by day and model. ARGV: epoch, first day, day after the last, numbers of customers. Answers for each
-- its identifier and rows of day, model and sums.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local first, last, found = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for at = 4, #ARGV do
  local customer, s = state_of(ARGV[at])
  local given = {}
  for key, sums in pairs(s and sums_of(s) or {}) do
    local day, model = day_and_model(key)
    if day >= first and day < last then given[#given + 1] = { day, model, sums } end
  end
  found[#found + 1] = { customer, given }
end
return found
