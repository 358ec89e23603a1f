-- What every script begins with. KEYS[1] is PREFIX .. 'meta'; all other keys of the shard have the same prefix, and
-- with it the same hash slot. ARGV[1] is the epoch of the store that the caller opened.
--
-- Fixed keys                          Keys of a customer, by its number ("c:" by its identifier)
--   meta       epoch, seq, ...          c:ID  state, packed: see NUM..LIVE below
--   names      number -> identifier     p:N   params, JSON
--   log        the stream of entries    h:N   admission -> hold: day, model, cost, tokens, expires, ended or -1, answer
--   a0, a1     answers of admissions    s:N   "DAY:MODEL" -> sums, packed
--              that ended lately        b:N   "DAY:MODEL" -> sums of pruned entries, packed
--                                       e:N   entry -> place in the log
--   open       who may have holds       z:N   entry -> metadata, JSON
--   unsorted   whose by-* are old     Keys of a day: d:DAY numbers of the customers active on it,
--   by-*       customers by sort key        g:DAY "FIELD:MODEL" -> sum of all customers
--   days       days that have a d:
--   wide, soonest: for limits that span customers; tombs, cursors, facts, audit, audits, refused, refusals
local call, pack, unpacked = redis.call, cmsgpack.pack, cmsgpack.unpack
local P = string.sub(KEYS[1], 1, -5)
-- The state of a customer, packed. RECENT are its newest rows of sums, which s:N may have older: a flat list of
-- "DAY:MODEL", sums. QUEUED: it is in unsorted. OPENED: it is in open.
local NUM, REVISION, FIRST, LAST, SOONEST, DAYS, NAME, TOTALS, RATES, SPANS, LIVE, RECENT, QUEUED, OPENED =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14

local function state_of(num)
  local customer = call('HGET', P .. 'names', num)
  local raw = customer and call('GET', P .. 'c:' .. customer)
  return customer, raw and unpacked(raw)
end

local function sums_of(s)
  local found, rows, recent = {}, call('HGETALL', P .. 's:' .. s[NUM]), s[RECENT]
  for i = 1, #rows, 2 do found[rows[i]] = unpacked(rows[i + 1]) end
  for i = 1, #recent, 2 do found[recent[i]] = recent[i + 1] end
  return found
end

local function day_and_model(key)
  local colon = string.find(key, ':', 1, true)
  return tonumber(string.sub(key, 1, colon - 1)), string.sub(key, colon + 1)
end

local function sort_in(num)
  local customer, s = state_of(num)
  if s then
    s[QUEUED] = 0
    call('SET', P .. 'c:' .. customer, pack(s))
    local t = s[TOTALS]
    call('ZADD', P .. 'by-customer', 0, customer)
    call('ZADD', P .. 'by-name', 0, s[NAME] .. '\0' .. customer)
    call('ZADD', P .. 'by-first_seen', s[FIRST], customer)
    call('ZADD', P .. 'by-last_seen', s[LAST], customer)
    call('ZADD', P .. 'by-requests', t[1] or 0, customer)
    call('ZADD', P .. 'by-calls', t[2] or 0, customer)
    call('ZADD', P .. 'by-cost', t[3] or 0, customer)
    call('ZADD', P .. 'by-tokens', (t[4] or 0) + (t[5] or 0), customer)
  end
end
