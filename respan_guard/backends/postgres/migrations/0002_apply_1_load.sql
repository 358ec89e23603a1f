-- A batch of operations, in one statement: lock the customers in one order, load what the operations touch, decide one
-- after another, write what changed. The rules are those of `respan_guard.backends.ops`; the answers are those of
-- `respan_guard.backends.ledger`, and the same random runs hold both to the same oracle.
--
-- Arrays come in families, and a number points into one: `k_` customers (sorted), `h_` holds, `e_` entries, `s_` sums
-- that limits ask for (by customer, those across customers last), `r_` rates, `l_` limits, `o_` the operations in order
-- of arrival. What the caller gives is called p_; an array without it is the state as it is worked on. It all comes in one
-- array of texts, each of which is an array itself: a statement with fifty arguments costs more than the decision.
-- The function lies in three files, which are read as one: load, decide, write.
--
-- Locks: the one of limits across customers, customers by identifier, parts of totals, the store. Always in that order.
--
-- Errors of our own: RG001 another store, RG002 beyond the range, RG003 usage of a deleted customer (DETAIL says whose).

-- A sum of bigint that stays one: PostgreSQL's own is numeric, which costs several times as much.
CREATE AGGREGATE {schema}.plus(bigint) (SFUNC = int8pl, STYPE = bigint, INITCOND = '0');

CREATE FUNCTION {schema}.apply(p_epoch text, p_now bigint, p_floor bigint, p_batch text[]) RETURNS text
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_mergejoin = off
SET jit = off
AS $apply$
DECLARE
    p_k_name CONSTANT text[] := p_batch[1]::text[];
    p_k_search CONSTANT text[] := p_batch[2]::text[];
    p_h_who CONSTANT integer[] := p_batch[3]::integer[];
    p_h_id CONSTANT text[] := p_batch[4]::text[];
    p_e_who CONSTANT integer[] := p_batch[5]::integer[];
    p_e_id CONSTANT text[] := p_batch[6]::text[];
    p_e_own CONSTANT boolean[] := p_batch[7]::boolean[];
    p_s_who CONSTANT integer[] := p_batch[8]::integer[];
    p_s_metric CONSTANT integer[] := p_batch[9]::integer[];
    p_s_first CONSTANT integer[] := p_batch[10]::integer[];
    p_s_end CONSTANT integer[] := p_batch[11]::integer[];
    p_s_model CONSTANT text[] := p_batch[12]::text[];
    p_s_from CONSTANT integer[] := p_batch[13]::integer[];
    p_s_to CONSTANT integer[] := p_batch[14]::integer[];
    p_wide CONSTANT integer := p_batch[15]::integer;
    p_r_who CONSTANT integer[] := p_batch[16]::integer[];
    p_r_width CONSTANT bigint[] := p_batch[17]::bigint[];
    p_l_rate CONSTANT boolean[] := p_batch[18]::boolean[];
    p_l_ref CONSTANT integer[] := p_batch[19]::integer[];
    p_l_amount CONSTANT bigint[] := p_batch[20]::bigint[];
    p_o_kind CONSTANT integer[] := p_batch[21]::integer[];
    p_o_who CONSTANT integer[] := p_batch[22]::integer[];
    p_o_booked CONSTANT integer[] := p_batch[23]::integer[];
    p_o_hold CONSTANT integer[] := p_batch[24]::integer[];
    p_o_entry CONSTANT integer[] := p_batch[25]::integer[];
    p_o_presumed CONSTANT integer[] := p_batch[26]::integer[];
    p_o_day CONSTANT integer[] := p_batch[27]::integer[];
    p_o_model CONSTANT text[] := p_batch[28]::text[];
    p_o_cost CONSTANT bigint[] := p_batch[29]::bigint[];
    p_o_in CONSTANT bigint[] := p_batch[30]::bigint[];
    p_o_out CONSTANT bigint[] := p_batch[31]::bigint[];
    p_a_revision CONSTANT text[] := p_batch[32]::text[];
    p_a_from CONSTANT bigint[] := p_batch[33]::bigint[];
    p_a_to CONSTANT bigint[] := p_batch[34]::bigint[];
    p_a_requests CONSTANT bigint[] := p_batch[35]::bigint[];
    p_o_ttl CONSTANT bigint[] := p_batch[36]::bigint[];
    p_a_free CONSTANT boolean[] := p_batch[37]::boolean[];
    p_a_limit CONSTANT integer[] := p_batch[38]::integer[];
    p_a_limits CONSTANT integer[] := p_batch[39]::integer[];
    p_b_at CONSTANT bigint[] := p_batch[40]::bigint[];
    p_b_cached CONSTANT bigint[] := p_batch[41]::bigint[];
    p_b_latency CONSTANT bigint[] := p_batch[42]::bigint[];
    p_b_ttft CONSTANT bigint[] := p_batch[43]::bigint[];
    p_b_kind CONSTANT text[] := p_batch[44]::text[];
    p_b_source CONSTANT text[] := p_batch[45]::text[];
    p_b_provider CONSTANT text[] := p_batch[46]::text[];
    p_b_status CONSTANT text[] := p_batch[47]::text[];
    p_b_trace CONSTANT text[] := p_batch[48]::text[];
    p_b_body CONSTANT text[] := p_batch[49]::text[];
    c_max CONSTANT bigint := 9000000000000000;
    c_never CONSTANT bigint := 9223372036854775807;
    c_ever CONSTANT integer := 2147483647;
    c_replay CONSTANT bigint := 60000;
    n_k CONSTANT integer := cardinality(p_k_name);
    n_s CONSTANT integer := cardinality(p_s_who);
    now bigint;
    pruned_to integer;
    any_tombs boolean;
    k_c bigint[]; k_revision text[]; k_cost bigint[]; k_tokens bigint[]; k_requests bigint[]; k_rates text[];
    k_span_first integer[]; k_span_end integer[]; k_span_cost bigint[];
    k_held_cost bigint[]; k_held_tokens bigint[]; k_held_first integer[]; k_held_last integer[];
    k_held_from bigint[]; k_held_until bigint[]; k_new boolean[];
    k_touched boolean[]; k_seen boolean[];
    h_day integer[]; h_model text[]; h_cost bigint[]; h_tokens bigint[]; h_expires bigint[]; h_ended bigint[];
    h_answer text[]; h_dirty boolean[];
    e_rev integer[]; e_day integer[]; e_model text[]; e_at bigint[]; e_cost bigint[]; e_in bigint[]; e_out bigint[];
    e_late boolean[]; e_kind text[]; e_place integer[]; e_latest bigint[]; e_loaded boolean[];
    s_used bigint[]; s_held bigint[];
    r_start bigint[]; r_prev bigint[]; r_cur bigint[]; r_counted integer[];
    x_who integer[]; x_day integer[]; x_model text[]; x_cost bigint[]; x_at bigint[];
    o_done integer[];
    answers text[];
    places integer := 0;
    latest bigint := 0;
    revised boolean := false;
    any_done boolean := false;
    any_dirty boolean := false;
    any_touched boolean := false;
    first_seq bigint; base_latest bigint; pruned_since integer;
    again integer[]; needed integer[];
    rates bigint[];
    line record;
    missing integer; made integer;
    i integer; j integer; s integer; r integer; w integer; b integer; h integer; e integer; p integer; x integer;
    spot integer; last_s integer;
    fits boolean; late boolean; conflict boolean;
    used bigint; held bigint; asked bigint; amount bigint; width bigint; start bigint; previous bigint; cur bigint;
    cost bigint; tokens bigint; cut bigint;
    d_requests bigint; d_cost bigint; d_tokens bigint; d_held_cost bigint; d_held_tokens bigint;
    d_day integer; d_model text;
    standing text; windows text;
