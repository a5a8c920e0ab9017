//! Faults in linear_sm90.cuh, and in what it uses of linear.cuh and row_part.cuh.

use crate::mutants;

mutants! { linear_sm90_bias:
    // The ring.
    stage_not_awaited: "linear_sm90.cuh", BULK | UNSET,
        "        mbarrier_wait(&at.full[cursor.stage], cursor.parity);\n" => "";
    full_of_the_round_before: "linear_sm90.cuh", BULK | UNSET | DEADLOCK,
        "mbarrier_wait(&at.full[cursor.stage], cursor.parity)" => "mbarrier_wait(&at.full[cursor.stage], cursor.parity ^ 1)";
    room_not_awaited: "linear_sm90.cuh", OVERRUN | WGMMA | BULK | RACE,
        "                    mbarrier_wait(&at.empty[cursor.stage], cursor.parity ^ 1);\n" => "";
    room_of_the_round_after: "linear_sm90.cuh", DEADLOCK | OVERRUN | BULK,
        "mbarrier_wait(&at.empty[cursor.stage], cursor.parity ^ 1)" => "mbarrier_wait(&at.empty[cursor.stage], cursor.parity)";
    bytes_of_a_alone_expected: "linear_sm90.cuh", DEADLOCK | OVERRUN | BULK,
        "mbarrier_arrive_expect(full, Tile::STAGE_BYTES)" => "mbarrier_arrive_expect(full, Tile::A_BYTES)";
    bytes_of_a_tile_more_expected: "linear_sm90.cuh", DEADLOCK,
        "mbarrier_arrive_expect(&at.full[s], Tile::STAGE_BYTES)" =>
        "mbarrier_arrive_expect(&at.full[s], Tile::STAGE_BYTES + Tile::A_BYTES)";
    first_stage_refilled_at_once: "linear_sm90.cuh", BULK | WGMMA | DEADLOCK,
        "if (!first || step >= ahead)" => "if (!first || step > ahead)";
    ring_goes_round_a_stage_early: "linear_sm90.cuh", DEADLOCK | WRONG | BULK | WGMMA | OVERRUN,
        "if (stage == Tile::STAGES) {" => "if (stage == Tile::STAGES - 1) {";
    parity_stays: "linear_sm90.cuh", DEADLOCK | BULK | WGMMA | WRONG | OVERRUN,
        "stage = 0, parity ^= 1;" => "stage = 0;";
    released_before_it_is_read: "linear_sm90.cuh", WGMMA,
        "            release<Tile>(before);  // a stage behind" =>
        "        }\n        {\n            release<Tile>(&at.empty[cursor.stage]);  // a stage behind",
        "    }\n    release<Tile>(before);\n}" => "    }\n}";
    last_stage_released_before_it_is_read: "linear_sm90.cuh", WGMMA,
        "#pragma unroll\n    for (int i = 0; i < Tile::HIGH; i++) {\n        wgmma_wait<0>(sums[i]);\n    }\n    release<Tile>(before);\n" =>
        "    release<Tile>(before);\n#pragma unroll\n    for (int i = 0; i < Tile::HIGH; i++) {\n        wgmma_wait<0>(sums[i]);\n    }\n";
    one_warp_releases: "linear_sm90.cuh", DEADLOCK,
        "if (lane() == 0) {\n            mbarrier_arrive(empty);" =>
        "if (lane() == 0 && warp() % 4 == 0) {\n            mbarrier_arrive(empty);";
    every_lane_releases: "linear_sm90.cuh", OVERRUN | WGMMA | DEADLOCK,
        "if (lane() == 0) {\n            mbarrier_arrive(empty);" => "if (lane() >= 0) {\n            mbarrier_arrive(empty);";
    one_group_speaks_for_both: "linear_sm90.cuh", OVERRUN | WGMMA | BULK | DEADLOCK,
        "READERS = (PINGPONG ? 1 : 2) * 4" => "READERS = 4";
    mbarriers_without_fence: "linear_sm90.cuh", PROXY,
        "        fence_mbarrier_init();\n" => "";
    mbarriers_without_barrier: "linear_sm90.cuh", NO_MBARRIER | RACE,
        "        block_barrier();  // the mbarriers are there for all\n" => "";
    ring_not_aligned: "linear_sm90.cuh", ALIGNMENT,
        "at.ring = align_1024(smem);" => "at.ring = smem;";
    mbarriers_in_the_second_half_of_given: "linear_sm90.cuh", TOUCHED,
        "at.given + 2 * Tile::GIVEN_BYTES" => "at.given + Tile::GIVEN_BYTES";
    producer_keeps_its_registers: "linear_sm90.cuh", REGISTERS,
        "        set_registers_dec<PRODUCER_REGISTERS>();\n" => "";

    // Clusters.
    room_in_one_block_is_enough: "linear_sm90.cuh", OVERRUN | WGMMA | BULK | CLUSTER_EXIT,
        "mbarrier_init(&at.empty[s], Tile::READERS * Tile::CLUSTER)" => "mbarrier_init(&at.empty[s], Tile::READERS)";
    room_not_awaited_in_a_cluster: "linear_sm90.cuh", OVERRUN | WGMMA | BULK | RACE | CLUSTER_EXIT,
        "                    mbarrier_wait_cluster(&at.empty[cursor.stage], cursor.parity ^ 1);\n" => "";
    room_awaited_as_of_one_block: "linear_sm90.cuh", CLUSTER_WAIT,
        "mbarrier_wait_cluster(&at.empty" => "mbarrier_wait(&at.empty";
    other_block_not_told: "linear_sm90.cuh", DEADLOCK,
        "} else if (lane() < Tile::CLUSTER) {" => "} else if (lane() == cluster_rank()) {";
    own_block_told_twice: "linear_sm90.cuh", WGMMA | BULK | OVERRUN | RACE | WRONG,
        "mbarrier_arrive_cluster(empty, lane())" => "mbarrier_arrive_cluster(empty, cluster_rank())";
    share_of_w_for_one_block: "linear_sm90.cuh", DEADLOCK,
        "n + share, full, 3)" => "n + share, full, 1 << cluster_rank())";
    first_share_of_w_twice: "linear_sm90.cuh", WRONG,
        "w, k, n + share, full, 3)" => "w, k, n, full, 3)";
    both_shares_at_the_same_place: "linear_sm90.cuh", BULK | RACE | UNSET | WRONG,
        "Tile::A_BYTES + share * 128" => "Tile::A_BYTES";
    both_blocks_at_the_same_rows: "linear_sm90.cuh", GLOBAL_RACE | WRONG,
        "(in_tiles.m * Tile::CLUSTER + rank) * Tile::BM" => "in_tiles.m * Tile::CLUSTER * Tile::BM";
    every_second_tile_left_out: "linear_sm90.cuh", WRONG,
        "step(blocks / Tile::CLUSTER)" => "step(blocks)";
    mbarriers_of_the_other_block_unknown: "linear_sm90.cuh", CLUSTER | NO_MBARRIER | RACE,
        "        cluster_barrier();  // for the other block as well\n" => "        block_barrier();\n";
    block_leaves_the_other: "linear_sm90.cuh", CLUSTER_EXIT,
        "        cluster_barrier();  // nobody returns" => "        // nobody returns";

    // Taking turns.
    turn_not_awaited: "linear_sm90.cuh", WRONG | BULK | UNSET | WGMMA | OVERRUN | DEADLOCK,
        "            mbarrier_wait(&at.turn[group], turn / 2 % 2 ^ (group == 0));\n" => "";
    turn_of_the_other_parity: "linear_sm90.cuh", DEADLOCK | OVERRUN,
        "turn / 2 % 2 ^ (group == 0)" => "turn / 2 % 2 ^ (group == 1)";
    turn_given_before_the_stages_are_seen: "linear_sm90.cuh", WRONG | BULK | UNSET | WGMMA | OVERRUN | DEADLOCK,
        "    if (Tile::PINGPONG && lane() == 0) {\n        mbarrier_arrive(&at.turn[1 - group]);\n    }\n" => "",
        "    Mbarrier *before = nullptr;" =>
        "    if (Tile::PINGPONG && lane() == 0) {\n        mbarrier_arrive(&at.turn[1 - group]);\n    }\n    Mbarrier *before = nullptr;";
    turn_of_one_warp: "linear_sm90.cuh", OVERRUN | DEADLOCK | WGMMA,
        "mbarrier_init(&at.turn[i], Tile::READERS)" => "mbarrier_init(&at.turn[i], 1)";
    a_step_too_few_skipped: "linear_sm90.cuh", DEADLOCK | WRONG | BULK | WGMMA | OVERRUN,
        "cursor.skip(steps);" => "cursor.skip(steps - 1);";
    parity_of_one_time_around: "linear_sm90.cuh", DEADLOCK | WRONG | BULK | WGMMA | OVERRUN | UNSET,
        "parity ^= to / Tile::STAGES & 1;" => "parity ^= to >= Tile::STAGES;";

    // From tile to tile.
    producer_does_one_tile: "linear_sm90.cuh", DEADLOCK,
        "for (int tile = tiles.first; tile < tiles.count; tile += tiles.step) {" =>
        "for (int tile = tiles.first; tile < tiles.count; tile += tiles.count) {";
    rows_and_columns_not_awaited: "linear_sm90.cuh", RACE | UNSET,
        "        mbarrier_wait(&at.ready[turn % 2], turn / 2 % 2);\n" => "";
    rows_and_columns_of_the_round_before: "linear_sm90.cuh", RACE | UNSET | DEADLOCK,
        "mbarrier_wait(&at.ready[turn % 2], turn / 2 % 2)" => "mbarrier_wait(&at.ready[turn % 2], turn / 2 % 2 ^ 1)";
    ready_before_they_are_there: "linear_sm90.cuh", RACE | UNSET,
        "        mbarrier_arrive(&at.ready[turn % 2]);\n" => "",
        "turn / 2 % 2 ^ 1);\n        for" => "turn / 2 % 2 ^ 1);\n        mbarrier_arrive(&at.ready[turn % 2]);\n        for";
    ready_by_one_warp: "linear_sm90.cuh", RACE | UNSET | OVERRUN | WRONG,
        "mbarrier_init(&at.ready[i], GIVERS * WARP)" => "mbarrier_init(&at.ready[i], WARP)";
    given_while_still_read: "linear_sm90.cuh", RACE | OVERRUN | DEADLOCK,
        "        mbarrier_wait(&at.taken[turn % 2], turn / 2 % 2 ^ 1);\n" => "";
    taken_of_the_round_after: "linear_sm90.cuh", DEADLOCK,
        "mbarrier_wait(&at.taken[turn % 2], turn / 2 % 2 ^ 1)" => "mbarrier_wait(&at.taken[turn % 2], turn / 2 % 2)";
    taken_forgotten: "linear_sm90.cuh", DEADLOCK,
        "        mbarrier_arrive(&at.taken[turn % 2]);\n" => "";
    taken_by_one_warp: "linear_sm90.cuh", RACE | OVERRUN | DEADLOCK | WRONG,
        "mbarrier_init(&at.taken[i], Tile::READERS * WARP)" => "mbarrier_init(&at.taken[i], WARP)";
    one_buffer_for_both_turns: "linear_sm90.cuh", RACE | WRONG | UNSET,
        "const unsigned char *rows = at.given + turn % 2 * Tile::GIVEN_BYTES" => "const unsigned char *rows = at.given";

    // wgmma.
    no_fence: "linear_sm90.cuh", FENCE,
        "    wgmma_fence();\n" => "";
    no_commit: "linear_sm90.cuh", EXIT_WGMMA | SUMS | WGMMA | WRONG,
        "    wgmma_commit();\n" => "";
    stage_before_not_waited_for: "linear_sm90.cuh", WGMMA,
        "        wgmma_wait<1>();\n" => "";
    sums_not_waited_for: "linear_sm90.cuh", SUMS | WRONG | EXIT_WGMMA | WGMMA,
        "wgmma_wait<0>(sums[i]);" => "wgmma_wait<1>(sums[i]);";
    stride_of_w: "linear_sm90.cuh", WRONG | BULK | UNSET,
        "descriptor_k_major(w + k * 32)" => "matrix_descriptor(w + k * 32, 16, 512)";
    stride_of_a: "linear_sm90.cuh", WRONG | BULK | UNSET | BOUNDS,
        "descriptor_k_major(a + i * 8192 + k * 32)" => "matrix_descriptor(a + i * 8192 + k * 32, 16, 2048)";
    swizzle_of_64_bytes: "ptx_sm90.cuh", DESCRIPTOR,
        "1ull << 62;" => "2ull << 62;";
    thirty_two_columns_further: "linear_sm90.cuh", WRONG | BULK | UNSET,
        "descriptor_k_major(w + k * 32)" => "descriptor_k_major(w + k * 64)";
    upper_sums_of_the_wrong_rows: "linear_sm90.cuh", WRONG,
        "a + i * 8192 + k * 32" => "a + i * 4096 + k * 32";
    groups_at_the_same_rows: "linear_sm90.cuh", WRONG,
        "(Tile::PINGPONG ? 0 : group * Tile::GROUP_M * 128)" => "0";
    sums_on_top_of_what_was_there: "linear_sm90.cuh", WRONG,
        "!first || k > 0" => "true";
    a_of_half_the_columns: "linear_sm90.cuh", WRONG,
        "tma_load_2d(stage, a, step * Tile::BK, from.m, full)" => "tma_load_2d(stage, a, step * Tile::BK / 2, from.m, full)";
    first_stages_of_w_alike: "linear_sm90.cuh", WRONG,
        "w, s * Tile::BK, from.n, &at.full[s])" => "w, 0, from.n, &at.full[s])";

    // The norm.
    columns_of_the_first_tile: "linear_sm90.cuh", WRONG,
        "const int n = from.n + i;" => "const int n = i;";
    columns_beyond_n_read: "linear_sm90.cuh", BOUNDS,
        "if (n < linear.n && E != Epilogue::EMBED)" => "if (n <= linear.n && E != Epilogue::EMBED)";
    norms_of_the_other_half: "linear_sm90.cuh", WRONG,
        "first + half * 8 + lane() / 4" => "first + (1 - half) * 8 + lane() / 4";
    norms_of_the_first_group: "linear_sm90.cuh", WRONG,
        "sums[i], rows + high * 8, columns" => "sums[i], rows, columns";
    means_of_the_other_fragment: "linear_sm90.cuh", WRONG,
        "hi = fma_rn(-norms[own].mean" => "hi = fma_rn(-norms[1 - own].mean";
    mean_without_the_column_sum: "linear_sm90.cuh", WRONG,
        "lo = fma_rn(-norms[own].mean, bits_to_f32(c.y), lo)" => "lo = (lo - norms[own].mean)";
    bias_before_the_deviation: "linear_sm90.cuh", WRONG,
        "lo = fma_rn(-norms[own].mean, bits_to_f32(c.y), lo) * norms[own].squares;" =>
        "lo = (fma_rn(-norms[own].mean, bits_to_f32(c.y), lo) + bits_to_f32(c.x)) * norms[own].squares - bits_to_f32(c.x);";
    eps_outside_the_root: "linear_sm90.cuh", WRONG,
        "sqrt_rn(variance + eps)" => "(sqrt_rn(variance) + eps)";
    parts_weigh_alike: "linear_sm90.cuh", WRONG,
        "div_rn(part.count, own.count + part.count)" => "own.count > 0.0f ? 0.5f : 1.0f";
    lanes_without_parts_count: "linear_sm90.cuh", WRONG,
        "count > 0.0f ? div_rn(other.count, count) : 0.0f" => "div_rn(other.count, count)";
    distance_between_means_forgotten: "linear_sm90.cuh", WRONG,
        "fma_rn(distance * distance, a.count * share, b.squares)" => "b.squares";
    count_of_one_part: "linear_sm90.cuh", WRONG,
        "    a.count += b.count;\n" => "    a.count = b.count;\n";
    last_lanes_not_merged: "linear_sm90.cuh", WRONG,
        "apart < 8; apart *= 2" => "apart < 4; apart *= 2";
    parts_of_rows_beyond_the_end: "linear_sm90.cuh", BOUNDS,
        "static_cast<long long>(live ? m : 0)" => "static_cast<long long>(m)",
        "p < parts && live" => "p < parts";

    // To memory.
    quads_trade_with_the_wrong_lane: "numerics.cuh", WRONG,
        "upper ? r[i] : r[i | bit], bit)" => "upper ? r[i] : r[i | bit], bit ^ 3)";
    row_guard_one_late: "linear_sm90.cuh", BOUNDS | GLOBAL_RACE | WRONG,
        "row < linear.m && n < linear.n;" => "row <= linear.m && n < linear.n;";
    column_guard_one_late: "linear_sm90.cuh", BOUNDS | GLOBAL_RACE | WRONG,
        "row < linear.m && n < linear.n;" => "row < linear.m && n <= linear.n;";
    last_columns_left_out: "linear_sm90.cuh", WRONG,
        "if (Tile::BN % 32 != 0) {" => "if (false) {";
    rows_of_the_last_columns: "linear_sm90.cuh", WRONG | GLOBAL_RACE | BOUNDS,
        "(WIDE ? half : t / 2) * 8" => "(WIDE ? half : t % 2) * 8";
    fragments_of_the_last_columns: "linear_sm90.cuh", WRONG,
        "(WIDE ? i : i % 2), own = WIDE ? half : i / 2" => "(WIDE ? i : i / 2), own = WIDE ? half : i % 2";
    groups_store_the_same_rows: "linear_sm90.cuh", GLOBAL_RACE | WRONG,
        "columns, to.m + high, to.n)" => "columns, to.m, to.n)";

    // Launches that overlap.
    a_before_the_wait: "linear_sm90.cuh", LATE,
        "            grid_wait();\n        }\n#pragma" => "        }\n#pragma";
    wait_after_the_first_of_a: "linear_sm90.cuh", LATE,
        "            grid_wait();\n        }\n#pragma" => "        }\n#pragma",
        "from.m, full);\n" => "from.m, full);\n            if (first && step == 0) {\n                grid_wait();\n            }\n";
    partials_before_the_wait: "linear_sm90.cuh", LATE,
        "    const int giver = warp() - 1;\n    grid_wait();\n" => "    const int giver = warp() - 1;\n";
    wait_after_the_first_partials: "linear_sm90.cuh", LATE,
        "    const int giver = warp() - 1;\n    grid_wait();\n" => "    const int giver = warp() - 1;\n",
        "        mbarrier_arrive(&at.ready[turn % 2]);\n" => "        grid_wait();\n        mbarrier_arrive(&at.ready[turn % 2]);\n";
}

