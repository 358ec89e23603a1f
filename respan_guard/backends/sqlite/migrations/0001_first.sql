-- Money is nano-USD, time is milliseconds UTC, a day is the ordinal of a local date.
-- A customer is referred to by its row (`c`): deleting one renames that row, whatever it has spent.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- `pruned_to`: entries of days before it may be gone. `log_end`: the highest place ever given away, once pruning
-- could have taken the row that shows it.
INSERT INTO meta (key, value) VALUES ('epoch', lower(hex(randomblob(16)))), ('pruned_to', '-1'), ('log_end', '0');

CREATE TABLE customers (
    c INTEGER PRIMARY KEY,
    customer TEXT NOT NULL UNIQUE,
    revision TEXT NOT NULL DEFAULT '',
    params TEXT,
    name TEXT NOT NULL DEFAULT '',
    search TEXT NOT NULL,
    first_seen INTEGER NOT NULL,
    last_seen INTEGER NOT NULL,
    active_days INTEGER NOT NULL DEFAULT 0,
    requests INTEGER NOT NULL DEFAULT 0 CHECK (requests BETWEEN 0 AND 9000000000000000),
    calls INTEGER NOT NULL DEFAULT 0 CHECK (calls BETWEEN 0 AND 9000000000000000),
    cost INTEGER NOT NULL DEFAULT 0 CHECK (cost BETWEEN -9000000000000000 AND 9000000000000000),
    input_tokens INTEGER NOT NULL DEFAULT 0 CHECK (input_tokens BETWEEN 0 AND 9000000000000000),
    output_tokens INTEGER NOT NULL DEFAULT 0 CHECK (output_tokens BETWEEN 0 AND 9000000000000000),
    cache_read_tokens INTEGER NOT NULL DEFAULT 0,
    unpriced INTEGER NOT NULL DEFAULT 0,
    errors INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER GENERATED ALWAYS AS (input_tokens + output_tokens) VIRTUAL
) STRICT;

-- One per sort key of the customers page. `last_seen`, `requests`, `calls`, `cost` and `tokens` move with every
-- batch that has the customer in it.
CREATE INDEX customers_by_name ON customers (name, customer);
CREATE INDEX customers_by_first_seen ON customers (first_seen, customer);
CREATE INDEX customers_by_last_seen ON customers (last_seen, customer);
CREATE INDEX customers_by_requests ON customers (requests, customer);
CREATE INDEX customers_by_calls ON customers (calls, customer);
CREATE INDEX customers_by_cost ON customers (cost, customer);
CREATE INDEX customers_by_tokens ON customers (tokens, customer);

CREATE TABLE rates (
    c INTEGER NOT NULL,
    window_ms INTEGER NOT NULL CHECK (window_ms > 0),
    start_ms INTEGER NOT NULL,
    previous INTEGER NOT NULL CHECK (previous >= 0),
    current INTEGER NOT NULL CHECK (current >= 0),
    PRIMARY KEY (c, window_ms)
) STRICT, WITHOUT ROWID;

-- Live ones, and expired ones with what they never spent. Any other that ended moves to `ended`, so that a busy
-- customer's live ones are few to read.
CREATE TABLE holds (
    c INTEGER NOT NULL,
    id TEXT NOT NULL,
    day INTEGER NOT NULL,
    model TEXT NOT NULL,
    cost INTEGER NOT NULL CHECK (cost >= 0),
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    expires_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    answer TEXT NOT NULL,
    PRIMARY KEY (c, id)
) STRICT, WITHOUT ROWID;

-- Admissions that ended a moment ago, so that one sent again gets its first answer.
CREATE TABLE ended (
    c INTEGER NOT NULL,
    id TEXT NOT NULL,
    ended_ms INTEGER NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (c, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE rollups (
    c INTEGER NOT NULL,
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
    PRIMARY KEY (c, day, model)
) STRICT, WITHOUT ROWID;
CREATE INDEX rollups_by_day ON rollups (day);

-- What pruned entries had added to `rollups`.
CREATE TABLE pruned (
    c INTEGER NOT NULL,
    day INTEGER NOT NULL,
    model TEXT NOT NULL,
    calls INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cache_read_tokens INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    PRIMARY KEY (c, day, model)
) STRICT, WITHOUT ROWID;

-- The ledger and its log in one: `seq` is the place in the log, in order of commit, and a revised entry moves.
-- `latest_ms` is the greatest `at_ms` up to here: it never falls along the log, so a time is found by bisection.
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    c INTEGER NOT NULL,
    id TEXT NOT NULL,
    rev INTEGER NOT NULL CHECK (rev > 0),
    day INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    latest_ms INTEGER NOT NULL,
    cost INTEGER CHECK (cost BETWEEN -9000000000000000 AND 9000000000000000),
    input_tokens INTEGER NOT NULL CHECK (input_tokens >= 0),
    output_tokens INTEGER NOT NULL CHECK (output_tokens >= 0),
    cache_read_tokens INTEGER NOT NULL CHECK (cache_read_tokens >= 0),
    late INTEGER NOT NULL,
    model TEXT NOT NULL,
    admission TEXT,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    provider TEXT,
    status TEXT NOT NULL,
    trace_id TEXT,
    body TEXT NOT NULL,
    UNIQUE (c, id)
) STRICT;
CREATE INDEX entries_by_customer ON entries (c);
CREATE INDEX entries_by_day ON entries (day);
CREATE INDEX entries_by_trace ON entries (trace_id) WHERE trace_id IS NOT NULL;
CREATE INDEX entries_unpriced ON entries (seq) WHERE cost IS NULL;

CREATE TABLE refusals (
    minute INTEGER NOT NULL,
    customer TEXT NOT NULL,
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    PRIMARY KEY (minute, customer, reason)
) STRICT, WITHOUT ROWID;
CREATE INDEX refusals_by_customer ON refusals (customer, minute);

CREATE TABLE audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    customer TEXT NOT NULL,
    action TEXT NOT NULL,
    actor TEXT NOT NULL,
    before TEXT,
    after TEXT
) STRICT;
CREATE INDEX audit_by_customer ON audit (customer);

CREATE TABLE cursors (
    name TEXT PRIMARY KEY,
    seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Who was deleted, as a keyed hash: enough to know late usage by, not to name anybody.
CREATE TABLE tombs (
    hash TEXT NOT NULL,
    c INTEGER NOT NULL,
    deleted_ms INTEGER NOT NULL,
    PRIMARY KEY (hash, c)
) STRICT, WITHOUT ROWID;
