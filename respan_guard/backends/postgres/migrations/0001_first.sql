-- Money is nano-USD, time is milliseconds UTC, a day is the ordinal of a local date. Texts compare byte by byte, which
-- is by code point. A customer is referred to by its row (`c`): deleting one renames that row, whatever it has spent.

-- One row. Who books entries locks it last and until the commit: so places in the log are given in order of commit,
-- without gaps. `pruned_to`: entries of days up to it may be gone. `latest_ms` is the greatest `at_ms` of the log.
CREATE TABLE {schema}.store (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch text NOT NULL,
    version integer NOT NULL,
    seq bigint NOT NULL DEFAULT 0,
    latest_ms bigint NOT NULL DEFAULT 0,
    pruned_to integer NOT NULL DEFAULT -1
) WITH (fillfactor = 10);
INSERT INTO {schema}.store (epoch, version) VALUES (replace(gen_random_uuid()::text, '-', ''), 0);

-- Beside what pages show, a row keeps what every admission asks for, so that one row answers:
-- `rates`: of each width four numbers: width, start, hits in the window before, hits in the current one.
-- `span_cost`: the cost of the days `span_first` to `span_end`, of the budget that was asked for last.
-- `held_cost`, `held_tokens`: what live holds hold; right from `held_from_ms` on, until the first of them expires
-- (`held_until_ms`, or earlier than needed); their days lie within `held_first` and `held_last`.
CREATE TABLE {schema}.customers (
    c bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text COLLATE "C" NOT NULL UNIQUE,
    revision text NOT NULL DEFAULT '',
    params text,
    name text COLLATE "C" NOT NULL DEFAULT '',
    search text COLLATE "C" NOT NULL,
    blocked boolean NOT NULL DEFAULT false,
    first_seen bigint NOT NULL,
    last_seen bigint NOT NULL,
    active_days integer NOT NULL DEFAULT 0,
    requests bigint NOT NULL DEFAULT 0 CHECK (requests BETWEEN 0 AND 9000000000000000),
    calls bigint NOT NULL DEFAULT 0 CHECK (calls BETWEEN 0 AND 9000000000000000),
    cost bigint NOT NULL DEFAULT 0 CHECK (cost BETWEEN -9000000000000000 AND 9000000000000000),
    input_tokens bigint NOT NULL DEFAULT 0 CHECK (input_tokens BETWEEN 0 AND 9000000000000000),
    output_tokens bigint NOT NULL DEFAULT 0 CHECK (output_tokens BETWEEN 0 AND 9000000000000000),
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    unpriced bigint NOT NULL DEFAULT 0,
    errors bigint NOT NULL DEFAULT 0,
    latency_ms bigint NOT NULL DEFAULT 0,
    timed bigint NOT NULL DEFAULT 0,
    ttft_ms bigint NOT NULL DEFAULT 0,
    ttft_calls bigint NOT NULL DEFAULT 0,
    tokens bigint GENERATED ALWAYS AS (input_tokens + output_tokens) STORED,
    rates bigint[] NOT NULL DEFAULT '{}',
    span_first integer NOT NULL DEFAULT 0,
    span_end integer NOT NULL DEFAULT 0,
    span_cost bigint NOT NULL DEFAULT 0,
    held_cost bigint NOT NULL DEFAULT 0 CHECK (held_cost >= 0),
    held_tokens bigint NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
    held_first integer NOT NULL DEFAULT 2147483647,
    held_last integer NOT NULL DEFAULT 0,
    held_from_ms bigint NOT NULL DEFAULT 0,
    held_until_ms bigint NOT NULL DEFAULT 9223372036854775807
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);

-- One per sort key of the customers page. `last_seen`, `requests`, `calls`, `cost` and `tokens` move with every
-- batch that has the customer in it.
CREATE INDEX customers_by_name ON {schema}.customers (name, customer);
CREATE INDEX customers_by_first_seen ON {schema}.customers (first_seen, customer);
CREATE INDEX customers_by_last_seen ON {schema}.customers (last_seen, customer);
CREATE INDEX customers_by_requests ON {schema}.customers (requests, customer);
CREATE INDEX customers_by_calls ON {schema}.customers (calls, customer);
CREATE INDEX customers_by_cost ON {schema}.customers (cost, customer);
CREATE INDEX customers_by_tokens ON {schema}.customers (tokens, customer);
CREATE INDEX customers_blocked ON {schema}.customers (customer) WHERE blocked;

