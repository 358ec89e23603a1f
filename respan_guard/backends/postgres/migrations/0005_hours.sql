-- `pruned_ms`: the greatest `at_ms` of an entry that was pruned. The sums of later hours are those of the entries.
ALTER TABLE {schema}.store ADD COLUMN pruned_ms bigint NOT NULL DEFAULT -1;
UPDATE {schema}.store SET pruned_ms = coalesce((SELECT max(t.at) FROM {schema}.totals t WHERE t.unit = 'h')::bigint * 3600000, -1)
    WHERE pruned_to >= 0;

-- As it was, and it keeps `pruned_ms`.
CREATE OR REPLACE FUNCTION {schema}.prune(p_before integer, p_limit integer) RETURNS integer
LANGUAGE plpgsql
AS $prune$
DECLARE
    gone integer;
    newest bigint;
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
    SELECT count(*), max(g.at_ms) INTO gone, newest FROM going g;
    UPDATE {schema}.store t SET pruned_ms = greatest(t.pruned_ms, newest) WHERE t.one;
    DELETE FROM {schema}.refusals r WHERE r.minute < (p_before - 719163) * 1440;  -- 719163: the ordinal of 1970-01-01
    RETURN gone;
END
$prune$;
