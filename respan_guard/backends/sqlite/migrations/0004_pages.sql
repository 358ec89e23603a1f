-- Who ever got money back: only of these can a range's sum be more than the sum of all time, see `tops.py`.
ALTER TABLE customers ADD COLUMN credited INTEGER NOT NULL DEFAULT 0;
UPDATE customers SET credited = 1
    WHERE c IN (SELECT c FROM entries WHERE cost < 0) OR c IN (SELECT c FROM pruned);
CREATE INDEX customers_credited ON customers (c) WHERE credited;

-- Failed calls are few; and a search reads an index from end to end, and no customer.
CREATE INDEX entries_errors ON entries (seq) WHERE status = 'error';
CREATE INDEX customers_by_search ON customers (search);
