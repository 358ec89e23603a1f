-- A batch of operations: everything is decided on copies first and written last, so a batch that can't be applied
-- leaves nothing behind. ARGV: epoch, latest time known, "1" to read the server's clock, "1" for a log whose places
-- are times, as JSON a list of lists of limits and behind it the operations, texts they refer to.
local function many(command, key, values) -- Lua hands over at most some 8,000 at once
  for at = 1, #values, 4000 do call(command, key, unpack(values, at, math.min(at + 3999, #values))) end
end

-- the batch -----------------------------------------------------------------------------------------------------

local reply = { first_seq, 0 }
local does = { [0] = admit, record, release, renew, standing }
for at = 2, #given do
  local op = given[at]
  local answer = does[op[1]](op)
  if overflow then return redis.error_reply('OVERFLOW ' .. overflow) end
  reply[at + 1] = answer
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
    cell.soonest = s[SOONEST]
  end
end

for _, cell in ipairs(order) do
  local s = cell.s
  local num = cell.n
  if cell.save and num then
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
  for at, models in pairs(rows) do
    local key = P .. letter .. at
    for model, row in pairs(models) do
      local raw = call('HGET', key, model)
      local sums = raw and unpacked(raw) or {}
      for i = 1, #row do sums[i] = (sums[i] or 0) + row[i] end
      call('HSET', key, model, pack(sums))
      if not raw and letter == 't:' then call('ZADD', P .. 'hours', at, at) end
    end
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
      cell.s[OPENED], cell.s[SOONEST] = 0, 0 -- the first limit over all customers looks at none that is not in open
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
if unsorted[1] then -- behind all that stores customers, as it changes them in the store
  many('SADD', P .. 'unsorted', unsorted)
  if call('SCARD', P .. 'unsorted') > MAX_UNSORTED then
    for _, num in ipairs(call('SPOP', P .. 'unsorted', math.min(#unsorted + 1, 600))) do sort_in(num) end
  end
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
