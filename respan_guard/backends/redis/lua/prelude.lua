-- What every script begins with. KEYS[1] is PREFIX .. 'meta'; all other keys of the shard have the same prefix, and
-- with it the same hash slot. ARGV[1] is the epoch of the store that the caller opened.
--
-- Fixed keys                          Keys of a customer, by its number ("c:" and others by its identifier)
--   meta       epoch, seq, ...          c:ID  state, packed: see NUM..HELD_FROM below
--   names      number -> identifier     p:N   params, JSON
--   log        the stream of entries    h:N   admission -> hold: day, model, cost, tokens, expires, ended or -1, answer
--   a0, a1     answers of admissions    s:N   "DAY:MODEL" -> sums, packed
--              that ended lately        b:N   "DAY:MODEL" -> sums of pruned entries, packed
--   open       who may have holds       e:N   entry -> place in the log
--   unsorted   whose by-* are old       z:N   entry -> metadata, JSON
--   by-*       customers by sort key    r:ID  its rows of refused, u:ID  places of its rows of the audit
--   blocked    customers that are     Keys of a time, over all customers
--   cursors    reader -> place          d:DAY numbers of the customers that were active, days: which there are
--   refused    refusals by minute       g:DAY model -> sums, packed
--   refusals   their counts             t:HOUR model -> sums, packed, hours: which there are
--   audit      place -> row             f:HOUR reason -> refusals, refused-hours: which there are
--   audits     places by place        k:SPACE key -> fact, o:SPACE its keys in order
--   tombs      hash of an identifier -> label, time, ...
--   wide, soonest: what live holds hold together, and by when it may be less; from the first limit on that asks
local call, pack, unpacked = redis.call, cmsgpack.pack, cmsgpack.unpack
local P = string.sub(KEYS[1], 1, -5)
-- The state of a customer, packed. RECENT are its newest rows of sums, which s:N may have older: a flat list of
-- "DAY:MODEL", sums. QUEUED: it is in unsorted. OPENED: it is in open. LIVE is what holds hold, right from HELD_FROM on
-- (nil: ever) until SOONEST (0: ever).
local NUM, REVISION, FIRST, LAST, SOONEST, DAYS, NAME, TOTALS, RATES, SPANS, LIVE, RECENT, QUEUED, OPENED, HELD_FROM =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15

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
