-- What is shown of customers. ARGV: epoch, customers.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local found = {}
for i = 2, #ARGV do found[i - 1] = row_of(ARGV[i]) end
return found
