-- What is told of an item of the log: place, number, identifier, cost, revision, late, latest end, body, metadata.
local function place(id) return tonumber(string.sub(id, 1, -3)) end

local function entry_of(item)
  local f = item[2]
  return { place(item[1]), f[2], call('HGET', P .. 'names', f[2]), f[6], f[8], f[10], f[12], f[14],
    call('HGET', P .. 'z:' .. f[2], cjson.decode(f[14])[1]) }
end

