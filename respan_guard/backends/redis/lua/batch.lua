-- What a batch finds: the time, the store's state, and copies of customers that everything is decided on.
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
    if raw then cell.n = '' .. cell.s[NUM] end -- once: numbers are slow to write
    cells[customer] = cell
    order[#order + 1] = cell
  end
  return cell
end

local function keep(cell)
  if cell.s[NUM] == 0 then
    born = born + 1
    cell.s[NUM], cell.s[FIRST], cell.s[LAST], cell.born, cell.n = born, now, now, true, '' .. born
  end
  cell.save, cell.seen = true, true
end

local function hold_of(cell, id)
  local hold = cell.holds[id]
  if hold == nil then
    local raw = cell.s[NUM] > 0 and not cell.born and call('HGET', P .. 'h:' .. cell.n, id)
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

local function expire(cell) -- also takes back what expired by a clock that has stepped back since
  local s = cell.s
  if now >= (s[HELD_FROM] or 0) and (s[SOONEST] == 0 or s[SOONEST] > now) then return end
  if not cell.born then
    local rows = call('HGETALL', P .. 'h:' .. cell.n)
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
  s[LIVE], s[SOONEST], s[HELD_FROM], cell.save = live, soonest, now, true
end

local function held_of(live, metric, first, last, model)
  local held, at = 0, metric == 1 and 2 or 3
  for i = 1, #live, 4 do
    if live[i] >= first and live[i] < last and (not model or live[i + 1] == model) then held = held + live[i + at] end
  end
  return held
end

