-- How many customers there are. ARGV: epoch, time since which they were seen ("" for any), "1" for blocked ones, "0" for
-- the others, "" for all. Answers how many are still to be sorted in (the count is right when none is), the count.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local since, blocked = ARGV[2], ARGV[3]
if since == '' then
  local all, some = call('HLEN', P .. 'names'), call('SCARD', P .. 'blocked')
  return { 0, blocked == '' and all or blocked == '1' and some or all - some }
end
for _, num in ipairs(call('SPOP', P .. 'unsorted', 500)) do sort_in(num) end
local count, some = call('ZCOUNT', P .. 'by-last_seen', since, '+inf'), 0
if blocked ~= '' then
  for _, customer in ipairs(call('SMEMBERS', P .. 'blocked')) do
    if tonumber(call('ZSCORE', P .. 'by-last_seen', customer) or 0) >= tonumber(since) then some = some + 1 end
  end
  count = blocked == '1' and some or count - some
end
return { call('SCARD', P .. 'unsorted'), count }
