-- Forget who a customer was. ARGV: epoch, now ("" for the server's clock), customer, label,
-- row of the audit, "1" where places are times. Answers 1, or 0 for a customer that is not known.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local now, customer, label = tonumber(ARGV[2]), ARGV[3], ARGV[4]
if not now then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local raw = call('GET', P .. 'c:' .. customer)
if not raw then return 0 end
local s = unpacked(raw)
local num = s[NUM]
if call('HGET', KEYS[1], 'wide') == '1' then
  local everyone = unpacked(call('GET', P .. 'wide'))
  local live, mine = everyone[2], s[LIVE]
  for i = 1, #mine, 4 do
    for j = 1, #live, 4 do
      if live[j] == mine[i] and live[j + 1] == mine[i + 1] then
        live[j + 2], live[j + 3] = live[j + 2] - mine[i + 2], live[j + 3] - mine[i + 3]
      end
    end
  end
  call('SET', P .. 'wide', pack(everyone))
  call('ZREM', P .. 'soonest', num)
end
for _, sort in ipairs({ 'customer', 'first_seen', 'last_seen', 'requests', 'calls', 'cost', 'tokens' }) do
  call('ZREM', P .. 'by-' .. sort, customer)
end
call('ZREM', P .. 'by-name', s[NAME] .. '\0' .. customer)
s[REVISION], s[NAME], s[SOONEST], s[RATES], s[LIVE], s[OPENED], s[HELD_FROM] = '', '', 0, {}, {}, 0, nil
call('DEL', P .. 'c:' .. customer, P .. 'p:' .. num, P .. 'h:' .. num, P .. 'z:' .. num)
call('SET', P .. 'c:' .. label, pack(s))
call('HSET', P .. 'names', num, label)
call('SREM', P .. 'open', num)
call('SREM', P .. 'blocked', customer)
sort_in(num)
local field = redis.sha1hex(ARGV[1] .. '\0' .. customer)
local labels = call('HGET', P .. 'tombs', field)
labels = labels and unpacked(labels) or {}
labels[#labels + 1], labels[#labels + 2] = label, now
call('HSET', P .. 'tombs', field, pack(labels))
for _, member in ipairs(call('ZRANGE', P .. 'r:' .. customer, 0, -1)) do
  local row = cjson.decode(member)
  local count, moved = call('HGET', P .. 'refusals', member), cjson.encode({ label, row[2], row[3] })
  call('HDEL', P .. 'refusals', member)
  call('ZREM', P .. 'refused', member)
  call('HSET', P .. 'refusals', moved, count)
  call('ZADD', P .. 'refused', row[3], moved)
  call('ZADD', P .. 'r:' .. label, row[3], moved)
end
call('DEL', P .. 'r:' .. customer)
call('HINCRBY', KEYS[1], 'tombs', 1)
call('HINCRBY', KEYS[1], 'moved', 1)
for _, place in ipairs(call('ZRANGE', P .. 'u:' .. customer, 0, -1)) do
  call('HDEL', P .. 'audit', place)
  call('ZREM', P .. 'audits', place)
end
call('DEL', P .. 'u:' .. customer)
note(label, now, ARGV[6] == '1', ARGV[5])
return 1
