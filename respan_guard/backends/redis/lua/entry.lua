-- One entry. ARGV: epoch, customer, id.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local raw = call('GET', P .. 'c:' .. ARGV[2])
local at = raw and call('ZSCORE', P .. 'e:' .. unpacked(raw)[NUM], ARGV[3])
return at and entry_of(call('XRANGE', P .. 'log', at, at)[1])
