//! Faults in attention_sm90.cu, and in attention.cuh as that uses it.

use crate::mutants;

mutants! { attention_sm90:
    // Barriers, phases, bytes.
    keys_not_awaited: "attention_sm90.cu", BULK | UNSET,
        "        from.k.await(k_at);\n" => "";
    values_not_awaited: "attention_sm90.cu", BULK | UNSET,
        "        from.v.await(v_at);\n" => "";
    queries_not_awaited: "attention_sm90.cu", BULK | UNSET,
        "            from.q.await(q_at);\n" => "";
    full_of_the_round_before: "attention_sm90.cu", BULK | UNSET | DEADLOCK,
        "mbarrier_wait(&full[at.stage], at.parity)" => "mbarrier_wait(&full[at.stage], at.parity ^ 1)";
    empty_of_the_round_after: "attention_sm90.cu", DEADLOCK,
        "mbarrier_wait(&empty[at.stage], at.parity ^ 1)" => "mbarrier_wait(&empty[at.stage], at.parity)";
    parity_stays: "attention_sm90.cu", DEADLOCK | BULK | OVERRUN | WGMMA | WRONG,
        "            parity ^= 1;\n" => "";
    half_of_the_bytes_expected: "attention_sm90.cu", DEADLOCK,
        "mbarrier_arrive_expect(&full[at.stage], BYTES);" => "mbarrier_arrive_expect(&full[at.stage], BYTES / 2);";
    more_bytes_expected: "attention_sm90.cu", DEADLOCK,
        "mbarrier_arrive_expect(&full[at.stage], BYTES);" => "mbarrier_arrive_expect(&full[at.stage], BYTES + 128);";
    every_lane_releases: "attention_sm90.cu", OVERRUN | DEADLOCK,
        "if (lane() == 0) {\n            mbarrier_arrive" => "if (lane() >= 0) {\n            mbarrier_arrive";
    one_consumer_speaks_for_all: "attention_sm90.cu", OVERRUN | WGMMA | DEADLOCK,
        "rings.k.init(GROUPS * GROUP_WARPS);" => "rings.k.init(GROUP_WARPS);";
    keys_released_before_they_are_read: "attention_sm90.cu", WGMMA,
        "        from.k.release(k_at);\n" => "        k_at.advance();\n",
        "d > 0);\n        }\n        wgmma_commit();\n" =>
        "d > 0);\n        }\n        wgmma_commit();\n        Place<STAGES> now = k_at;\n        from.k.release(now);\n";
    values_released_before_they_are_read: "attention_sm90.cu", WGMMA,
        "        wgmma_wait<0>(o);\n" => "        from.v.release(v_at);\n        wgmma_wait<0>(o);\n",
        "        from.v.release(v_at);\n    }\n" => "    }\n";
    queries_released_a_tile_early: "attention_sm90.cu", OVERRUN | WGMMA | BULK | DEADLOCK | WRONG,
        "if (key + KEYS >= work.tokens) {\n            from.q" =>
        "if (key + 2 * KEYS >= work.tokens) {\n            from.q";
    queries_released_before_they_are_read: "attention_sm90.cu", WGMMA,
        "            from.q.release(q_at);\n" => "            q_at.advance();\n",
        "            from.q.await(q_at);\n" =>
        "            from.q.await(q_at);\n            Place<2> now = q_at;\n            from.q.release(now);\n";
    a_tile_too_many_copied: "attention_sm90.cu", EXIT_BULK | DEADLOCK | WRONG,
        "key < work.tokens; key += KEYS" => "key <= work.tokens; key += KEYS";
    a_task_too_few_copied: "attention_sm90.cu", DEADLOCK,
        "i < work.tasks; i += grid_x()" => "i + 1 < work.tasks; i += grid_x()";
    mbarriers_without_fence: "attention_sm90.cu", PROXY,
        "        fence_mbarrier_init();\n" => "";
    mbarriers_without_barrier: "attention_sm90.cu", NO_MBARRIER | RACE,
        "    block_barrier();  // the mbarriers are there for all\n" => "";

    // wgmma.
    scores_without_fence: "attention_sm90.cu", FENCE,
        "        wgmma_fence();\n#pragma unroll\n        for (int d" => "#pragma unroll\n        for (int d";
    output_without_fence: "attention_sm90.cu", FENCE,
        "        wgmma_fence();\n#pragma unroll\n        for (int step" => "#pragma unroll\n        for (int step";
    scores_not_waited_for: "attention_sm90.cu", SUMS | WRONG,
        "        wgmma_wait<1>(s);\n" => "";
    output_not_waited_for: "attention_sm90.cu", SUMS | WRONG | EXIT_WGMMA | WGMMA,
        "        wgmma_wait<0>(o);\n" => "        wgmma_wait<1>(o);\n";
    first_scores_not_waited_for: "attention_sm90.cu", SUMS | WRONG,
        "        wgmma_wait<0>(s);\n" => "        wgmma_wait<1>(s);\n";

    // Where things lie.
    stride_of_keys: "attention_sm90.cu", WRONG,
        "descriptor_k_major(rings.k.tiles)" => "matrix_descriptor(rings.k.tiles, 16, 512)";
    sixteen_columns_further: "attention_sm90.cu", WRONG | UNSET | BULK,
        "descriptor_after(b, d * 32)" => "descriptor_after(b, d * 64)";
    sixteen_values_further: "attention_sm90.cu", WRONG,
        "step * 16 * ROW_BYTES" => "step * 8 * ROW_BYTES";
    values_k_major: "attention_sm90.cu", WRONG | BULK | UNSET,
        "wgmma_rs<HS, true>" => "wgmma_rs<HS, false>";
    both_consumers_at_the_same_queries: "attention_sm90.cu", WRONG,
        "rings.q.tiles + which * GROUP_BYTES" => "rings.q.tiles";
    queries_copied_twice: "attention_sm90.cu", WRONG,
        "task.query + g * GROUP_QUERIES" => "task.query";
    keys_of_stage_0: "attention_sm90.cu", WRONG | BULK,
        "descriptor_after(k_tiles, k_at.stage * TILE_BYTES)" => "k_tiles";
    keys_for_values: "attention_sm90.cu", WRONG,
        "kv, 2 * width + column" => "kv, width + column";
    keys_of_the_first_image: "attention_sm90.cu", WRONG,
        "kv, width + column, key, task.image, full" => "kv, width + column, key, 0, full";
    queries_of_the_first_head: "attention_sm90.cu", WRONG,
        "q, column, task.query" => "q, 0, task.query";
    images_by_pitch_alone: "attention_sm90.cu", WRONG | GLOBAL_RACE | BOUNDS,
        "static_cast<long long>(t.image) * work.tokens * work.pitch" => "static_cast<long long>(t.image) * work.pitch";
    pairs_in_another_order: "attention_sm90.cu", WRONG | BOUNDS | GLOBAL_RACE,
        "pair % work.heads, pair / work.heads" => "pair / work.heads, pair % work.heads";
    quads_trade_once: "numerics.cuh", WRONG,
        "bit <= 2; bit *= 2" => "bit <= 1; bit *= 2";

    // Tails, and what one task leaves to the next.
    mask_forgotten: "attention_sm90.cu", WRONG,
        "if (key + KEYS > work.tokens) {" => "if (false) {";
    mask_one_key_late: "attention.cuh", WRONG,
        "i % 2 >= keys" => "i % 2 > keys";
    row_guard_one_late: "attention_sm90.cu", BOUNDS | GLOBAL_RACE | WRONG,
        "if (row + half * 8 < tokens)" => "if (row + half * 8 <= tokens)";
    sums_of_the_next_task: "attention_sm90.cu", WRONG,
        "finish(done, sum);" => "finish(done, rows.sum);";
    tops_of_the_task_before: "attention_sm90.cu", WRONG,
        "        if (key == 0) {\n            rows" => "        if (key == 0 && task == block_x()) {\n            rows";
    output_on_top_of_what_was_there: "attention_sm90.cu", WRONG,
        "step > 0 || key > 0" => "true";
    next_task_is_the_neighbour: "attention_sm90.cu", WRONG | GLOBAL_RACE | BOUNDS,
        "            task += grid_x();\n" => "            task += 1;\n";

    // The softmax.
    decay_of_one_row_for_both: "attention_sm90.cu", WRONG,
        "shrink(o, 1, decay[1]);" => "shrink(o, 1, decay[0]);";
    output_does_not_decay: "attention.cuh", WRONG,
        "at(o, i + 1) *= decay;" => "";
    tops_by_a_fixed_scale: "attention_sm90.cu", WRONG,
        "raise_top(s, rows, 1, work.scale)" => "raise_top(s, rows, 1, 0.125f * LOG2_E)";
    sixteen_keys_unweighed: "attention_sm90.cu", WRONG,
        "exponentiate(s, rows, 1, work.scale, step * 8, step * 8 + 8)" =>
        "exponentiate(s, rows, 1, work.scale, step * 8, step * 8 + 4)";
    fragments_of_the_step_before: "attention_sm90.cu", WRONG,
        "            weigh(s, step);\n            fragment(p[step], s, step);" =>
        "            weigh(s, step);\n            fragment(p[step], s, step > 0 ? step - 1 : 0);";

    // Launches that overlap.
    no_dependency_wait: "attention_sm90.cu", LATE,
        "    grid_wait();\n" => "";
    consumers_alone_wait: "attention_sm90.cu", LATE,
        "    grid_wait();\n" => "    if (thread_x() >= WARP_GROUP) {\n        grid_wait();\n    }\n";
    wait_after_the_copies: "attention_sm90.cu", LATE,
        "    grid_wait();\n" => "",
        "            produce<GROUPS>(rings, q, kv, work);\n" => "            produce<GROUPS>(rings, q, kv, work);\n            grid_wait();\n";
}
