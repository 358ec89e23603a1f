-- A page of customers. ARGV: epoch, sort key, "1" for descending, score of the last row of the page before ("" for the
-- first page), its member, length. Answers how many are still to be sorted in (the page is right when none is), the rows.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
local key, descending, score, member, limit = P .. 'by-' .. ARGV[2], ARGV[3] == '1', tonumber(ARGV[4]), ARGV[5], ARGV[6]
for _, num in ipairs(call('SPOP', P .. 'unsorted', 500)) do sort_in(num) end
local waiting = call('SCARD', P .. 'unsorted')

local function before(a, b) -- Lua's own order of strings is the machine's language's
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local low, high = 0, call('ZCARD', key)
local count = high
if score then -- how many stand before (descending: up to) the row that the last page ended with
  while low < high do
    local middle = math.floor((low + high) / 2)
    local at = call('ZRANGE', key, middle, middle, 'WITHSCORES')
    local its = tonumber(at[2])
    local earlier = its < score or its == score and (before(at[1], member) or not descending and at[1] == member)
    if earlier then low = middle + 1 else high = middle end
  end
  count = low
end
local first, last = score and low or 0, -1
if descending then
  first, last = math.max(0, count - limit), count - 1
else
  last = first + limit - 1
end
local rows = {}
if last >= first then
  local members = call(descending and 'ZREVRANGE' or 'ZRANGE', key,
    descending and call('ZCARD', key) - 1 - last or first, descending and call('ZCARD', key) - 1 - first or last)
  for _, found in ipairs(members) do
    if ARGV[2] == 'name' then found = string.sub(found, string.find(found, '%z[^%z]*$') + 1) end
    rows[#rows + 1] = row_of(found)
  end
end
return { waiting, rows }
