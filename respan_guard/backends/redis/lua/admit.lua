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

local given = cjson.decode(ARGV[5])
local policies = given[1] -- limits, which operations name by their place: many have the same

local function admit(op)
  local customer, id, model, requests, cost, tokens = op[2], op[3], op[8], op[9], op[10], op[11]
  local cell = load(customer)
  local s, hold = cell.s, hold_of(cell, id)
  if hold then
    if (hold[6] >= 0 and hold[6] or hold[5]) + REPLAY > now then return hold[7] end
  elseif s[NUM] > 0 and not cell.born then
    local field = cell.n .. ':' .. id
    local raw = call('HGET', P .. 'a' .. turn, field)
    if not raw and now < turned + REPLAY then raw = call('HGET', P .. 'a' .. 1 - turn, field) end
    if raw then
      local known = unpacked(raw)
      if known[1] + REPLAY > now then return known[2] end
    end
  end
  if s[REVISION] ~= op[4] or now < op[6] or now >= op[7] then
    return { 2, now, s[REVISION], s[NUM] > 0 and call('GET', P .. 'p:' .. cell.n) or false }
  end
  local fits, used, held, windows, reasons = evaluate(cell, policies[op[14]], model, requests, cost, tokens, op[13] == 1)
  if not fits then return { 1, now, used, held, windows, reasons } end
  keep(cell)
  if requests > 0 then
    s[LAST] = now
    local at = 0
    for _, limit in ipairs(policies[op[14]]) do
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
  expire(cell)
  if hold[5] <= now then
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
  expire(cell)
  hold[5] = math.max(hold[5], now + op[4])
  keep_hold(cell, op[3], hold)
  return { 5, 2 }
end

