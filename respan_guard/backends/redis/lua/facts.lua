-- A page of facts. ARGV: epoch, space, key to begin after, length. Answers key, value, ...
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local found = {}
local from = ARGV[3] == '' and '-' or '(' .. ARGV[3]
for _, key in ipairs(call('ZRANGEBYLEX', P .. 'o:' .. ARGV[2], from, '+', 'LIMIT', 0, ARGV[4])) do
  found[#found + 1] = key
  found[#found + 1] = call('HGET', P .. 'k:' .. ARGV[2], key)
end
return found
