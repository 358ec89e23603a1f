-- Customers in order of what they used, kept a little behind them. Their own row changes with every batch; with an index
-- on a sum, each change of the row would write into all of its indexes, as many as ten. Without one none is touched: the
-- new version of a row stays on its page. So who changed is noted, and put in order by whoever asks for the order, or
-- by the sweep.
--
-- Others go on meanwhile: what takes long comes first, and what they wait for comes last and waits for nobody for long.
SET LOCAL lock_timeout = '2s';

CREATE TABLE {schema}.ordered (
    c bigint NOT NULL,
    customer text COLLATE "C" NOT NULL,
    search text COLLATE "C" NOT NULL,
    blocked boolean NOT NULL,
    last_seen bigint NOT NULL,
    requests bigint NOT NULL,
    calls bigint NOT NULL,
    cost bigint NOT NULL,
    tokens bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);
INSERT INTO {schema}.ordered SELECT k.c, k.customer, k.search, k.blocked, k.last_seen, k.requests, k.calls, k.cost,
        k.tokens FROM {schema}.customers k;
ALTER TABLE {schema}.ordered ADD PRIMARY KEY (c);
CREATE INDEX ordered_by_last_seen ON {schema}.ordered (last_seen, customer);
CREATE INDEX ordered_by_requests ON {schema}.ordered (requests, customer);
CREATE INDEX ordered_by_calls ON {schema}.ordered (calls, customer);
CREATE INDEX ordered_by_cost ON {schema}.ordered (cost, customer);
CREATE INDEX ordered_by_tokens ON {schema}.ordered (tokens, customer);

-- Who changed since: appended to by every batch, in its transaction, and emptied by `put_in_order`.
CREATE TABLE {schema}.moved (c bigint NOT NULL) WITH (autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0);

-- With its owner's rights, as put_in_order: batches of who was granted rights on the tables of before go on.
CREATE FUNCTION {schema}.note_moved() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $note$
BEGIN
    INSERT INTO {schema}.moved SELECT n.c FROM now_so n;
    RETURN NULL;
END
$note$;

-- Put some of those who changed in their places; whether that were all. One at a time: of two, the one that saw less might
-- write last. A batch that is not committed yet is not seen, and what it noted stays for the next one. No plan may read
-- everybody, also not one that was made when they were few.
CREATE FUNCTION {schema}.put_in_order() RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $order$
DECLARE
    c_most CONSTANT integer := 2000;
    gone bigint[];
BEGIN
    IF NOT EXISTS (SELECT 1 FROM {schema}.moved) THEN
        RETURN true;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('{schema}', 2));
    WITH taken AS (
        DELETE FROM {schema}.moved m WHERE m.ctid = ANY (ARRAY(SELECT n.ctid FROM {schema}.moved n LIMIT c_most))
            RETURNING m.c
    )
    SELECT array_agg(t.c) INTO gone FROM taken t;
    DELETE FROM {schema}.ordered o
        WHERE o.c = ANY (gone) AND NOT EXISTS (SELECT 1 FROM {schema}.customers k WHERE k.c = o.c);
    INSERT INTO {schema}.ordered AS o (c, customer, search, blocked, last_seen, requests, calls, cost, tokens)
        SELECT k.c, k.customer, k.search, k.blocked, k.last_seen, k.requests, k.calls, k.cost, k.tokens
        FROM (SELECT DISTINCT g.c FROM unnest(gone) AS g (c)) AS g JOIN {schema}.customers k ON k.c = g.c
        ON CONFLICT (c) DO UPDATE SET customer = excluded.customer, search = excluded.search, blocked = excluded.blocked,
            last_seen = excluded.last_seen, requests = excluded.requests, calls = excluded.calls, cost = excluded.cost,
            tokens = excluded.tokens;
    RETURN coalesce(cardinality(gone), 0) < c_most;
END
$order$;

-- Who is about to be forgotten: what takes long goes before, some of it at a time, so that nobody waits for it. From the
-- entry behind `p_after` on; the last one that was looked at, NULL at their end. What an app put into a record's metadata may
-- say who the customer was.
CREATE FUNCTION {schema}.strip(p_customer text, p_after bigint, p_most integer) RETURNS bigint
LANGUAGE plpgsql
AS $strip$
DECLARE
    row_c bigint;
    places bigint[];
