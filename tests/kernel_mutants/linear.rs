//! Faults in the linear layers: linear_sm80.cu's main loop, linear.cuh's epilogues.

use crate::mutants;

mutants! { linear_bias:
    // The ring.
    first_barrier_deleted: "linear_sm80.cu", COPY | RACE | UNSET,
        "block_barrier();  // stage 0 has landed" => "// stage 0 has landed";
    step_barrier_deleted: "linear_sm80.cu", COPY | RACE,
        "block_barrier();  // the next stage has landed" => "// the next stage has landed";
    first_wait_off_by_one: "linear_sm80.cu", COPY,
        "Fragments<Tile> first, second;\n    cp_async_wait<Tile::STAGES - 2>();" =>
        "Fragments<Tile> first, second;\n    cp_async_wait<Tile::STAGES - 1>();";
    step_wait_off_by_one: "linear_sm80.cu", COPY,
        "        cp_async_wait<Tile::STAGES - 2>();\n        block_barrier();  // the next" =>
        "        cp_async_wait<Tile::STAGES - 1>();\n        block_barrier();  // the next";
    no_empty_groups_at_the_end: "linear_sm80.cu", COPY,
        "* Tile::BK, args.k);\n        }\n        cp_async_commit();\n        multiply" =>
        "* Tile::BK, args.k);\n            cp_async_commit();\n        }\n        multiply";
    a_stage_freed_too_early: "linear_sm80.cu", COPY | RACE,
        "write = read;\n        read =" => "write = (read + Tile::STAGE_BYTES) % Tile::SHARED_BYTES;\n        read =";
    ring_wraps_one_stage_late: "linear_sm80.cu", SHARED_BOUNDS | NOT_SHARED,
        "read + Tile::STAGE_BYTES < Tile::SHARED_BYTES ?" => "read + Tile::STAGE_BYTES <= Tile::SHARED_BYTES ?";

    // Where things lie.
    swizzle_of_copies_by_another_row: "linear_sm80.cu", WRONG,
        "(chunk ^ (row / 2 % 4)) * 16" => "(chunk ^ (row % 4)) * 16";
    swizzle_of_w_forgotten: "linear_sm80.cu", WRONG,
        "(b_chunk ^ (b_row / 2 % 4)) * 16" => "b_chunk * 16";
    matrices_of_w_in_the_order_of_a: "linear_sm80.cu", WRONG,
        "lane() / 16 * 8 + lane() % 8, b_chunk = lane() / 8 % 2" =>
        "lane() / 8 % 2 * 8 + lane() % 8, b_chunk = lane() / 16";
    columns_of_a_fragment_not_doubled: "linear_sm80.cu", ALIGNMENT,
        "Tile::WARP_N + lane() % 4 * 2;" => "Tile::WARP_N + lane() % 4;";
    sums_start_anywhere: "linear_sm80.cu", WRONG,
        "Accumulators<Tile> acc = {};" => "Accumulators<Tile> acc;";
    tile_rows_and_columns_swapped: "linear.cuh", WRONG,
        "LINEAR_GROUP + within % height, within / height}" => "LINEAR_GROUP + within / height, within % height}";
    last_band_as_high_as_others: "linear.cuh", WRONG,
        "left < LINEAR_GROUP ? left : LINEAR_GROUP" => "LINEAR_GROUP";

    // Tails.
    k_guard_one_chunk_late: "linear_sm80.cu", WRONG | BOUNDS,
        "k + copies.column < end;" => "k + copies.column <= end;";
    rows_of_w_clamped_one_late: "linear_sm80.cu", BOUNDS,
        "n = n < args.n ? n : args.n - 1;" => "n = n <= args.n ? n : args.n - 1;";
    class_row_not_skipped: "linear_sm80.cu", WRONG,
        "m / args.group + 1 : m;" => "m / args.group : m;";
    bias_beyond_n_read: "linear_sm80.cu", BOUNDS,
        "E != Epilogue::EMBED && n < args.n ?" => "E != Epilogue::EMBED && n <= args.n ?";
    row_guard_one_late: "linear.cuh", BOUNDS | WRONG,
        "if (row < args.m && count > 0)" => "if (row <= args.m && count > 0)";
    columns_beyond_n_written: "linear.cuh", BOUNDS | GLOBAL_RACE | WRONG,
        "const int count = args.n - column < CHUNK ? args.n - column : CHUNK;\n        if" =>
        "const int count = args.n - column > 0 ? CHUNK : 0;\n        if";

    // Through the stage.
    tile_barrier_deleted: "linear_sm80.cu", RACE | UNSET | COPY,
        "block_barrier();  // the tile is complete" => "// the tile is complete";
}

