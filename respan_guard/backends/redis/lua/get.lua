-- One customer. ARGV: epoch, customer.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
return row_of(ARGV[2])
