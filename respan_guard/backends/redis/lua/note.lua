-- One more row of the audit. Its place is a count, or a time where the log's places are times.
local function note(customer, at, timed, row)
  local place = tonumber(call('HGET', KEYS[1], 'audited')) + 1
  if timed then
    local time = call('TIME')
    place = math.max(place, math.floor(time[1] * 256000 + time[2] * 0.256))
  end
  call('HSET', KEYS[1], 'audited', place)
  call('HSET', P .. 'audit', place, string.format('%.0f %s', at, row))
  call('ZADD', P .. 'audits', place, place)
  call('ZADD', P .. 'u:' .. customer, place, place)
end
