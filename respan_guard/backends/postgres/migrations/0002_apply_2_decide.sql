    -- Decide, in order of arrival. Continues 0002_apply_1_load.sql.
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
                IF k_held_from[w] = now THEN  -- what is held was added up anew, perhaps with it: the clock went back
                    k_touched[w] := true; any_touched := true;
                END IF;
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

