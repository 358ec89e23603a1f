-- Add counts of refusals; those of who was deleted since go to the label. ARGV: epoch, then customer, minute, row as JSON, reason, count of each.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local any_deleted = call('HGET', KEYS[1], 'tombs') ~= '0'
for i = 2, #ARGV, 5 do
  local customer, minute, row, reason, count = unpack(ARGV, i, i + 4)
  local labels = any_deleted and call('HGET', P .. 'tombs', redis.sha1hex(ARGV[1] .. '\0' .. customer))
  labels = labels and unpacked(labels) or {}
  for j = 1, #labels, 2 do
    if tonumber(minute) * 60000 <= labels[j + 1] then
      customer, row = labels[j], cjson.encode({ labels[j], reason, tonumber(minute) })
      break
    end
  end
  local hour = math.floor(minute / 60)
  call('ZADD', P .. 'refused', minute, row)
  call('ZADD', P .. 'r:' .. customer, minute, row)
  call('HINCRBY', P .. 'refusals', row, count)
  call('HINCRBY', P .. 'f:' .. hour, reason, count)
  call('ZADD', P .. 'refused-hours', hour, hour)
end
return 1