mutants! { linear_sm90_residual:
    extra_not_traded: "linear_sm90.cuh", WRONG,
        "        transpose_quad(words);\n    }\n" => "    }\n";
    extra_by_the_pitch_of_out: "linear_sm90.cuh", WRONG | BOUNDS,
        "extra_row<E>(linear, row)) * linear.extra_pitch" => "extra_row<E>(linear, row)) * linear.a_pitch";
    extra_of_the_kept_row: "linear_sm90.cuh", WRONG | BOUNDS,
        "extra_row<E>(linear, row)) *" => "extra_row<E>(linear, args.drop == 0 ? row : row - row / args.drop)) *";
    extra_beyond_n_read: "linear_sm90.cuh", BOUNDS | GLOBAL_RACE,
        "if (live) {\n            const vec16 extra" => "if (row < linear.m) {\n            const vec16 extra";
    kept_row_off_by_one: "linear_sm90.cuh", WRONG | BOUNDS | GLOBAL_RACE,
        "to = row - group - 1;" => "to = row - group;";
    last_row_dropped: "linear_sm90.cuh", WRONG,
        "to = row - group - 1;" => "to = row - group;",
        "return row != group * args.drop;" => "return row != group * args.drop + args.drop - 1;";
    dropped_rows_stored: "linear_sm90.cuh", WRONG | BOUNDS | GLOBAL_RACE,
        "return row != group * args.drop;" => "return true;";
    statistics_of_dropped_rows: "linear_sm90.cuh", WRONG | BOUNDS | GLOBAL_RACE,
        "if (kept && t % 2 == 0)" => "if (live && t % 2 == 0)";
    statistics_by_the_row_of_a: "linear_sm90.cuh", WRONG | BOUNDS,
        "store_part(args.partials_out, linear.n, to, n, part)" => "store_part(args.partials_out, linear.n, row, n, part)";
    statistics_of_what_is_added: "linear_sm90.cuh", WRONG,
        "const RowPart part = part_of(values);" =>
        "const RowPart part = part_of(live ? load_16(linear.extra + static_cast<long long>(row) * linear.extra_pitch + n) : vec16{});";
    statistics_by_lanes_that_keep: "linear_sm90.cuh", DIVERGENCE,
        "if (args.partials_out != nullptr) {" => "if (args.partials_out != nullptr && kept) {";
    statistics_in_one_pass: "row_part.cuh", WRONG,
        "squares = fma_rn(x[i] - mean, x[i] - mean, squares);" => "squares = fma_rn(x[i], x[i], squares);",
        "    squares += shuffle_xor(squares, 1);\n" =>
        "    squares += shuffle_xor(squares, 1);\n    squares -= mean * mean * PART;\n";
    squares_of_eight_columns: "row_part.cuh", WRONG,
        "    squares += shuffle_xor(squares, 1);\n" => "";
    mean_of_eight_columns: "row_part.cuh", WRONG,
        "sum * (1.0f / PART)" => "sum * (1.0f / CHUNK)";
    parts_by_the_width: "row_part.cuh", WRONG | BOUNDS | GLOBAL_RACE,
        "row * (width / PART)" => "row * width";
}

