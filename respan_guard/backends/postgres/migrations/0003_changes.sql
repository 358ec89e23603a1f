-- What is done beside the batches and touches several tables.

-- Forget who a customer was. The row keeps its number, so the sums stay where they are.
CREATE FUNCTION {schema}.forget(p_epoch text, p_customer text, p_label text, p_actor text, p_now bigint, p_floor bigint)
RETURNS boolean
LANGUAGE plpgsql
AS $forget$
DECLARE
    at_ms bigint := greatest(p_floor, coalesce(p_now, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint));
    row_c bigint;
BEGIN
    SELECT k.c INTO row_c FROM {schema}.customers k WHERE k.customer = p_customer FOR UPDATE;
    IF row_c IS NULL THEN
        RETURN false;
    END IF;
    UPDATE {schema}.customers k SET customer = p_label, revision = '', params = NULL, name = '', search = p_label,
        blocked = false, rates = '{}', span_first = 0, span_end = 0, span_cost = 0, held_cost = 0, held_tokens = 0,
        held_first = 2147483647, held_last = 0, held_from_ms = 0, held_until_ms = 9223372036854775807
        WHERE k.c = row_c;
    INSERT INTO {schema}.tombs (hash, c, deleted_ms)
        VALUES (encode(sha256(convert_to(p_epoch || p_customer, 'UTF8')), 'hex'), row_c, at_ms);
    DELETE FROM {schema}.holds g WHERE g.c = row_c;
    -- What an app put into a record's metadata may say who the customer was.
    UPDATE {schema}.entries e
        SET body = coalesce((SELECT json_object_agg(m.key, m.value)::text FROM json_each(e.body::json) AS m
            WHERE m.key <> 'metadata'), '{}')
        WHERE e.c = row_c AND strpos(e.body, '"metadata"') > 0;
    DELETE FROM {schema}.audit a WHERE a.customer = p_customer;
    UPDATE {schema}.refusals r SET customer = p_label WHERE r.customer = p_customer;
    INSERT INTO {schema}.audit (at_ms, customer, action, actor) VALUES (at_ms, p_label, 'delete', p_actor);
    RETURN true;
END
$forget$;

-- Delete old entries that every reader has read, and keep what they summed up to. Old counts of refusals go with them.
CREATE FUNCTION {schema}.prune(p_before integer, p_limit integer) RETURNS integer
LANGUAGE plpgsql
AS $prune$
DECLARE
    gone integer;
BEGIN
    UPDATE {schema}.store t SET pruned_to = greatest(t.pruned_to, p_before - 1) WHERE t.one;  -- nobody books meanwhile
    WITH going AS MATERIALIZED (
        DELETE FROM {schema}.entries e WHERE e.seq = ANY (ARRAY(
            SELECT o.seq FROM {schema}.entries o
            WHERE o.day < p_before
                AND o.seq <= coalesce((SELECT min(r.seq) FROM {schema}.cursors r), 9223372036854775807)
            ORDER BY o.day LIMIT p_limit
        ))
        RETURNING e.*
    ), kept AS (
        INSERT INTO {schema}.pruned AS a (c, day, model, calls, cost, input_tokens, output_tokens, cache_read_tokens,
                unpriced, errors, latency_ms, timed, ttft_ms, ttft_calls)
            SELECT g.c, g.day, g.model, sum((g.kind <> 'adjustment')::integer), sum(coalesce(g.cost, 0)),
                sum(g.input_tokens), sum(g.output_tokens), sum(g.cache_read_tokens), sum((g.cost IS NULL)::integer),
                sum((g.status = 'error')::integer), sum(coalesce(g.latency_ms, 0)), count(g.latency_ms),
                sum(coalesce(g.ttft_ms, 0)), count(g.ttft_ms)
            FROM going g GROUP BY g.c, g.day, g.model
            ON CONFLICT (c, day, model) DO UPDATE SET calls = a.calls + excluded.calls, cost = a.cost + excluded.cost,
                input_tokens = a.input_tokens + excluded.input_tokens,
                output_tokens = a.output_tokens + excluded.output_tokens,
                cache_read_tokens = a.cache_read_tokens + excluded.cache_read_tokens,
                unpriced = a.unpriced + excluded.unpriced, errors = a.errors + excluded.errors,
                latency_ms = a.latency_ms + excluded.latency_ms, timed = a.timed + excluded.timed,
                ttft_ms = a.ttft_ms + excluded.ttft_ms, ttft_calls = a.ttft_calls + excluded.ttft_calls
    )
    SELECT count(*) INTO gone FROM going;
    DELETE FROM {schema}.refusals r WHERE r.minute < (p_before - 719163) * 1440;  -- 719163: the ordinal of 1970-01-01
    RETURN gone;
END
$prune$;

-- Delete admissions that nobody can ask for again; and, now and then, all that is too old.
CREATE FUNCTION {schema}.sweep(p_now bigint, p_all boolean) RETURNS integer
LANGUAGE plpgsql
SET enable_seqscan = off
AS $sweep$
DECLARE
    gone integer;
BEGIN
    DELETE FROM {schema}.holds g WHERE g.ctid = ANY (ARRAY(
        SELECT o.ctid FROM {schema}.holds o
        WHERE o.ended_ms IS NOT NULL AND o.ended_ms <= p_now - 60000 AND o.cost = 0 AND o.tokens = 0
        LIMIT 4096 FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS gone = ROW_COUNT;
    IF p_all THEN
        DELETE FROM {schema}.holds g WHERE g.ctid = ANY (ARRAY(
            SELECT o.ctid FROM {schema}.holds o WHERE o.expires_ms < p_now - 518400000  -- 6 days
            LIMIT 100000 FOR UPDATE SKIP LOCKED
        ));
        DELETE FROM {schema}.totals t WHERE t.unit = 'h' AND t.at < p_now / 3600000 - 1440;
    END IF;
    RETURN gone;
END
$sweep$;
