-- Store params if the revision is still the one given. ARGV: epoch, now ("" for the server's clock), customer,
-- revision before, revision after, params, name, row of the audit, "1" where places are times,
-- "1" for one that is blocked. Answers 1, or 0.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local now, customer = tonumber(ARGV[2]), ARGV[3]
if not now then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local raw = call('GET', P .. 'c:' .. customer)
local s = raw and unpacked(raw)
if (s and s[REVISION] or '') ~= ARGV[4] then return 0 end
if not s then
  s = { call('HINCRBY', KEYS[1], 'born', 1), '', now, now, 0, 0, '', {}, {}, {}, {}, {}, 0, 0 }
  call('HSET', P .. 'names', s[NUM], customer)
end
call('ZREM', P .. 'by-name', s[NAME] .. '\0' .. customer)
s[REVISION], s[NAME], s[QUEUED] = ARGV[5], ARGV[7], 1
call('SET', P .. 'c:' .. customer, pack(s))
call('SET', P .. 'p:' .. s[NUM], ARGV[6])
call('SADD', P .. 'unsorted', s[NUM])
call(ARGV[10] == '1' and 'SADD' or 'SREM', P .. 'blocked', customer)
note(customer, now, ARGV[9] == '1', ARGV[8])
return 1
