-- entries ------------------------------------------------------------------------------------------------------

local function find(cell, id)
  local entry = cell.entries and cell.entries[id]
  if entry or cell.s[NUM] == 0 or cell.born then return entry end
  local place = call('ZSCORE', P .. 'e:' .. cell.n, id)
  if not place then return nil end
  local row = call('XRANGE', P .. 'log', place, place)[1][2]
  return { seq = tonumber(place), day = tonumber(row[4]), cost = tonumber(row[6]) or false, rev = tonumber(row[8]),
    late = row[10] == '1', body = row[14] }
end

local function append(cell, id, entry, at)
  seq = math.max(seq + 1, ticks)
  latest = math.max(latest, at)
  entry.seq, entry.latest, entry.num, entry.id = seq, latest, cell.n, id
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
    expire(cell)
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
        customer, op[11] = labels[i], 0 -- what an app noted on it may say who that was
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
  local _, used, held, windows = evaluate(load(op[2]), policies[op[4]], op[3], 0, 0, 0, false)
  return { 0, now, used, held, windows }
end

