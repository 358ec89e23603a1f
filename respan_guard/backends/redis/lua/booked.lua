-- Under whom usage of a customer that ended at a time is booked. ARGV: epoch, customer, time.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local labels = call('HGET', P .. 'tombs', redis.sha1hex(ARGV[1] .. '\0' .. ARGV[2]))
labels = labels and unpacked(labels) or {}
for i = 1, #labels, 2 do
  if tonumber(ARGV[3]) <= labels[i + 1] then return labels[i] end
end
return ARGV[2]