mutants! { linear_sm90_embed:
    class_row_missing: "linear.cuh", WRONG,
        "if (patch == 0) {\n            store_class" => "if (false) {\n            store_class";
    class_row_takes_position_one: "linear.cuh", WRONG,
        "args.extra[column + i]);\n" => "args.extra[args.extra_pitch + column + i]);\n";
    positions_off_by_one: "linear.cuh", WRONG,
        "E == Epilogue::EMBED ? 1 + row % args.group" => "E == Epilogue::EMBED ? row % args.group";
    positions_by_all_rows: "linear_sm90.cuh", WRONG | BOUNDS,
        "extra_row<E>(linear, row)) *" => "(1 + row)) *";
    rows_of_images_one_short: "linear.cuh", GLOBAL_RACE | WRONG | BOUNDS,
        "image) * (args.group + 1) + 1 + patch" => "image) * args.group + 1 + patch";
    positions_before_the_wait: "linear_sm90.cuh", LATE,
        "            grid_wait();\n        }\n#pragma" => "        }\n#pragma";
}

mutants! { linear_sm90_scatter:
    taken_for_aligned: "linear_sm90.cuh", ALIGNMENT,
        "if (reinterpret_cast<unsigned long long>(at) % 16 == 0)" => "if (true)";
    aligned_to_eight: "linear_sm90.cuh", ALIGNMENT,
        "if (reinterpret_cast<unsigned long long>(at) % 16 == 0)" => "if (reinterpret_cast<unsigned long long>(at) % 8 == 0)";
    cut_slot_takes_a_row_too_many: "linear_sm90.cuh", WRONG,
        "if (patch < to.rows)" => "if (patch <= to.rows)";
    last_slot_of_an_image_left_out: "linear_sm90.cuh", WRONG,
        "slot < end; slot++" => "slot < end - 1; slot++";
    slots_of_the_next_image: "linear_sm90.cuh", WRONG | BOUNDS,
        "end = args.slot_begin[image + 1]" => "end = args.slot_begin[image + 2]",
        "slot = args.slot_begin[image];" => "slot = args.slot_begin[image + 1];";
    slots_by_the_pitch_of_out: "linear_sm90.cuh", WRONG | GLOBAL_RACE | BOUNDS,
        "patch * to.pitch + n" => "patch * args.out_pitch + n";
    columns_of_the_first_eight: "linear_sm90.cuh", WRONG | GLOBAL_RACE,
        "patch * to.pitch + n" => "patch * to.pitch";
    element_of_the_next: "linear_sm90.cuh", WRONG,
        "at[i] = element(values, i);" => "at[i] = element(values, i ^ 1);";
}
