-- Make the shard's store, or find it. ARGV: epoch to give a new one, schema. Answers epoch, schema.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'schema', ARGV[2], 'seq', 0, 'latest', 0, 'pruned', -1, 'tombs', 0,
    'wide', 0, 'born', 0, 'turned', 0, 'turn', 0, 'sweep_at', 0, 'sweep', 0, 'audited', 0, 'moved', 0, 'prune_at', 0,
    'pruned_ms', -1)
end
redis.call('TIME') -- nothing is done with it here: a user who may not ask for it is refused at start
return redis.call('HMGET', KEYS[1], 'epoch', 'schema')
