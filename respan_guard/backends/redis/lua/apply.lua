-- A batch of operations: everything is decided on copies first and written last, so a batch that can't be applied
-- leaves nothing behind. ARGV: epoch, latest time known, "1" to read the server's clock, "1" for a log whose places
-- are times, operations as JSON, texts they refer to.
local REPLAY, EVER, MAX, SIX_DAYS = 60000, 1099511627776, 9000000000000000, 518400000
local MAX_SPANS, MAX_RECENT, MAX_UNSORTED, HOUR, HOURS_KEPT, TURN = 48, 8, 4096, 3600000, 1440, 180000
local head = call('HMGET', KEYS[1], 'epoch', 'seq', 'latest', 'pruned', 'tombs', 'wide', 'born', 'turned', 'turn',
  'sweep_at', 'sweep')
if head[1] ~= ARGV[1] then return redis.error_reply('RESET') end
local now = tonumber(ARGV[2])
local ticks = 0
if ARGV[3] == '1' or ARGV[4] == '1' then
  local time = call('TIME')
  if ARGV[4] == '1' then ticks = math.floor(time[1] * 256000 + time[2] * 0.256) end
  if ARGV[3] == '1' then now = math.max(now, time[1] * 1000 + math.floor(time[2] / 1000)) end
end
local seq, latest, pruned = tonumber(head[2]), tonumber(head[3]), tonumber(head[4])
local tombs, born, turned, turn = head[5] ~= '0', tonumber(head[7]), tonumber(head[8]), tonumber(head[9])
local first_seq, first_born, reading = seq, born, false
local cells, order, overflow = {}, {}, nil
local everyone, log, days, hours = nil, {}, {}, {}
if head[6] == '1' then everyone = unpacked(call('GET', P .. 'wide')) end

-- customers --------------------------------------------------------------------------------------

