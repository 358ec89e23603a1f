-- What `verify` compares. ARGV: epoch, numbers of customers. Answers the log's end, how often entries were moved, and for
-- each customer: number, identifier, sums of all time, days, count of entries, rows, rows of pruned entries, faults, when it was last seen.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local SEVEN_DAYS = 604800000
local meta, found = call('HMGET', KEYS[1], 'seq', 'moved'), {}

for at = 2, #ARGV do
  local customer, s = state_of(ARGV[at])
  local faults, rows, base, pruned = {}, {}, {}, call('HGETALL', P .. 'b:' .. ARGV[at])
  for i = 1, #pruned, 2 do base[#base + 1] = { pruned[i], unpacked(pruned[i + 1]) } end
  if s then
    for key, sums in pairs(sums_of(s)) do rows[#rows + 1] = { key, sums } end
    local held, counted, spans = { 0, 0 }, { 0, 0 }, s[SPANS]
    local holds = call('HGETALL', P .. 'h:' .. ARGV[at])
    for i = 1, #holds, 2 do
      local h = unpacked(holds[i + 1])
      if h[3] < 0 or h[4] < 0 then faults[#faults + 1] = { 'hold below 0 ' .. holds[i], math.min(h[3], h[4]), 0 } end
      if h[5] < s[LAST] - SEVEN_DAYS then faults[#faults + 1] = { 'hold long expired ' .. holds[i], h[5], s[LAST] } end
      -- the sums of what is held are right up to the first expiry after them
      if h[6] < 0 and (s[SOONEST] > 0 and h[5] >= s[SOONEST]) then
        held[1], held[2] = held[1] + h[3], held[2] + h[4]
      end
    end
    for i = 1, #s[LIVE], 4 do
      counted[1], counted[2] = counted[1] + s[LIVE][i + 2], counted[2] + s[LIVE][i + 3]
    end
    for i = 1, 2 do
      if counted[i] ~= held[i] then faults[#faults + 1] = { i == 1 and 'held cost' or 'held tokens', counted[i], held[i] } end
    end
    for i = 1, #spans, 6 do
      local sum = 0
      for _, row in ipairs(rows) do
        local day, model = day_and_model(row[1])
        local a = row[2]
        if day >= spans[i + 1] and day < spans[i + 2] and (spans[i + 3] == 0 or model == spans[i + 4]) then
          sum = sum + (spans[i] == 1 and (a[3] or 0) or spans[i] == 0 and (a[1] or 0) or (a[4] or 0) + (a[5] or 0))
        end
      end
      if sum ~= spans[i + 5] then faults[#faults + 1] = { 'sum of days', spans[i + 5], sum } end
    end
    for i = 1, #s[RATES], 4 do
      if s[RATES][i + 2] < 0 or s[RATES][i + 3] < 0 then faults[#faults + 1] = { 'rate below 0', s[RATES][i + 3], 0 } end
    end
  end
  found[#found + 1] = { ARGV[at], customer, s and s[TOTALS] or {}, s and s[DAYS] or 0, call('ZCARD', P .. 'e:' .. ARGV[at]),
    rows, base, faults, s and s[LAST] or 0 }
end
return { meta[1], meta[2], found }
