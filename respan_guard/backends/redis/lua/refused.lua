-- Refusals by reason. ARGV: epoch, customer, is one given, first minute, minute after the last. Of all customers: by whole
-- hours, and by minutes at both ends. Answers reason, count, ...
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local since, until_, sums = tonumber(ARGV[4]), tonumber(ARGV[5]), {}

local function count(key, first, last)
  if first >= last then return end
  for _, row in ipairs(call('ZRANGEBYSCORE', P .. key, first, string.format('(%.0f', last))) do
    local reason = cjson.decode(row)[2]
    sums[reason] = (sums[reason] or 0) + call('HGET', P .. 'refusals', row)
  end
end

if ARGV[3] == '1' then
  count('r:' .. ARGV[2], since, until_)
else
  local first, last = math.ceil(since / 60), math.floor(until_ / 60)
  if first > last then
    count('refused', since, until_)
  else
    count('refused', since, first * 60)
    count('refused', last * 60, until_)
    for _, hour in ipairs(call('ZRANGEBYSCORE', P .. 'refused-hours', first, string.format('(%.0f', last))) do
      local rows = call('HGETALL', P .. 'f:' .. hour)
      for i = 1, #rows, 2 do sums[rows[i]] = (sums[rows[i]] or 0) + rows[i + 1] end
    end
  end
end
local found = {}
for reason, sum in pairs(sums) do
  found[#found + 1] = reason
  found[#found + 1] = sum
end
return found