local function load(customer)
  local cell = cells[customer]
  if not cell then
    local raw = call('GET', P .. 'c:' .. customer)
    cell = { customer = customer, holds = {}, s = raw and unpacked(raw) or { 0, '', 0, 0, 0, 0, '', {}, {}, {}, {}, {}, 0, 0 } }
    cell.soonest = cell.s[SOONEST]
    cells[customer] = cell
    order[#order + 1] = cell
  end
  return cell
end

local function keep(cell)
  if cell.s[NUM] == 0 then
    born = born + 1
    cell.s[NUM], cell.s[FIRST], cell.s[LAST], cell.born = born, now, now, true
  end
  cell.save, cell.seen = true, true
end

local function hold_of(cell, id)
  local hold = cell.holds[id]
  if hold == nil then
    local raw = cell.s[NUM] > 0 and not cell.born and call('HGET', P .. 'h:' .. cell.s[NUM], id)
    hold = raw and unpacked(raw) or false
    cell.holds[id] = hold
  end
  return hold
end

local function keep_hold(cell, id, hold)
  cell.holds[id] = hold
  if not cell.changed then cell.changed = {} end
  cell.changed[id] = true
  cell.save = true
end

-- what is held: flat lists of day, model, cost, tokens -----------------------------------------------

local function move(live, day, model, cost, tokens)
  for i = 1, #live, 4 do
    if live[i] == day and live[i + 1] == model then
      live[i + 2], live[i + 3] = live[i + 2] + cost, live[i + 3] + tokens
      if live[i + 2] == 0 and live[i + 3] == 0 then
        for _ = 1, 4 do table.remove(live, i) end
      end
      return
    end
  end
  if cost ~= 0 or tokens ~= 0 then
    local n = #live
    live[n + 1], live[n + 2], live[n + 3], live[n + 4] = day, model, cost, tokens
  end
end

local function hold_more(cell, hold, cost, tokens)
  move(cell.s[LIVE], hold[1], hold[2], cost, tokens)
  if everyone then move(everyone[2], hold[1], hold[2], cost, tokens) end
end

local function expire(cell)
  local s = cell.s
  if s[SOONEST] == 0 or s[SOONEST] > now then return end
  if not cell.born then
    local rows = call('HGETALL', P .. 'h:' .. s[NUM])
    for i = 1, #rows, 2 do
      if cell.holds[rows[i]] == nil then cell.holds[rows[i]] = unpacked(rows[i + 1]) end
    end
  end
  local live, soonest = {}, 0
  for _, hold in pairs(cell.holds) do
    if hold and hold[6] < 0 and hold[5] > now and (hold[3] > 0 or hold[4] > 0) then
      move(live, hold[1], hold[2], hold[3], hold[4])
      if soonest == 0 or hold[5] < soonest then soonest = hold[5] end
    end
  end
  if everyone then
    local old = s[LIVE]
    for i = 1, #old, 4 do move(everyone[2], old[i], old[i + 1], -old[i + 2], -old[i + 3]) end
    for i = 1, #live, 4 do move(everyone[2], live[i], live[i + 1], live[i + 2], live[i + 3]) end
  end
  s[LIVE], s[SOONEST], cell.save = live, soonest, true
end

local function held_of(live, metric, first, last, model)
  local held, at = 0, metric == 1 and 2 or 3
  for i = 1, #live, 4 do
    if live[i] >= first and live[i] < last and (not model or live[i + 1] == model) then held = held + live[i + at] end
  end
  return held
end

-- what was used: flat lists of metric, first day, last day, only one model?, model, sum ----------------

local function measure(metric, amounts)
  if metric == 1 then return amounts[3] or 0 end
  return metric == 0 and (amounts[1] or 0) or (amounts[4] or 0) + (amounts[5] or 0)
end

local function grow(spans, model, day, amounts)
  for i = 1, #spans, 6 do
    if day >= spans[i + 1] and day < spans[i + 2] and (spans[i + 3] == 0 or spans[i + 4] == model) then
      spans[i + 5] = spans[i + 5] + measure(spans[i], amounts)
    end
  end
end

local function row_of(cell, key, day)
  local recent = cell.s[RECENT]
  for i = 1, #recent, 2 do
    if recent[i] == key then return recent[i + 1] end
  end
  local sums = cell.rows and cell.rows[key]
  if not sums then
    local raw = not cell.born and call('HGET', P .. 's:' .. cell.s[NUM], key)
    sums = raw and unpacked(raw)
    if not sums then
      sums = {}
      if not cell.days then cell.days = {} end
      cell.days[#cell.days + 1] = day
    end
  end
  if #recent >= MAX_RECENT then
    if not cell.rows then cell.rows = {} end
    cell.rows[table.remove(recent, 1)] = table.remove(recent, 1)
  end
  recent[#recent + 1] = key
  recent[#recent + 1] = sums
  return sums
end

local function together(sums, at, model)
  local key = at .. ':' .. model
  local found = sums[key]
  if not found then
    found = { at = at, model = model }
    sums[key] = found
  end
  return found
end

local function add(cell, model, day, amounts, at)
  local totals, row = cell.s[TOTALS], row_of(cell, day .. ':' .. model, day)
  local of_day, of_hour = together(days, day, model), together(hours, math.floor(at / HOUR), model)
  for i = 1, #amounts do
    local amount = amounts[i]
    totals[i], row[i] = (totals[i] or 0) + amount, (row[i] or 0) + amount
    of_day[i], of_hour[i] = (of_day[i] or 0) + amount, (of_hour[i] or 0) + amount
    if row[i] > MAX or row[i] < -MAX then overflow = cell.customer end
  end
  grow(cell.s[SPANS], model, day, amounts)
  if everyone then grow(everyone[1], model, day, amounts) end
end

local function sum_of_days(cell, metric, first, last, model)
  local sum, rows = 0, cell.born and {} or sums_of(cell.s)
  local function look(key, sums)
    local day, its = day_and_model(key)
    if day >= first and day < last and (not model or its == model) then sum = sum + measure(metric, sums) end
  end
  for key, sums in pairs(cell.rows or {}) do rows[key] = sums end
  if cell.born then
    for i = 1, #cell.s[RECENT], 2 do rows[cell.s[RECENT][i]] = cell.s[RECENT][i + 1] end
  end
  for key, sums in pairs(rows) do look(key, sums) end
  return sum
end

local function sum_of_all(metric, first, last, model)
  local sum = 0
  for _, day in ipairs(call('ZRANGEBYSCORE', P .. 'days', first, '(' .. string.format('%.0f', last))) do
    local rows = call('HGETALL', P .. 'g:' .. day)
    for i = 1, #rows, 2 do
      if not model or rows[i] == model then sum = sum + measure(metric, unpacked(rows[i + 1])) end
    end
  end
  for _, row in pairs(days) do
    if row.at >= first and row.at < last and (not model or row.model == model) then sum = sum + measure(metric, row) end
  end
  return sum
end

local function find_span(spans, metric, first, last, model)
  for i = 1, #spans, 6 do
    if spans[i] == metric and spans[i + 1] == first and spans[i + 2] == last
      and (model and spans[i + 3] == 1 and spans[i + 4] == model or not model and spans[i + 3] == 0) then
      return spans[i + 5]
    end
  end
end

local function keep_span(spans, metric, first, last, model, sum)
  if #spans >= MAX_SPANS then for i = #spans, 1, -1 do spans[i] = nil end end
  for _, value in ipairs({ metric, first, last, model and 1 or 0, model or '', sum }) do spans[#spans + 1] = value end
end

local function used_of(cell, metric, first, last, model)
  if not model and first <= 0 and last >= EVER then return measure(metric, cell.s[TOTALS]) end
  local sum = find_span(cell.s[SPANS], metric, first, last, model)
  if not sum then
    sum = sum_of_days(cell, metric, first, last, model)
    if cell.s[NUM] > 0 then
      keep_span(cell.s[SPANS], metric, first, last, model, sum)
      cell.save = true
    end
  end
  return sum
end

-- limits that span customers: kept up from the first one on ---------------------------------------------

local function spanning()
  if not everyone then
    everyone = { {}, {} }
    for _, num in ipairs(call('SMEMBERS', P .. 'open')) do
      local customer = call('HGET', P .. 'names', num)
      if customer then load(customer) end
    end
    local known = everyone
    everyone = nil -- what cells expire below is not counted yet
    for _, cell in ipairs(order) do
      expire(cell)
      local live = cell.s[LIVE]
      for i = 1, #live, 4 do move(known[2], live[i], live[i + 1], live[i + 2], live[i + 3]) end
      cell.soonest, cell.save = -1, cell.s[NUM] > 0
    end
    everyone = known
  end
  for _, cell in ipairs(order) do expire(cell) end
  for _, num in ipairs(call('ZRANGEBYSCORE', P .. 'soonest', '-inf', string.format('%.0f', now))) do
    local customer = call('HGET', P .. 'names', num)
    if customer then expire(load(customer)) end
  end
end

local function used_by_all(metric, first, last, model)
  local sum = find_span(everyone[1], metric, first, last, model)
  if not sum then
    sum = sum_of_all(metric, first, last, model)
    keep_span(everyone[1], metric, first, last, model, sum)
  end
  return sum
end

-- admissions -----------------------------------------------------------------------------------------------

local function roll(rates, width)
  for i = 1, #rates, 4 do
    if rates[i] == width then
      local start, cur = rates[i + 1], rates[i + 3]
      if now < start + width then
        if now >= start - width then return i, start, rates[i + 2], cur end
        return i, now, 0, 0
      end
      if now < start + 2 * width then return i, start + width, cur, 0 end
      return i, now, 0, 0
    end
  end
  return #rates + 1, now, 0, 0
end

local function evaluate(cell, limits, model, requests, cost, tokens, free)
  expire(cell)
  local used, held, windows, reasons, fits = {}, {}, {}, {}, true
  for at, limit in ipairs(limits) do
    local metric, amount, width, first, last, scope = limit[1], limit[2], limit[3], limit[4], limit[5], limit[6]
    local sum, holding, reason = 0, 0, 0
    if width > 0 then
      local _, start, prev, cur = roll(cell.s[RATES], width)
      local n = #windows
      windows[n + 1], windows[n + 2], windows[n + 3] = start, prev, cur
      sum = cur
      if prev > 0 then
        local rest = prev * (width - math.max(0, now - start))
        sum = sum + (rest - math.fmod(rest, width)) / width
      end
      if sum + requests > amount then reason = 1 end
    else
      local live, only = cell.s[LIVE], (scope == 1 or scope == 2) and model or nil
      if scope >= 2 then
        spanning()
        sum, live = used_by_all(metric, first, last, only), everyone[2]
      else
        sum = used_of(cell, metric, first, last, only)
      end
      if metric == 0 then
        if sum + requests > amount then reason = 3 end
      else
        if live[1] then holding = held_of(live, metric, first, last, only) end
        local asked = metric == 1 and cost or tokens
        if (asked > 0 or not free) and (asked > amount - sum - holding or sum + holding >= amount) then
          reason = (sum < amount and asked <= amount - sum) and 2 or 3
        end
      end
    end
    if reason > 0 then fits = false end
    used[at], held[at], reasons[at] = sum, holding, reason
  end
  return fits, used, held, windows, reasons
end

local function admit(op)
  local customer, id, model, requests, cost, tokens = op[2], op[3], op[8], op[9], op[10], op[11]
  local cell = load(customer)
  local s, hold = cell.s, hold_of(cell, id)
  if hold then
    if (hold[6] >= 0 and hold[6] or hold[5]) + REPLAY > now then return hold[7] end
  elseif s[NUM] > 0 and not cell.born then
    local field = s[NUM] .. ':' .. id
    local raw = call('HGET', P .. 'a' .. turn, field)
    if not raw and now < turned + REPLAY then raw = call('HGET', P .. 'a' .. 1 - turn, field) end
    if raw then
      local known = unpacked(raw)
      if known[1] + REPLAY > now then return known[2] end
    end
  end
  if s[REVISION] ~= op[4] or now < op[6] or now >= op[7] then
    return { 2, now, s[REVISION], s[NUM] > 0 and call('GET', P .. 'p:' .. s[NUM]) or false }
  end
  local fits, used, held, windows, reasons = evaluate(cell, op[14], model, requests, cost, tokens, op[13] == 1)
  if not fits then return { 1, now, used, held, windows, reasons } end
  keep(cell)
  if requests > 0 then
    s[LAST] = now
    local at = 0
    for _, limit in ipairs(op[14]) do
      if limit[3] > 0 then
        local i, rates = roll(s[RATES], limit[3]), s[RATES]
        rates[i], rates[i + 1], rates[i + 2], rates[i + 3] =
          limit[3], windows[at + 1], windows[at + 2], windows[at + 3] + requests
        at = at + 3
      end
    end
    add(cell, model, op[5], { requests }, now)
  end
  local answer, expires = { 0, now, used, held, windows }, now + op[12]
  hold = { op[5], model, cost, tokens, expires, -1, answer }
  keep_hold(cell, id, hold)
  cell.open = true
  if cost > 0 or tokens > 0 then
    hold_more(cell, hold, cost, tokens)
    if s[SOONEST] == 0 or expires < s[SOONEST] then s[SOONEST] = expires end
  end
  return answer
end

local function release(op)
  local cell = load(op[2])
  local hold = hold_of(cell, op[3])
  if not hold or hold[6] >= 0 then return { 5, 3 } end
  if hold[5] <= now then
    expire(cell)
    hold[6] = hold[5]
    keep_hold(cell, op[3], hold)
    return { 5, 1 }
  end
  hold_more(cell, hold, -hold[3], -hold[4])
  hold[3], hold[4], hold[6] = 0, 0, now
  keep_hold(cell, op[3], hold)
  return { 5, 0 }
end

local function renew(op)
  local cell = load(op[2])
  local hold = hold_of(cell, op[3])
  if not hold or hold[6] >= 0 or hold[5] <= now then return { 5, 3 } end
  hold[5] = math.max(hold[5], now + op[4])
  keep_hold(cell, op[3], hold)
  return { 5, 2 }
end

-- entries ------------------------------------------------------------------------------------------------------

local function find(cell, id)
  local entry = cell.entries and cell.entries[id]
  if entry or cell.s[NUM] == 0 or cell.born then return entry end
  local place = call('ZSCORE', P .. 'e:' .. cell.s[NUM], id)
  if not place then return nil end
  local row = call('XRANGE', P .. 'log', place, place)[1][2]
  return { seq = tonumber(place), day = tonumber(row[4]), cost = tonumber(row[6]) or false, rev = tonumber(row[8]),
    late = row[10] == '1', body = row[14] }
end

local function append(cell, id, entry, at)
  seq = math.max(seq + 1, ticks)
  latest = math.max(latest, at)
  entry.seq, entry.latest, entry.num, entry.id = seq, latest, cell.s[NUM], id
  if not cell.entries then cell.entries = {} end
  cell.entries[id] = entry
  log[#log + 1] = entry
end

local function shrink(booked, op)
  local id, cost = 'presumed:' .. op[9], op[6]
  if op[3] == id or not cost or cost <= 0 then return end
  local entry = find(booked, id)
  if not entry or not entry.cost or entry.cost == 0 then return end
  local cut = math.min(entry.cost, cost)
  local body = cjson.decode(entry.body)
  add(booked, body[6], entry.day, { 0, 0, -cut, 0, 0 }, body[3])
  if entry.latest then entry.dropped = true end -- it came with this batch
  append(booked, id, { day = entry.day, cost = entry.cost - cut, rev = entry.rev + 1, late = entry.late,
    body = entry.body, meta = entry.meta, old = not entry.latest and entry.seq or entry.old }, body[3])
end

local function draw(op, booked)
  local cell = load(op[2])
  local hold = hold_of(cell, op[9])
  if not hold or hold[6] >= 0 or hold[5] <= now then
    shrink(booked, op)
    return true
  end
  if hold[3] > 0 or hold[4] > 0 then
    local cost = math.min(hold[3], math.max(0, op[6] or 0))
    local tokens = math.min(hold[4], op[7][4] + op[7][5])
    hold_more(cell, hold, -cost, -tokens)
    hold[3], hold[4] = hold[3] - cost, hold[4] - tokens
    keep_hold(cell, op[9], hold)
  end
  return false
end

local function record(op)
  local customer, day, cost, amounts = op[2], op[4], op[6], op[7]
  if day <= pruned then return { 4, pruned } end
  if tombs then
    local labels = call('HGET', P .. 'tombs', redis.sha1hex(ARGV[1] .. '\0' .. customer))
    labels = labels and unpacked(labels) or {}
    for i = 1, #labels, 2 do
      if op[5] <= labels[i + 1] then
        customer = labels[i]
        break
      end
    end
  end
  local booked = load(customer)
  local first = find(booked, op[3])
  if first then
    local body = cjson.decode(first.body)
    local same = first.cost == cost and body[4] == amounts[4] and body[5] == amounts[5]
    return { 3, 0, first.cost, first.day, first.late and 1 or 0, (same or body[8] == 'presumed') and 0 or 1 }
  end
  local totals = booked.s[TOTALS]
  local spent, tokens = (totals[3] or 0) + amounts[3], (totals[4] or 0) + (totals[5] or 0) + amounts[4] + amounts[5]
  if spent > MAX or spent < -MAX or tokens > MAX then
    overflow = customer
    return
  end
  local late = op[9] and draw(op, booked) or false
  keep(booked)
  booked.s[LAST] = now
  add(booked, op[8], day, amounts, op[5])
  append(booked, op[3], { day = day, cost = cost, rev = 1, late = late, body = ARGV[op[10]],
    meta = op[11] > 0 and ARGV[op[11]] }, op[5])
  return { 3, 1, cost, day, late and 1 or 0, 0 }
end

local function standing(op)
  reading = true
  local _, used, held, windows = evaluate(load(op[2]), op[4], op[3], 0, 0, 0, false)
  return { 0, now, used, held, windows }
end

local function many(command, key, values) -- Lua hands over at most some 8,000 at once
  for at = 1, #values, 4000 do call(command, key, unpack(values, at, math.min(at + 3999, #values))) end
end

-- the batch -----------------------------------------------------------------------------------------------------

local reply = { first_seq, 0 }
local does = { [0] = admit, record, release, renew, standing }
for at, op in ipairs(cjson.decode(ARGV[5])) do
  local answer = does[op[1]](op)
  if overflow then return redis.error_reply('OVERFLOW ' .. overflow) end
  reply[at + 2] = answer
end
reply[2] = seq
if reading then return reply end

local fields, opened, unsorted = {}, {}, {}
local function set(field, value)
  fields[#fields + 1] = field
  fields[#fields + 1] = value
end

local function turn_over() -- what ended before the last turn is nobody's answer any more when a new one comes
  if now >= turned + TURN then
    turn, turned = 1 - turn, now
    call('UNLINK', P .. 'a' .. turn)
    set('turn', turn)
    set('turned', now)
  end
end

local function store(cell)
  local s = cell.s
  call('SET', P .. 'c:' .. cell.customer, pack(s))
  if everyone and cell.soonest ~= s[SOONEST] then
    if s[SOONEST] > 0 then
      call('ZADD', P .. 'soonest', s[SOONEST], s[NUM])
    else
      call('ZREM', P .. 'soonest', s[NUM])
    end
  end
end

for _, cell in ipairs(order) do
  local s = cell.s
  local num = s[NUM]
  if cell.save and num > 0 then
    if cell.born then call('HSET', P .. 'names', num, cell.customer) end
    if cell.changed then
      local h, made = P .. 'h:' .. num, {}
      for id in pairs(cell.changed) do
        local hold = cell.holds[id]
        if hold[6] >= 0 and hold[6] ~= hold[5] then
          turn_over()
          call('HDEL', h, id)
          call('HSET', P .. 'a' .. turn, num .. ':' .. id, pack({ hold[6], hold[7] }))
        else
          made[#made + 1] = id
          made[#made + 1] = pack(hold)
        end
      end
      if made[1] then many('HSET', h, made) end
    end
    for key, sums in pairs(cell.rows or {}) do call('HSET', P .. 's:' .. num, key, pack(sums)) end
    for _, day in ipairs(cell.days or {}) do
      if call('SADD', P .. 'd:' .. day, num) == 1 then
        s[DAYS] = s[DAYS] + 1
        call('ZADD', P .. 'days', day, day)
      end
    end
    if cell.seen and s[QUEUED] == 0 then
      s[QUEUED] = 1
      unsorted[#unsorted + 1] = num
    end
    if cell.open and s[OPENED] == 0 then
      s[OPENED] = 1
      opened[#opened + 1] = num
    end
    store(cell)
  end
end

local function keep_together(letter, rows)
  for _, row in pairs(rows) do
    local key = P .. letter .. row.at
    local raw = call('HGET', key, row.model)
    local sums = raw and unpacked(raw) or {}
    for i = 1, #row do sums[i] = (sums[i] or 0) + row[i] end
    call('HSET', key, row.model, pack(sums))
    if not raw and letter == 't:' then call('ZADD', P .. 'hours', row.at, row.at) end
  end
end

keep_together('g:', days)
keep_together('t:', hours)
for _, entry in ipairs(log) do
  if entry.old then call('XDEL', P .. 'log', entry.old) end
  if not entry.dropped then
    call('XADD', P .. 'log', string.format('%.0f-0', entry.seq), 'c', entry.num, 'd', entry.day, 'x', entry.cost or '',
      'r', entry.rev, 'l', entry.late and 1 or 0, 't', entry.latest, 'e', entry.body)
    call('ZADD', P .. 'e:' .. entry.num, entry.seq, entry.id)
    if entry.meta then call('HSET', P .. 'z:' .. entry.num, entry.id, entry.meta) end
  end
end
if opened[1] then many('SADD', P .. 'open', opened) end
if unsorted[1] then
  many('SADD', P .. 'unsorted', unsorted)
  if call('SCARD', P .. 'unsorted') > MAX_UNSORTED then
    for _, num in ipairs(call('SPOP', P .. 'unsorted', math.min(#unsorted + 1, 600))) do sort_in(num) end
  end
end
if now >= tonumber(head[10]) then -- once an hour, in steps: holds that nobody ended, customers that have none
  local found = call('SSCAN', P .. 'open', head[11], 'COUNT', 32)
  for _, num in ipairs(found[2]) do
    local cell, rows = load(call('HGET', P .. 'names', num)), call('HGETALL', P .. 'h:' .. num)
    expire(cell)
    for i = 1, #rows, 2 do
      if unpacked(rows[i + 1])[5] + SIX_DAYS <= now then call('HDEL', P .. 'h:' .. num, rows[i]) end
    end
    if call('EXISTS', P .. 'h:' .. num) == 0 then
      call('SREM', P .. 'open', num)
      cell.s[OPENED] = 0
    end
    store(cell)
  end
  for _, hour in ipairs(call('ZRANGEBYSCORE', P .. 'hours', '-inf', math.floor(now / HOUR) - HOURS_KEPT - 1)) do
    call('UNLINK', P .. 't:' .. hour)
    call('ZREM', P .. 'hours', hour)
  end
  set('sweep', found[1])
  if found[1] == '0' then set('sweep_at', now + HOUR) end
end
if everyone then
  call('SET', P .. 'wide', pack(everyone))
  if head[6] ~= '1' then set('wide', 1) end
end
if seq ~= first_seq then
  set('seq', seq)
  set('latest', latest)
end
if born ~= first_born then set('born', born) end
if fields[1] then call('HSET', KEYS[1], unpack(fields)) end
return reply