-- One row for each admission. What ended a minute ago and holds nothing is swept away; an expired one stays for some
-- days, with what it never spent. `answer` is given again to who asks again.
CREATE TABLE {schema}.holds (
    c bigint NOT NULL,
    id text COLLATE "C" NOT NULL,
    day integer NOT NULL,
    model text COLLATE "C" NOT NULL,
    cost bigint NOT NULL CHECK (cost >= 0),
    tokens bigint NOT NULL CHECK (tokens >= 0),
    expires_ms bigint NOT NULL,
    ended_ms bigint,
    answer text NOT NULL,
    PRIMARY KEY (c, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);
CREATE INDEX holds_ended ON {schema}.holds (ended_ms) WHERE ended_ms IS NOT NULL;

CREATE TABLE {schema}.rollups (
    c bigint NOT NULL,
    day integer NOT NULL,
    model text COLLATE "C" NOT NULL,
    requests bigint NOT NULL,
    calls bigint NOT NULL,
    cost bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    unpriced bigint NOT NULL,
    errors bigint NOT NULL,
    latency_ms bigint NOT NULL,
    timed bigint NOT NULL,
    ttft_ms bigint NOT NULL,
    ttft_calls bigint NOT NULL,
    PRIMARY KEY (c, day, model)
) WITH (fillfactor = 70);
-- As in `entries_by_customer`: an expression, so that no plan ever takes this index where the key has it all.
CREATE INDEX rollups_by_day ON {schema}.rollups ((day + 0));

-- What pruned entries had added to `rollups`.
CREATE TABLE {schema}.pruned (
    c bigint NOT NULL,
    day integer NOT NULL,
    model text COLLATE "C" NOT NULL,
    calls bigint NOT NULL,
    cost bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    unpriced bigint NOT NULL,
    errors bigint NOT NULL,
    latency_ms bigint NOT NULL,
    timed bigint NOT NULL,
    ttft_ms bigint NOT NULL,
    ttft_calls bigint NOT NULL,
    PRIMARY KEY (c, day, model)
);

-- Sums over all customers: by local day (unit 'd') and by UTC hour ('h', of two months). In parts, so that writers
-- seldom wait for each other: a row is the sum of its parts. `customers` counts those that are new on a day.
CREATE TABLE {schema}.totals (
    unit "char" NOT NULL,
    at integer NOT NULL,
    model text COLLATE "C" NOT NULL,
    part smallint NOT NULL,
    customers bigint NOT NULL,
    requests bigint NOT NULL,
    calls bigint NOT NULL,
    cost bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    unpriced bigint NOT NULL,
    errors bigint NOT NULL,
    latency_ms bigint NOT NULL,
    timed bigint NOT NULL,
    ttft_ms bigint NOT NULL,
    ttft_calls bigint NOT NULL,
    PRIMARY KEY (unit, at, model, part)
) WITH (fillfactor = 50);

-- The ledger and its log in one: `seq` is the place in the log, in order of commit, and a revised entry moves.
-- `latest_ms` is the greatest `at_ms` up to here: it never falls along the log, so a time is found by bisection.
CREATE TABLE {schema}.entries (
    seq bigint PRIMARY KEY,
    c bigint NOT NULL,
    id text COLLATE "C" NOT NULL,
    rev integer NOT NULL CHECK (rev > 0),
    day integer NOT NULL,
    at_ms bigint NOT NULL,
    latest_ms bigint NOT NULL,
    cost bigint CHECK (cost BETWEEN -9000000000000000 AND 9000000000000000),
    input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    cache_read_tokens bigint NOT NULL CHECK (cache_read_tokens >= 0),
    latency_ms bigint,
    ttft_ms bigint,
    late boolean NOT NULL,
    model text COLLATE "C" NOT NULL,
    admission text COLLATE "C",
    kind text NOT NULL,
    source text COLLATE "C" NOT NULL,
    provider text COLLATE "C",
    status text NOT NULL,
    trace_id text COLLATE "C",
    body text NOT NULL,
    UNIQUE (c, id)
);
-- An expression, so that who looks for (c, id) never gets a plan that reads all entries of c, however few there were
-- when it was made. Pages say `c + 0`, too.
CREATE INDEX entries_by_customer ON {schema}.entries ((c + 0), seq);
CREATE INDEX entries_by_day ON {schema}.entries (day);
CREATE INDEX entries_by_trace ON {schema}.entries (trace_id, seq) WHERE trace_id IS NOT NULL;
CREATE INDEX entries_unpriced ON {schema}.entries (seq) WHERE cost IS NULL;

CREATE TABLE {schema}.refusals (
    minute integer NOT NULL,
    customer text COLLATE "C" NOT NULL,
    reason text COLLATE "C" NOT NULL,
    count bigint NOT NULL CHECK (count > 0),
    PRIMARY KEY (minute, customer, reason)
);
CREATE INDEX refusals_by_customer ON {schema}.refusals (customer, minute);
CREATE TABLE {schema}.refusal_hours (
    hour integer NOT NULL,
    reason text COLLATE "C" NOT NULL,
    count bigint NOT NULL CHECK (count > 0),
    PRIMARY KEY (hour, reason)
) WITH (fillfactor = 50);

CREATE TABLE {schema}.audit (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at_ms bigint NOT NULL,
    customer text COLLATE "C" NOT NULL,
    action text NOT NULL,
    actor text NOT NULL,
    before text,
    after text
);
CREATE INDEX audit_by_customer ON {schema}.audit (customer, seq);

CREATE TABLE {schema}.cursors (
    name text COLLATE "C" PRIMARY KEY,
    seq bigint NOT NULL
) WITH (fillfactor = 50);

-- Who was deleted, as a keyed hash: enough to know late usage by, not to name anybody.
CREATE TABLE {schema}.tombs (
    hash text COLLATE "C" NOT NULL,
    c bigint NOT NULL,
    deleted_ms bigint NOT NULL,
    PRIMARY KEY (hash, c)
);

-- What others ask to be remembered under a name: leases, markers, switches.
CREATE TABLE {schema}.facts (
    space text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    value text NOT NULL,
    PRIMARY KEY (space, key)
);
