-- A batch of operations, in one statement: lock the customers in one order, load what the operations touch, decide one
-- after another, write what changed. The rules are those of `respan_guard.backends.ops`; the answers are those of
-- `respan_guard.backends.ledger`, and the same random runs hold both to the same oracle.
--
-- Arrays come in families, and a number points into one: `k_` customers (sorted), `h_` holds, `e_` entries, `s_` sums
-- that limits ask for (by customer, those across customers last), `r_` rates, `l_` limits, `o_` the operations in order
-- of arrival. What the caller gives is called p_; an array without it is the state as it is worked on. It all comes in one
-- array of texts, each of which is an array itself: a statement with fifty arguments costs more than the decision.
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

    FOR i IN 1..cardinality(p_o_kind) LOOP
        w := p_o_who[i]; b := w; h := p_o_hold[i];
        d_requests := 0; d_cost := 0; d_tokens := 0; d_held_cost := 0; d_held_tokens := 0;
        o_done[i] := 0;
        CASE p_o_kind[i]
        WHEN 1 THEN
            IF h_expires[h] IS NOT NULL AND coalesce(h_ended[h], h_expires[h]) + c_replay > now THEN
                answers[i] := 'A' || h_answer[h];
            ELSIF k_revision[w] <> p_a_revision[i] OR now < p_a_from[i] OR now >= p_a_to[i] THEN
                answers[i] := 'S' || k_revision[w] || '|'
                    || coalesce((SELECT k.params FROM {schema}.customers k WHERE k.c = k_c[w]), '');
            ELSE
                fits := true; standing := ''; windows := '';
                FOR j IN p_a_limit[i]..p_a_limit[i] + p_a_limits[i] - 1 LOOP
                    amount := p_l_amount[j];
                    IF p_l_rate[j] THEN
                        r := p_l_ref[j]; width := p_r_width[r]; start := r_start[r];
                        IF start IS NULL OR now >= start + 2 * width OR now < start - width THEN
                            start := now; previous := 0; cur := 0;
                        ELSIF now >= start + width THEN
                            start := start + width; previous := r_cur[r]; cur := 0;
                        ELSE
                            previous := r_prev[r]; cur := r_cur[r];
                        END IF;
                        -- rolled in memory only: it is written if it is counted
                        r_start[r] := start; r_prev[r] := previous; r_cur[r] := cur;
                        used := cur; held := 0;
                        IF previous > 0 THEN
                            used := used + previous * (width - greatest(0, now - start)) / width;
                        END IF;
                        IF used + p_a_requests[i] > amount THEN
                            fits := false;
                        END IF;
                        windows := windows || ',' || start || ',' || previous || ',' || cur;
                    ELSE
                        s := p_l_ref[j]; used := s_used[s]; held := s_held[s];
                        IF p_s_metric[s] = 0 THEN
                            IF used + p_a_requests[i] > amount THEN
                                fits := false;
                            END IF;
                        ELSE
                            asked := CASE p_s_metric[s] WHEN 1 THEN p_o_cost[i] ELSE p_o_in[i] END;
                            IF (asked > 0 OR NOT p_a_free[i])
                                AND (used + held + asked > amount OR used + held >= amount) THEN
                                fits := false;
                            END IF;
                        END IF;
                    END IF;
                    standing := standing || ',' || used || ',' || held;
                END LOOP;
                standing := now || '|' || standing || '|' || windows;
                IF NOT fits THEN
                    answers[i] := 'R' || standing;
                ELSE
                    answers[i] := 'A' || standing;
                    d_requests := p_a_requests[i]; d_day := p_o_day[i]; d_model := p_o_model[i];
                    IF d_requests > 0 THEN
                        FOR j IN p_a_limit[i]..p_a_limit[i] + p_a_limits[i] - 1 LOOP
                            IF p_l_rate[j] AND r_counted[p_l_ref[j]] <> i THEN
                                r := p_l_ref[j];
                                r_cur[r] := r_cur[r] + d_requests; r_counted[r] := i;
                            END IF;
                        END LOOP;
                        o_done[i] := 1; any_done := true; k_seen[w] := true;
                    END IF;
                    k_touched[w] := true; any_touched := true;
                    h_day[h] := d_day; h_model[h] := d_model; h_cost[h] := p_o_cost[i]; h_tokens[h] := p_o_in[i];
                    h_expires[h] := now + p_o_ttl[i]; h_ended[h] := NULL; h_answer[h] := standing;
                    h_dirty[h] := true; any_dirty := true;
                    IF p_o_ttl[i] > 0 THEN
                        d_held_cost := p_o_cost[i]; d_held_tokens := p_o_in[i];
                    END IF;
                END IF;
            END IF;

        WHEN 2 THEN
            b := p_o_booked[i]; e := p_o_entry[i]; cost := coalesce(p_o_cost[i], 0);
            tokens := p_o_in[i] + p_o_out[i];
            IF p_o_day[i] <= pruned_to THEN
                answers[i] := 'T' || pruned_to;
            ELSIF e_rev[e] IS NOT NULL THEN
                conflict := e_kind[e] <> 'presumed' AND (
                    e_cost[e] IS DISTINCT FROM p_o_cost[i] OR e_in[e] <> p_o_in[i] OR e_out[e] <> p_o_out[i]);
                answers[i] := 'K' || coalesce(e_cost[e]::text, '') || '|' || e_day[e] || '|' || e_late[e]::integer
                    || '|' || conflict::integer;
            ELSE
                IF abs(k_cost[b] + cost) > c_max OR k_tokens[b] + tokens > c_max THEN
                    RAISE EXCEPTION USING ERRCODE = 'RG002', MESSAGE = p_k_name[b];
                END IF;
                late := false;
                IF h > 0 THEN
                    IF h_expires[h] > now AND h_ended[h] IS NULL THEN
                        IF h_cost[h] > 0 OR h_tokens[h] > 0 THEN
                            cut := least(h_cost[h], greatest(cost, 0));
                            h_cost[h] := h_cost[h] - cut; d_held_cost := -cut;
                            cut := least(h_tokens[h], tokens);
                            h_tokens[h] := h_tokens[h] - cut; d_held_tokens := -cut;
                            h_dirty[h] := true; any_dirty := true;
                        END IF;
                    ELSE
                        late := true;
                        p := p_o_presumed[i];
                        IF cost > 0 AND p > 0 THEN
                            IF NOT e_loaded[p] THEN
                                SELECT g.rev, g.day, g.model, g.at_ms, g.cost, g.late INTO line
                                    FROM {schema}.entries g WHERE g.c = k_c[b] AND g.id = p_e_id[p];
                                e_rev[p] := line.rev; e_day[p] := line.day; e_model[p] := line.model;
                                e_at[p] := line.at_ms; e_cost[p] := line.cost; e_late[p] := line.late;
                                e_loaded[p] := true;
                            END IF;
                            IF e_cost[p] <> 0 THEN
                                cut := least(e_cost[p], cost);
                                e_cost[p] := e_cost[p] - cut; e_rev[p] := e_rev[p] + 1;
                                places := places + 1; latest := greatest(latest, e_at[p]);
                                e_place[p] := places; e_latest[p] := latest;
                                revised := true;
                                x := coalesce(cardinality(x_who), 0) + 1;
                                x_who[x] := b; x_day[x] := e_day[p]; x_model[x] := e_model[p]; x_cost[x] := -cut;
                                x_at[x] := e_at[p];
                                k_cost[b] := k_cost[b] - cut;
                                IF e_day[p] >= k_span_first[b] AND e_day[p] < k_span_end[b] THEN
                                    k_span_cost[b] := k_span_cost[b] - cut;
                                END IF;
                                s := p_s_from[b]; last_s := p_s_to[b];
                                LOOP
                                    WHILE s <= last_s LOOP
                                        IF p_s_metric[s] = 1 AND e_day[p] >= p_s_first[s] AND e_day[p] < p_s_end[s]
                                            AND (p_s_model[s] IS NULL OR p_s_model[s] = e_model[p]) THEN
                                            s_used[s] := s_used[s] - cut;
                                        END IF;
                                        s := s + 1;
                                    END LOOP;
                                    EXIT WHEN last_s = n_s;
                                    s := p_wide; last_s := n_s;
                                END LOOP;
                            END IF;
                        END IF;
                    END IF;
                END IF;
                places := places + 1; latest := greatest(latest, p_b_at[i]);
                e_rev[e] := 1; e_day[e] := p_o_day[i]; e_model[e] := p_o_model[i]; e_at[e] := p_b_at[i];
                e_cost[e] := p_o_cost[i]; e_in[e] := p_o_in[i]; e_out[e] := p_o_out[i]; e_late[e] := late;
                e_kind[e] := p_b_kind[i]; e_place[e] := places; e_latest[e] := latest;
                k_cost[b] := k_cost[b] + cost; k_tokens[b] := k_tokens[b] + tokens;
                d_cost := cost; d_tokens := tokens; d_day := p_o_day[i]; d_model := p_o_model[i];
                IF d_day >= k_span_first[b] AND d_day < k_span_end[b] THEN
                    k_span_cost[b] := k_span_cost[b] + cost;
                END IF;
                o_done[i] := 2; any_done := true;
                k_touched[b] := true; k_seen[b] := true; any_touched := true;
                answers[i] := 'N' || late::integer;
            END IF;

        WHEN 3 THEN
            IF h_expires[h] IS NULL OR h_ended[h] IS NOT NULL THEN
                answers[i] := 'G';
            ELSE
                IF h_expires[h] <= now THEN
                    h_ended[h] := h_expires[h];
                    k_touched[w] := true; any_touched := true;  -- what is held was added up anew, without it
                    answers[i] := 'X';
                ELSE
                    d_held_cost := -h_cost[h]; d_held_tokens := -h_tokens[h];
                    h_ended[h] := now; h_cost[h] := 0; h_tokens[h] := 0;
                    answers[i] := 'E';
                END IF;
                h_dirty[h] := true; any_dirty := true;
            END IF;

        ELSE
            IF h_expires[h] > now AND h_ended[h] IS NULL THEN
                h_expires[h] := greatest(h_expires[h], now + p_o_ttl[i]);
                h_dirty[h] := true; any_dirty := true;
                answers[i] := 'W';
            ELSE
                answers[i] := 'G';
            END IF;
        END CASE;

        IF d_held_cost <> 0 OR d_held_tokens <> 0 THEN
            k_held_cost[w] := k_held_cost[w] + d_held_cost; k_held_tokens[w] := k_held_tokens[w] + d_held_tokens;
            k_touched[w] := true; any_touched := true;
            IF p_o_kind[i] = 1 THEN
                k_held_first[w] := least(k_held_first[w], d_day); k_held_last[w] := greatest(k_held_last[w], d_day);
                k_held_until[w] := least(k_held_until[w], h_expires[h]);
            ELSIF k_held_cost[w] = 0 AND k_held_tokens[w] = 0 THEN
                k_held_first[w] := c_ever; k_held_last[w] := 0; k_held_until[w] := c_never;
            END IF;
            s := p_s_from[w]; last_s := p_s_to[w];
            LOOP
                WHILE s <= last_s LOOP
                    IF h_day[h] >= p_s_first[s] AND h_day[h] < p_s_end[s]
                        AND (p_s_model[s] IS NULL OR p_s_model[s] = h_model[h]) THEN
                        s_held[s] := s_held[s] + CASE p_s_metric[s] WHEN 1 THEN d_held_cost WHEN 2 THEN d_held_tokens
                            ELSE 0 END;
                    END IF;
                    s := s + 1;
                END LOOP;
                EXIT WHEN last_s = n_s;
                s := p_wide; last_s := n_s;
            END LOOP;
        END IF;
        IF o_done[i] > 0 THEN
            s := p_s_from[b]; last_s := p_s_to[b];
            LOOP
                WHILE s <= last_s LOOP
                    IF d_day >= p_s_first[s] AND d_day < p_s_end[s]
                        AND (p_s_model[s] IS NULL OR p_s_model[s] = d_model) THEN
                        s_used[s] := s_used[s] + CASE p_s_metric[s] WHEN 1 THEN d_cost WHEN 2 THEN d_tokens
                            ELSE d_requests END;
                    END IF;
                    s := s + 1;
                END LOOP;
                EXIT WHEN last_s = n_s;
                s := p_wide; last_s := n_s;
            END LOOP;
        END IF;
    END LOOP;

    -- Write. Counted rates and the budget's sum go back into the customer's row.
    FOR r IN 1..cardinality(p_r_who) LOOP
        IF r_counted[r] > 0 THEN
            w := p_r_who[r];
            rates := k_rates[w]::bigint[];
            spot := 1;
            WHILE spot < cardinality(rates) AND rates[spot] <> p_r_width[r] LOOP
                spot := spot + 4;
            END LOOP;
            rates[spot] := p_r_width[r]; rates[spot + 1] := r_start[r]; rates[spot + 2] := r_prev[r];
            rates[spot + 3] := r_cur[r];
            k_rates[w] := rates::text;
        END IF;
    END LOOP;
    FOR s IN 1..p_wide - 1 LOOP
        w := p_s_who[s];
        IF p_s_metric[s] = 1 AND p_s_model[s] IS NULL AND p_s_end[s] < c_ever THEN
            k_span_first[w] := p_s_first[s]; k_span_end[w] := p_s_end[s]; k_span_cost[w] := s_used[s];
        END IF;
    END LOOP;
    IF any_dirty THEN
        INSERT INTO {schema}.holds AS g (c, id, day, model, cost, tokens, expires_ms, ended_ms, answer)
            SELECT k_c[n.who], n.id, n.day, n.model, n.cost, n.tokens, n.expires_ms, n.ended_ms, n.answer
            FROM unnest(h_dirty, p_h_who, p_h_id, h_day, h_model, h_cost, h_tokens, h_expires, h_ended, h_answer)
                AS n (dirty, who, id, day, model, cost, tokens, expires_ms, ended_ms, answer)
            WHERE n.dirty
            ON CONFLICT (c, id) DO UPDATE SET day = excluded.day, model = excluded.model, cost = excluded.cost,
                tokens = excluded.tokens, expires_ms = excluded.expires_ms, ended_ms = excluded.ended_ms,
                answer = excluded.answer;
    END IF;
    IF any_done THEN
        WITH adds AS MATERIALIZED (
            SELECT n.who, n.day, n.model, n.hour, {schema}.plus(n.requests) AS requests, {schema}.plus(n.calls) AS calls,
                {schema}.plus(n.cost) AS cost, {schema}.plus(n.input_tokens) AS input_tokens, {schema}.plus(n.output_tokens) AS output_tokens,
                {schema}.plus(n.cache_read_tokens) AS cache_read_tokens, {schema}.plus(n.unpriced) AS unpriced, {schema}.plus(n.errors) AS errors,
                {schema}.plus(n.latency_ms) AS latency_ms, {schema}.plus(n.timed) AS timed, {schema}.plus(n.ttft_ms) AS ttft_ms,
                {schema}.plus(n.ttft_calls) AS ttft_calls
            FROM (
                SELECT o.who, o.day, o.model, (now / 3600000)::integer, o.requests, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
                FROM unnest(o_done, p_o_who, p_o_day, p_o_model, p_a_requests) AS o (done, who, day, model, requests)
                WHERE o.done = 1
                UNION ALL
                SELECT o.booked, o.day, o.model, (o.at_ms / 3600000)::integer, 0, (o.kind <> 'adjustment')::integer,
                    coalesce(o.cost, 0), o.input_tokens, o.output_tokens, o.cached, (o.cost IS NULL)::integer,
                    (o.status = 'error')::integer, coalesce(o.latency, 0), (o.latency IS NOT NULL)::integer,
                    coalesce(o.ttft, 0), (o.ttft IS NOT NULL)::integer
                FROM unnest(o_done, p_o_booked, p_o_day, p_o_model, p_b_at, p_b_kind, p_o_cost, p_o_in, p_o_out,
                        p_b_cached, p_b_status, p_b_latency, p_b_ttft)
                    AS o (done, booked, day, model, at_ms, kind, cost, input_tokens, output_tokens, cached, status,
                        latency, ttft)
                WHERE o.done = 2
                UNION ALL
                SELECT d.who, d.day, d.model, (d.at_ms / 3600000)::integer, 0, 0, d.cost, 0, 0, 0, 0, 0, 0, 0, 0, 0
                FROM unnest(x_who, x_day, x_model, x_cost, x_at) AS d (who, day, model, cost, at_ms)
            ) AS n (who, day, model, hour, requests, calls, cost, input_tokens, output_tokens, cache_read_tokens,
                unpriced, errors, latency_ms, timed, ttft_ms, ttft_calls)
            GROUP BY n.who, n.day, n.model, n.hour
        ), days AS MATERIALIZED (  -- days that are new to a customer
            SELECT d.who, d.day, min(d.model) AS model FROM adds d
            WHERE NOT EXISTS (SELECT 1 FROM {schema}.rollups a WHERE a.c = k_c[d.who] AND a.day = d.day)
            GROUP BY d.who, d.day
        ), booked AS (
            INSERT INTO {schema}.rollups AS a (c, day, model, requests, calls, cost, input_tokens, output_tokens,
                    cache_read_tokens, unpriced, errors, latency_ms, timed, ttft_ms, ttft_calls)
                SELECT k_c[n.who], n.day, n.model, {schema}.plus(n.requests), {schema}.plus(n.calls), {schema}.plus(n.cost), {schema}.plus(n.input_tokens),
                    {schema}.plus(n.output_tokens), {schema}.plus(n.cache_read_tokens), {schema}.plus(n.unpriced), {schema}.plus(n.errors), {schema}.plus(n.latency_ms),
                    {schema}.plus(n.timed), {schema}.plus(n.ttft_ms), {schema}.plus(n.ttft_calls)
                FROM adds n GROUP BY n.who, n.day, n.model
                ON CONFLICT (c, day, model) DO UPDATE SET requests = a.requests + excluded.requests,
                    calls = a.calls + excluded.calls, cost = a.cost + excluded.cost,
                    input_tokens = a.input_tokens + excluded.input_tokens,
                    output_tokens = a.output_tokens + excluded.output_tokens,
                    cache_read_tokens = a.cache_read_tokens + excluded.cache_read_tokens,
                    unpriced = a.unpriced + excluded.unpriced, errors = a.errors + excluded.errors,
                    latency_ms = a.latency_ms + excluded.latency_ms, timed = a.timed + excluded.timed,
                    ttft_ms = a.ttft_ms + excluded.ttft_ms, ttft_calls = a.ttft_calls + excluded.ttft_calls
        ), counted AS (
            INSERT INTO {schema}.totals AS a (unit, at, model, part, customers, requests, calls, cost, input_tokens,
                    output_tokens, cache_read_tokens, unpriced, errors, latency_ms, timed, ttft_ms, ttft_calls)
                SELECT n.unit, n.at, n.model, (pg_backend_pid() % 16)::smallint, {schema}.plus(n.customers), {schema}.plus(n.requests),
                    {schema}.plus(n.calls), {schema}.plus(n.cost), {schema}.plus(n.input_tokens), {schema}.plus(n.output_tokens), {schema}.plus(n.cache_read_tokens),
                    {schema}.plus(n.unpriced), {schema}.plus(n.errors), {schema}.plus(n.latency_ms), {schema}.plus(n.timed), {schema}.plus(n.ttft_ms), {schema}.plus(n.ttft_calls)
                FROM (
                    SELECT 'd', d.day, d.model, 0, d.requests, d.calls, d.cost, d.input_tokens, d.output_tokens,
                        d.cache_read_tokens, d.unpriced, d.errors, d.latency_ms, d.timed, d.ttft_ms, d.ttft_calls
                    FROM adds d
                    UNION ALL
                    SELECT 'h', d.hour, d.model, 0, d.requests, d.calls, d.cost, d.input_tokens, d.output_tokens,
                        d.cache_read_tokens, d.unpriced, d.errors, d.latency_ms, d.timed, d.ttft_ms, d.ttft_calls
                    FROM adds d
                    UNION ALL
                    SELECT 'd', d.day, d.model, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM days d
                ) AS n (unit, at, model, customers, requests, calls, cost, input_tokens, output_tokens,
                    cache_read_tokens, unpriced, errors, latency_ms, timed, ttft_ms, ttft_calls)
                GROUP BY n.unit, n.at, n.model ORDER BY n.unit, n.at, n.model
                ON CONFLICT (unit, at, model, part) DO UPDATE SET customers = a.customers + excluded.customers,
                    requests = a.requests + excluded.requests, calls = a.calls + excluded.calls,
                    cost = a.cost + excluded.cost, input_tokens = a.input_tokens + excluded.input_tokens,
                    output_tokens = a.output_tokens + excluded.output_tokens,
                    cache_read_tokens = a.cache_read_tokens + excluded.cache_read_tokens,
                    unpriced = a.unpriced + excluded.unpriced, errors = a.errors + excluded.errors,
                    latency_ms = a.latency_ms + excluded.latency_ms, timed = a.timed + excluded.timed,
                    ttft_ms = a.ttft_ms + excluded.ttft_ms, ttft_calls = a.ttft_calls + excluded.ttft_calls
        )
        UPDATE {schema}.customers k SET
            first_seen = CASE WHEN k.first_seen < 0 THEN now ELSE k.first_seen END,
            last_seen = CASE WHEN n.seen OR k.first_seen < 0 THEN greatest(k.last_seen, now) ELSE k.last_seen END,
            active_days = k.active_days + n.days, requests = k.requests + n.requests, calls = k.calls + n.calls,
            cost = k.cost + n.cost, input_tokens = k.input_tokens + n.input_tokens,
            output_tokens = k.output_tokens + n.output_tokens,
            cache_read_tokens = k.cache_read_tokens + n.cache_read_tokens, unpriced = k.unpriced + n.unpriced,
            errors = k.errors + n.errors, latency_ms = k.latency_ms + n.latency_ms, timed = k.timed + n.timed,
            ttft_ms = k.ttft_ms + n.ttft_ms, ttft_calls = k.ttft_calls + n.ttft_calls,
            rates = k_rates[n.who]::bigint[], span_first = k_span_first[n.who], span_end = k_span_end[n.who],
            span_cost = k_span_cost[n.who], held_cost = k_held_cost[n.who], held_tokens = k_held_tokens[n.who],
            held_first = k_held_first[n.who], held_last = k_held_last[n.who], held_from_ms = k_held_from[n.who],
            held_until_ms = k_held_until[n.who]
        FROM (
            SELECT g.who, k_seen[g.who] AS seen, {schema}.plus(g.days)::integer AS days, {schema}.plus(g.requests) AS requests,
                {schema}.plus(g.calls) AS calls, {schema}.plus(g.cost) AS cost, {schema}.plus(g.input_tokens) AS input_tokens,
                {schema}.plus(g.output_tokens) AS output_tokens, {schema}.plus(g.cache_read_tokens) AS cache_read_tokens,
                {schema}.plus(g.unpriced) AS unpriced, {schema}.plus(g.errors) AS errors,
                {schema}.plus(g.latency_ms) AS latency_ms, {schema}.plus(g.timed) AS timed,
                {schema}.plus(g.ttft_ms) AS ttft_ms, {schema}.plus(g.ttft_calls) AS ttft_calls
            FROM (
                SELECT d.who, 0, d.requests, d.calls, d.cost, d.input_tokens, d.output_tokens, d.cache_read_tokens,
                    d.unpriced, d.errors, d.latency_ms, d.timed, d.ttft_ms, d.ttft_calls FROM adds d
                UNION ALL
                SELECT d.who, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM days d
                UNION ALL
                SELECT t.who, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
                FROM unnest(k_touched) WITH ORDINALITY AS t (touched, who) WHERE t.touched
            ) AS g (who, days, requests, calls, cost, input_tokens, output_tokens, cache_read_tokens, unpriced, errors,
                latency_ms, timed, ttft_ms, ttft_calls)
            GROUP BY g.who
        ) AS n
        WHERE k.c = k_c[n.who];
    ELSIF any_touched THEN
        UPDATE {schema}.customers k SET
            first_seen = CASE WHEN k.first_seen < 0 THEN now ELSE k.first_seen END,
            last_seen = CASE WHEN k.first_seen < 0 THEN now ELSE k.last_seen END,
            rates = k_rates[n.who]::bigint[], span_first = k_span_first[n.who], span_end = k_span_end[n.who],
            span_cost = k_span_cost[n.who], held_cost = k_held_cost[n.who], held_tokens = k_held_tokens[n.who],
            held_first = k_held_first[n.who], held_last = k_held_last[n.who], held_from_ms = k_held_from[n.who],
            held_until_ms = k_held_until[n.who]
        FROM unnest(k_touched) WITH ORDINALITY AS n (touched, who)
        WHERE n.touched AND k.c = k_c[n.who];
    END IF;
    IF made IS NOT NULL THEN  -- nothing came of it: it was never here
        DELETE FROM {schema}.customers k USING unnest(k_c, k_new, k_touched) AS n (c, new, touched)
            WHERE k.c = n.c AND n.new AND NOT n.touched;
    END IF;
    IF places > 0 THEN
        UPDATE {schema}.store t SET seq = b4.seq + places, latest_ms = greatest(b4.latest_ms, latest)
            FROM (SELECT l.seq, l.latest_ms, l.pruned_to FROM {schema}.store l WHERE l.one FOR UPDATE) AS b4
            WHERE t.one
            RETURNING b4.seq, b4.latest_ms, b4.pruned_to INTO first_seq, base_latest, pruned_since;
        IF pruned_since <> pruned_to THEN
            RAISE serialization_failure USING MESSAGE = 'entries were pruned meanwhile';
        END IF;
        IF revised THEN
            UPDATE {schema}.entries g SET seq = first_seq + n.place, rev = n.rev, cost = n.cost,
                latest_ms = greatest(base_latest, n.latest)
                FROM unnest(p_e_who, p_e_id, e_place, e_rev, e_cost, e_latest) AS n (who, id, place, rev, cost, latest)
                WHERE n.place > 0 AND n.rev > 1 AND g.c = k_c[n.who] AND g.id = n.id;
        END IF;
        INSERT INTO {schema}.entries (seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens,
                cache_read_tokens, latency_ms, ttft_ms, late, model, admission, kind, source, provider, status,
                trace_id, body)
            SELECT first_seq + e_place[o.entry], k_c[o.booked], p_e_id[o.entry], e_rev[o.entry], o.day, o.at_ms,
                greatest(base_latest, e_latest[o.entry]), e_cost[o.entry], o.input_tokens, o.output_tokens, o.cached,
                o.latency, o.ttft, e_late[o.entry], o.model, p_h_id[nullif(o.hold, 0)], o.kind, o.source, o.provider,
                o.status, o.trace, o.body
            FROM unnest(o_done, p_o_entry, p_o_booked, p_o_hold, p_o_day, p_b_at, p_o_in, p_o_out, p_b_cached,
                    p_b_latency, p_b_ttft, p_o_model, p_b_kind, p_b_source, p_b_provider, p_b_status, p_b_trace, p_b_body)
                AS o (done, entry, booked, hold, day, at_ms, input_tokens, output_tokens, cached, latency, ttft, model,
                    kind, source, provider, status, trace, body)
            WHERE o.done = 2;
    END IF;
    RETURN now || E'\x1e' || array_to_string(answers, E'\x1e');
END
$apply$;
