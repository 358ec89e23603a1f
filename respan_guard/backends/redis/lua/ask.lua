-- One command on one key of the store, if it is still that store. ARGV: epoch, command, key, arguments.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
return call(ARGV[2], P .. ARGV[3], unpack(ARGV, 4))
