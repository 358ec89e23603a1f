-- What pages show without reading customers or entries: totals over all customers by local day and by UTC hour, the
-- number of customers of each day, refusals by hour. And how long calls took.

ALTER TABLE customers ADD COLUMN latency_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE customers ADD COLUMN timed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE customers ADD COLUMN ttft_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE customers ADD COLUMN ttft_calls INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollups ADD COLUMN latency_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollups ADD COLUMN timed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollups ADD COLUMN ttft_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rollups ADD COLUMN ttft_calls INTEGER NOT NULL DEFAULT 0;
ALTER TABLE pruned ADD COLUMN latency_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE pruned ADD COLUMN timed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE pruned ADD COLUMN ttft_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE pruned ADD COLUMN ttft_calls INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN latency_ms INTEGER;
ALTER TABLE entries ADD COLUMN ttft_ms INTEGER;

UPDATE entries SET latency_ms = json_extract(body, '$.latency_ms');
UPDATE rollups SET (latency_ms, timed) = (found.latency_ms, found.timed)
    FROM (SELECT c, day, model, sum(latency_ms) AS latency_ms, count(*) AS timed
        FROM entries WHERE latency_ms IS NOT NULL GROUP BY c, day, model) AS found
    WHERE (rollups.c, rollups.day, rollups.model) = (found.c, found.day, found.model);
UPDATE customers SET (latency_ms, timed) = (found.latency_ms, found.timed)
    FROM (SELECT c, sum(latency_ms) AS latency_ms, sum(timed) AS timed FROM rollups GROUP BY c) AS found
    WHERE customers.c = found.c;

ALTER TABLE customers ADD COLUMN blocked INTEGER NOT NULL DEFAULT 0;
UPDATE customers SET blocked = 1 WHERE json_extract(params, '$.blocked');
CREATE INDEX customers_blocked ON customers (customer) WHERE blocked;

CREATE TABLE days (
    day INTEGER NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cache_read_tokens INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    latency_ms INTEGER NOT NULL,
    timed INTEGER NOT NULL,
    ttft_ms INTEGER NOT NULL,
    ttft_calls INTEGER NOT NULL,
    PRIMARY KEY (day, model)
) STRICT, WITHOUT ROWID;
INSERT INTO days
    SELECT day, model, sum(requests), sum(calls), sum(cost), sum(input_tokens), sum(output_tokens),
        sum(cache_read_tokens), sum(unpriced), sum(errors), sum(latency_ms), sum(timed), 0, 0
    FROM rollups GROUP BY day, model;

CREATE TABLE active (
    day INTEGER PRIMARY KEY,
    customers INTEGER NOT NULL
) STRICT;
INSERT INTO active SELECT day, count(DISTINCT c) FROM rollups GROUP BY day;

-- By the UTC hour that a call ended in; requests by the one they were admitted in. Those of two months are kept.
CREATE TABLE hours (
    hour INTEGER NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cache_read_tokens INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    latency_ms INTEGER NOT NULL,
    timed INTEGER NOT NULL,
    ttft_ms INTEGER NOT NULL,
    ttft_calls INTEGER NOT NULL,
    PRIMARY KEY (hour, model)
) STRICT, WITHOUT ROWID;
INSERT INTO hours
    SELECT at_ms / 3600000, model, 0, sum(kind <> 'adjustment'), sum(coalesce(cost, 0)), sum(input_tokens),
        sum(output_tokens), sum(cache_read_tokens), sum(cost IS NULL), sum(status = 'error'),
        coalesce(sum(latency_ms), 0), count(latency_ms), 0, 0
    FROM entries GROUP BY 1, 2;

CREATE TABLE refusal_hours (
    hour INTEGER NOT NULL,
    reason TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (hour, reason)
) STRICT, WITHOUT ROWID;
INSERT INTO refusal_hours SELECT minute / 60, reason, sum(count) FROM refusals GROUP BY 1, 2;
