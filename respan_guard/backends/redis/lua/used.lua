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
    local raw = not cell.born and call('HGET', P .. 's:' .. cell.n, key)
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
  local models = sums[at]
  if not models then
    models = {}
    sums[at] = models
  end
  local found = models[model]
  if not found then
    found = { key = at .. ':' .. model }
    models[model] = found
  end
  return found
end

local function add(cell, model, day, amounts, at)
  local of_day, of_hour = together(days, day, model), together(hours, math.floor(at / HOUR), model)
  local totals, row = cell.s[TOTALS], row_of(cell, of_day.key, day)
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
  for day, models in pairs(days) do
    if day >= first and day < last then
      for its, row in pairs(models) do
        if not model or its == model then sum = sum + measure(metric, row) end
      end
    end
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