BEGIN
    -- Who is it about? Locked in one order for everybody, unknown ones by making their rows first.
    IF p_wide <= n_s THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('{schema}', 1));
    END IF;
    LOOP
        WITH mine AS MATERIALIZED (
            SELECT k.c, k.revision, k.cost, k.tokens, k.requests, k.rates::text AS rates, k.span_first, k.span_end,
                k.span_cost, k.held_cost, k.held_tokens, k.held_first, k.held_last, k.held_from_ms, k.held_until_ms,
                k.first_seen
            FROM {schema}.customers k WHERE k.customer = ANY (p_k_name) ORDER BY k.customer FOR UPDATE
        )
        SELECT array_agg(m.c), array_agg(m.revision), array_agg(m.cost), array_agg(m.tokens), array_agg(m.requests),
            array_agg(m.rates), array_agg(m.span_first), array_agg(m.span_end), array_agg(m.span_cost),
            array_agg(m.held_cost), array_agg(m.held_tokens), array_agg(m.held_first), array_agg(m.held_last),
            array_agg(m.held_from_ms), array_agg(m.held_until_ms), array_agg(m.first_seen < 0)
        INTO k_c, k_revision, k_cost, k_tokens, k_requests, k_rates, k_span_first, k_span_end, k_span_cost,
            k_held_cost, k_held_tokens, k_held_first, k_held_last, k_held_from, k_held_until, k_new
        FROM mine m;
        missing := n_k - coalesce(cardinality(k_c), 0);
        EXIT WHEN missing = 0;
        IF made IS NOT NULL THEN
            RAISE serialization_failure USING MESSAGE = 'a customer was deleted meanwhile';
        END IF;
        INSERT INTO {schema}.customers (customer, search, first_seen, last_seen)
            SELECT n.name, n.search, -1, -1 FROM unnest(p_k_name, p_k_search) AS n (name, search)
            WHERE NOT EXISTS (SELECT 1 FROM {schema}.customers k WHERE k.customer = n.name)
            ORDER BY n.name COLLATE "C"
            ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS made = ROW_COUNT;
        IF made < missing THEN  -- to wait for its lock now would be out of order
            RAISE serialization_failure USING MESSAGE = 'a customer was made meanwhile';
        END IF;
    END LOOP;
    k_touched := array_fill(false, ARRAY[n_k]);
    k_seen := k_touched;

    SELECT t.pruned_to, EXISTS (SELECT 1 FROM {schema}.tombs) INTO pruned_to, any_tombs
        FROM {schema}.store t WHERE t.one AND t.epoch = p_epoch;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'RG001', MESSAGE = 'this is another store than the one that was opened';
    END IF;
    IF any_tombs THEN
        SELECT json_agg(json_build_array(d.place, d.label))::text INTO standing FROM (
            SELECT o.place, o.booked, coalesce(
                (SELECT k.customer FROM {schema}.tombs t JOIN {schema}.customers k USING (c)
                    WHERE t.hash = encode(sha256(convert_to(p_epoch || p_k_name[o.who], 'UTF8')), 'hex')
                        AND t.deleted_ms >= o.at_ms
                    ORDER BY t.deleted_ms, t.c LIMIT 1),
                p_k_name[o.who]) AS label
            FROM unnest(p_o_kind, p_o_who, p_o_booked, p_b_at) WITH ORDINALITY AS o (kind, who, booked, at_ms, place)
            WHERE o.kind = 2
        ) AS d WHERE d.label <> p_k_name[d.booked];
        IF standing IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'RG003', MESSAGE = 'usage of a deleted customer', DETAIL = standing;
        END IF;
    END IF;
    now := greatest(p_floor, coalesce(p_now, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint));

    -- What was held is right for a while only: holds expire. Clocks may go back, too.
    FOR w IN 1..n_k LOOP
        IF now < k_held_from[w] OR now >= k_held_until[w] THEN
            IF now >= k_held_from[w] AND k_held_cost[w] = 0 AND k_held_tokens[w] = 0 THEN
                k_held_first[w] := c_ever; k_held_last[w] := 0; k_held_until[w] := c_never;
            ELSE
                again := again || w;
            END IF;
        END IF;
    END LOOP;
    IF again IS NOT NULL THEN
        FOR line IN
            SELECT a.w, coalesce(sum(f.cost), 0)::bigint AS cost, coalesce(sum(f.tokens), 0)::bigint AS tokens,
                coalesce(min(f.day), c_ever) AS first, coalesce(max(f.day), 0) AS last,
                coalesce(min(f.expires_ms), c_never) AS until
            FROM unnest(again) AS a (w) LEFT JOIN {schema}.holds f
                ON f.c = k_c[a.w] AND f.ended_ms IS NULL AND f.expires_ms > now AND (f.cost > 0 OR f.tokens > 0)
            GROUP BY a.w
        LOOP
            w := line.w;
            k_held_cost[w] := line.cost; k_held_tokens[w] := line.tokens;
            k_held_first[w] := line.first; k_held_last[w] := line.last;
            k_held_from[w] := now; k_held_until[w] := line.until;
        END LOOP;
    END IF;

    IF cardinality(p_h_who) > 0 THEN
        SELECT array_agg(f.day), array_agg(f.model), array_agg(f.cost), array_agg(f.tokens), array_agg(f.expires_ms),
            array_agg(f.ended_ms), array_agg(f.answer), array_agg(false)
        INTO h_day, h_model, h_cost, h_tokens, h_expires, h_ended, h_answer, h_dirty
        FROM (
            SELECT g.* FROM unnest(p_h_who, p_h_id) WITH ORDINALITY AS n (who, id, place)
                LEFT JOIN {schema}.holds g ON g.c = k_c[n.who] AND g.id = n.id
            ORDER BY n.place
        ) AS f;
    END IF;
    IF cardinality(p_e_who) > 0 THEN
        SELECT array_agg(f.rev), array_agg(f.day), array_agg(f.model), array_agg(f.at_ms), array_agg(f.cost),
            array_agg(f.input_tokens), array_agg(f.output_tokens), array_agg(f.late), array_agg(f.kind),
            array_agg(f.own), array_agg(0), array_agg(0::bigint)
        INTO e_rev, e_day, e_model, e_at, e_cost, e_in, e_out, e_late, e_kind, e_loaded, e_place, e_latest
        FROM (
            SELECT g.*, n.own FROM unnest(p_e_who, p_e_id, p_e_own) WITH ORDINALITY AS n (who, id, own, place)
                LEFT JOIN {schema}.entries g ON n.own AND g.c = k_c[n.who] AND g.id = n.id
            ORDER BY n.place
        ) AS f;
    END IF;
    FOR r IN 1..cardinality(p_r_who) LOOP
        w := p_r_who[r];
        rates := k_rates[w]::bigint[];
        spot := 1;
        WHILE spot < cardinality(rates) AND rates[spot] <> p_r_width[r] LOOP
            spot := spot + 4;
        END LOOP;
        r_start[r] := rates[spot + 1]; r_prev[r] := rates[spot + 2]; r_cur[r] := rates[spot + 3]; r_counted[r] := 0;
    END LOOP;

    -- Sums: most are in the customer's row, others are added up.
    FOR s IN 1..n_s LOOP
        w := p_s_who[s];
        used := NULL; held := 0;
        IF w > 0 AND p_s_model[s] IS NULL THEN
            j := p_s_metric[s];
            IF p_s_end[s] = c_ever THEN
                used := CASE j WHEN 1 THEN k_cost[w] WHEN 2 THEN k_tokens[w] ELSE k_requests[w] END;
            ELSIF j = 1 AND p_s_first[s] = k_span_first[w] AND p_s_end[s] = k_span_end[w] THEN
                used := k_span_cost[w];
            END IF;
            IF j > 0 AND k_held_first[w] < p_s_end[s] AND k_held_last[w] >= p_s_first[s] THEN
                IF k_held_first[w] >= p_s_first[s] AND k_held_last[w] < p_s_end[s] THEN
                    held := CASE j WHEN 1 THEN k_held_cost[w] ELSE k_held_tokens[w] END;
                ELSE
                    used := NULL;
                END IF;
            END IF;
        END IF;
        s_used[s] := used; s_held[s] := held;
        IF used IS NULL THEN
            needed := needed || s;
        END IF;
    END LOOP;
    IF needed IS NOT NULL THEN  -- in one statement, so that nothing moves from held to used in between
        FOR line IN
            SELECT q.s, CASE p_s_metric[q.s] WHEN 0 THEN u.requests WHEN 1 THEN u.cost ELSE u.tokens END AS used,
                CASE p_s_metric[q.s] WHEN 0 THEN 0 WHEN 1 THEN f.cost ELSE f.tokens END AS held
            FROM unnest(needed) AS q (s)
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(a.requests), 0)::bigint AS requests, coalesce(sum(a.cost), 0)::bigint AS cost,
                    coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint AS tokens
                FROM {schema}.rollups a
                WHERE a.c = k_c[p_s_who[q.s]] AND a.day >= p_s_first[q.s] AND a.day < p_s_end[q.s]
                    AND (p_s_model[q.s] IS NULL OR a.model = p_s_model[q.s])
            ) AS u
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(g.cost), 0)::bigint AS cost, coalesce(sum(g.tokens), 0)::bigint AS tokens
                FROM {schema}.holds g
                WHERE g.c = k_c[p_s_who[q.s]] AND g.ended_ms IS NULL AND g.expires_ms > now
                    AND g.day >= p_s_first[q.s] AND g.day < p_s_end[q.s]
                    AND (p_s_model[q.s] IS NULL OR g.model = p_s_model[q.s])
            ) AS f
            WHERE q.s < p_wide
            UNION ALL
            SELECT q.s, CASE p_s_metric[q.s] WHEN 0 THEN u.requests WHEN 1 THEN u.cost ELSE u.tokens END,
                CASE p_s_metric[q.s] WHEN 0 THEN 0 WHEN 1 THEN f.cost ELSE f.tokens END
            FROM unnest(needed) AS q (s)
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(a.requests), 0)::bigint AS requests, coalesce(sum(a.cost), 0)::bigint AS cost,
                    coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint AS tokens
                FROM {schema}.totals a
                WHERE a.unit = 'd' AND a.at >= p_s_first[q.s] AND a.at < p_s_end[q.s]
                    AND (p_s_model[q.s] IS NULL OR a.model = p_s_model[q.s])
            ) AS u
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(g.cost), 0)::bigint AS cost, coalesce(sum(g.tokens), 0)::bigint AS tokens
                FROM {schema}.holds g
                WHERE g.ended_ms IS NULL AND g.expires_ms > now AND g.day >= p_s_first[q.s] AND g.day < p_s_end[q.s]
                    AND (p_s_model[q.s] IS NULL OR g.model = p_s_model[q.s])
            ) AS f
            WHERE q.s >= p_wide
        LOOP
            s_used[line.s] := line.used; s_held[line.s] := line.held;
        END LOOP;
    END IF;

