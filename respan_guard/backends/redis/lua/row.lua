-- What is shown of a customer: identifier, revision, params, first and last seen, active days, sums.
local function row_of(customer)
  local raw = call('GET', P .. 'c:' .. customer)
  if not raw then return false end
  local s = unpacked(raw)
  local params = call('GET', P .. 'p:' .. s[NUM])
  return { customer, s[REVISION], params, s[FIRST], s[LAST], s[DAYS], s[TOTALS], s[NUM] }
end
