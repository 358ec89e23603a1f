    -- Write. Continues 0002_apply_2_decide.sql. Counted rates and the budget's sum go back into the customer's row.
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
