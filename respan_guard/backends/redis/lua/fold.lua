-- Forget entries, but not what they added to the sums. ARGV: epoch, place up to which all is looked at ("" to tell
-- nobody), entries as JSON: place, number of the customer, id, "DAY:MODEL", amounts, time. Answers how many went.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local gone, newest = 0, tonumber(call('HGET', KEYS[1], 'pruned_ms') or 0)
for _, entry in ipairs(cjson.decode(ARGV[3])) do
  local place, base = string.format('%.0f', entry[1]), P .. 'b:' .. entry[2]
  if call('XDEL', P .. 'log', place) == 1 then
    local raw = call('HGET', base, entry[4])
    local sums = raw and unpacked(raw) or {}
    for i, amount in ipairs(entry[5]) do sums[i] = (sums[i] or 0) + amount end
    call('HSET', base, entry[4], pack(sums))
    call('ZREM', P .. 'e:' .. entry[2], entry[3])
    call('HDEL', P .. 'z:' .. entry[2], entry[3])
    newest = math.max(newest, entry[6])
    gone = gone + 1
  end
end
if ARGV[2] ~= '' then call('HSET', KEYS[1], 'prune_at', ARGV[2]) end
if gone > 0 then
  call('HINCRBY', KEYS[1], 'moved', 1)
  -- a store of before this was kept never has it: nobody knows what was pruned by then
  if call('HEXISTS', KEYS[1], 'pruned_ms') == 1 then call('HSET', KEYS[1], 'pruned_ms', string.format('%.0f', newest)) end
end
return gone
