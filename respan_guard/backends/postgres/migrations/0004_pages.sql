-- Who ever got money back: only of these can a range's sum be more than the sum of all time, see `tops.py`. Entries are
-- never changed where they stand, so that an index of a few of them costs the others nothing.
CREATE INDEX entries_credits ON {schema}.entries (c) WHERE cost < 0;
CREATE INDEX pruned_credits ON {schema}.pruned (c) WHERE cost < 0;

-- Failed calls are few.
CREATE INDEX entries_errors ON {schema}.entries (seq) WHERE status = 'error';