BEGIN
    SELECT k.c INTO row_c FROM {schema}.customers k WHERE k.customer = p_customer;
    SELECT array_agg(n.seq ORDER BY n.seq) INTO places FROM (
        SELECT e.seq FROM {schema}.entries e WHERE e.c + 0 = row_c AND e.seq > p_after ORDER BY e.c + 0, e.seq LIMIT p_most
    ) AS n;
    UPDATE {schema}.entries e
        SET body = coalesce((SELECT json_object_agg(m.key, m.value)::text FROM json_each(e.body::json) AS m
            WHERE m.key <> 'metadata'), '{}')
        WHERE e.seq = ANY (places) AND strpos(e.body, '"metadata"') > 0;
    RETURN places[cardinality(places)];
END
$strip$;

-- Forget who a customer was; `p_stripped`: entries up to there say nothing of it. The row keeps its number, so the sums stay
-- where they are. Whoever counts refusals, or puts customers in order, may have read the name before: both are waited for.
CREATE FUNCTION {schema}.forget(p_epoch text, p_customer text, p_label text, p_actor text, p_now bigint, p_floor bigint,
    p_stripped bigint) RETURNS boolean
LANGUAGE plpgsql
AS $forget$
DECLARE
    at_ms bigint;
    row_c bigint;
BEGIN
    SELECT k.c INTO row_c FROM {schema}.customers k WHERE k.customer = p_customer FOR UPDATE;
    IF row_c IS NULL THEN
        RETURN false;
    END IF;
    at_ms := greatest(p_floor, coalesce(p_now, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint));
    UPDATE {schema}.entries e
        SET body = coalesce((SELECT json_object_agg(m.key, m.value)::text FROM json_each(e.body::json) AS m
            WHERE m.key <> 'metadata'), '{}')
        WHERE e.c + 0 = row_c AND e.seq > p_stripped AND strpos(e.body, '"metadata"') > 0;
    UPDATE {schema}.customers k SET customer = p_label, revision = '', params = NULL, name = '', search = p_label,
        blocked = false, rates = '{}', span_first = 0, span_end = 0, span_cost = 0, held_cost = 0, held_tokens = 0,
        held_first = 2147483647, held_last = 0, held_from_ms = 0, held_until_ms = 9223372036854775807
        WHERE k.c = row_c;
    DELETE FROM {schema}.holds g WHERE g.c = row_c;
    DELETE FROM {schema}.audit a WHERE a.customer = p_customer;
    INSERT INTO {schema}.audit (at_ms, customer, action, actor) VALUES (at_ms, p_label, 'delete', p_actor);
    PERFORM pg_advisory_xact_lock(hashtextextended('{schema}', 2));
    UPDATE {schema}.ordered o SET customer = p_label, search = p_label, blocked = false WHERE o.c = row_c;
    PERFORM pg_advisory_xact_lock(hashtextextended('{schema}', 3));
    INSERT INTO {schema}.tombs (hash, c, deleted_ms)
        VALUES (encode(sha256(convert_to(p_epoch || p_customer, 'UTF8')), 'hex'), row_c, at_ms);
    UPDATE {schema}.refusals r SET customer = p_label WHERE r.customer = p_customer;
    RETURN true;
END
$forget$;
-- Of processes of before.
CREATE OR REPLACE FUNCTION {schema}.forget(p_epoch text, p_customer text, p_label text, p_actor text, p_now bigint, p_floor bigint)
RETURNS boolean
LANGUAGE sql
AS $forget$ SELECT {schema}.forget(p_epoch, p_customer, p_label, p_actor, p_now, p_floor, 0) $forget$;

-- From here on writers wait until this is committed; what they did since the copy was made is noted.
CREATE TRIGGER moved_by_insert AFTER INSERT ON {schema}.customers REFERENCING NEW TABLE AS now_so
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.note_moved();
CREATE TRIGGER moved_by_update AFTER UPDATE ON {schema}.customers REFERENCING NEW TABLE AS now_so
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.note_moved();
CREATE TRIGGER moved_by_delete AFTER DELETE ON {schema}.customers REFERENCING OLD TABLE AS now_so
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.note_moved();
INSERT INTO {schema}.moved SELECT c FROM {schema}.customers k FULL JOIN {schema}.ordered o USING (c)
    WHERE (k.customer, k.search, k.blocked, k.last_seen, k.requests, k.calls, k.cost, k.tokens)
        IS DISTINCT FROM (o.customer, o.search, o.blocked, o.last_seen, o.requests, o.calls, o.cost, o.tokens);
-- Readers, too.
DROP INDEX IF EXISTS {schema}.customers_by_last_seen;
DROP INDEX IF EXISTS {schema}.customers_by_requests;
DROP INDEX IF EXISTS {schema}.customers_by_calls;
DROP INDEX IF EXISTS {schema}.customers_by_cost;
DROP INDEX IF EXISTS {schema}.customers_by_tokens;
ALTER TABLE {schema}.customers SET (fillfactor = 70);