mutants! { linear_quick_gelu:
    exact_gelu_in_the_tower: "linear.cuh", WRONG,
        "return quick_gelu(acc + bias)" => "return gelu(acc + bias)";
}

mutants! { linear_gelu:
    gelu_by_tanh: "linear.cuh", WRONG,
        "return gelu(acc + bias)" =>
        "{ const float x = acc + bias; return 0.5f * x * (1.0f + tanh_approx(0.7978846f * (x + 0.044715f * x * x * x))); }";
}

mutants! { linear_residual:
    extra_barrier_deleted: "linear_sm80.cu", COPY | RACE | UNSET,
        "block_barrier();  // extra has landed" => "// extra has landed";
    extra_not_waited_for: "linear.cuh", COPY,
        "cp_async_commit();\n    cp_async_wait<0>();\n}\n\ntemplate <Epilogue E> PTX_INLINE float finish" =>
        "cp_async_commit();\n}\n\ntemplate <Epilogue E> PTX_INLINE float finish";
    extra_beyond_n_read: "linear.cuh", BOUNDS,
        "count = left < 0 ? 0 : left < CHUNK ? left : CHUNK;" => "count = left < 0 ? 0 : CHUNK;";
    extra_taken_for_aligned: "linear.cuh", ALIGNMENT,
        "aligned = rows_aligned(args.extra, args.extra_pitch)" => "aligned = true";
    rounded_twice: "linear.cuh", WRONG,
        "return extra + (acc + bias)" => "return extra + fp16_to_f32(f32_to_fp16(acc + bias))";
    /// In place: another block may have written that row.
    row_of_the_neighbour_added: "linear.cuh", GLOBAL_RACE | WRONG | BOUNDS,
        "1 + row % args.group : row;" => "1 + row % args.group : row + 1;";
    pitches_swapped: "linear.cuh", WRONG | BOUNDS,
        "extra_row<E>(args, row)) * args.extra_pitch" => "extra_row<E>(args, row)) * args.a_pitch";
}

mutants! { linear_embed:
    rows_of_images_one_short: "linear.cuh", GLOBAL_RACE | WRONG | BOUNDS,
        "image) * (args.group + 1) + 1 + patch" => "image) * args.group + 1 + patch";
    class_row_missing: "linear.cuh", WRONG,
        "if (patch == 0) {\n            store_class" => "if (false) {\n            store_class";
    class_row_for_every_patch: "linear.cuh", RACE | GLOBAL_RACE | WRONG,
        "if (patch == 0) {\n            store_class" => "if (patch >= 0) {\n            store_class";
    class_row_takes_position_one: "linear.cuh", WRONG,
        "args.extra[column + i]);\n" => "args.extra[args.extra_pitch + column + i]);\n";
    positions_off_by_one: "linear.cuh", WRONG,
        "E == Epilogue::EMBED ? 1 + row % args.group" => "E == Epilogue::EMBED ? row % args.group";
}

mutants! { linear_scatter:
    slots_off_by_one_image: "linear.cuh", BOUNDS | WRONG,
        "end = args.slot_begin[image + 1]" => "end = args.slot_begin[image + 2]",
        "slot = args.slot_begin[image];" => "slot = args.slot_begin[image + 1];";
    last_slot_of_an_image_left_out: "linear.cuh", WRONG,
        "slot < end; slot++" => "slot < end - 1; slot++";
    cut_slot_takes_a_row_too_many: "linear.cuh", WRONG,
        "if (patch < to.rows)" => "if (patch <= to.rows)";
    pitch_of_out_for_slots: "linear.cuh", WRONG | GLOBAL_RACE | BOUNDS,
        "to.first + patch * to.pitch + column" => "to.first + patch * args.out_pitch + column";
    image_and_patch_swapped: "linear.cuh", WRONG | BOUNDS,
        "const int image = row / args.group, patch = row - image * args.group;\n        const int end" =>
        "const int patch = row / args.group, image = row - patch * args.group;\n        const int end";
    row_of_all_images_for_patch: "linear.cuh", WRONG | GLOBAL_RACE | BOUNDS,
        "to.first + patch * to.pitch + column" => "to.first + row * to.pitch + column";
}
