-- Close days. ARGV: epoch, last day to close. Answers the last closed day, where pruning goes on, the log's end.
if call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('RESET') end
if tonumber(ARGV[2]) > tonumber(call('HGET', KEYS[1], 'pruned')) then
  call('HSET', KEYS[1], 'pruned', ARGV[2], 'prune_at', 0)
end
return call('HMGET', KEYS[1], 'pruned', 'prune_at', 'seq')
