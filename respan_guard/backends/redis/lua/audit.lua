-- Add a row to the audit. ARGV: epoch, "1" for places that are times, customer, time, row as JSON.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
note(ARGV[3], tonumber(ARGV[4]), ARGV[2] == '1', ARGV[5])
return 1
