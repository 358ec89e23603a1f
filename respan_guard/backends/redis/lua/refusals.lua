-- Counts of refusals, newest minute first. ARGV: epoch, key, first minute, minute after the last, length. The last
-- minute is told in full, so that it can be sorted. Answers row, count, row, count...
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local key, found = P .. ARGV[2], {}
local rows = call('ZREVRANGEBYSCORE', key, '(' .. ARGV[4], ARGV[3], 'LIMIT', 0, ARGV[5])
if rows[1] then
  local last = call('ZSCORE', key, rows[#rows])
  rows = call('ZREVRANGEBYSCORE', key, '(' .. ARGV[4], last)
end
for i, row in ipairs(rows) do
  found[2 * i - 1], found[2 * i] = row, call('HGET', P .. 'refusals', row)
end
return found
