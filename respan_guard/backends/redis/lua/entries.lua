-- A stretch of the log. ARGV: epoch, customer ("" for all), is a customer given, place behind which to begin, "1" for
-- descending, length, earliest end in ms ("" for any), "1" where places are times.
-- Answers the place from which on more may come that is not seen yet (0: none), rows.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local after, descending, limit, since = tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6], tonumber(ARGV[7])
local open, log = 0, P .. 'log'
if ARGV[8] == '1' then
  local time = call('TIME')
  open = math.max(tonumber(call('HGET', KEYS[1], 'seq')) + 1, math.floor(time[1] * 256000 + time[2] * 0.256))
end

if since and not descending then -- the latest end up to a place never falls along the log: halve
  local oldest, newest = call('XRANGE', log, '-', '+', 'COUNT', 1)[1], call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local low, high = oldest and place(oldest[1]) or 1, newest and place(newest[1]) + 1 or 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    local row = call('XRANGE', log, string.format('%.0f', middle), '+', 'COUNT', 1)[1]
    if not row or tonumber(row[2][12]) >= since then high = middle else low = place(row[1]) + 1 end
  end
  after = math.max(after or 0, low - 1)
end

local rows, found = {}, {}
if ARGV[3] == '1' then
  local raw = call('GET', P .. 'c:' .. ARGV[2])
  if not raw then return { open, found } end
  local e = P .. 'e:' .. unpacked(raw)[NUM]
  local places
  if descending then
    places = call('ZREVRANGEBYSCORE', e, after and string.format('(%.0f', after) or '+inf', '-inf', 'LIMIT', 0, limit, 'WITHSCORES')
  else
    places = call('ZRANGEBYSCORE', e, string.format('(%.0f', after or 0), '+inf', 'LIMIT', 0, limit, 'WITHSCORES')
  end
  for i = 2, #places, 2 do rows[#rows + 1] = call('XRANGE', log, places[i], places[i])[1] end
elseif descending then
  rows = call('XREVRANGE', log, after and string.format('(%.0f-0', after) or '+', '-', 'COUNT', limit)
else
  rows = call('XRANGE', log, string.format('(%.0f-0', after or 0), '+', 'COUNT', limit)
end
for i, row in ipairs(rows) do found[i] = entry_of(row) end
return { open, found }
