-- `pruned_ms`: the greatest `at_ms` of an entry that was pruned. The sums of later hours are those of the entries.
INSERT INTO meta (key, value)
    SELECT 'pruned_ms', CASE WHEN CAST(value AS INTEGER) < 0 THEN -1
        ELSE coalesce((SELECT max(hour) * 3600000 FROM hours), -1) END
    FROM meta WHERE key = 'pruned_to';
