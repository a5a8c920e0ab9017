//! Faults on the way from pixels to patches: resize.cu, patches.cu.

use crate::mutants;

mutants! { resize:
    not_rounded: "resize.cu", WRONG,
        "START = 1 << (PRECISION - 1)" => "START = 0";
    not_clipped_above: "resize.cu", WRONG,
        "value < 0 ? 0 : value > 255 ? 255 : value" => "value < 0 ? 0 : value";
    blocks_swapped: "resize.cu", WRONG | BOUNDS,
        "x = block_y() * THREADS + thread_x(), row = block_x() * ROWS" =>
        "x = block_x() * THREADS + thread_x(), row = block_y() * ROWS";
    pixel_guard_one_late: "resize.cu", BOUNDS,
        "if (x >= width_out)" => "if (x > width_out)";
    rows_beyond_the_end: "resize.cu", BOUNDS,
        "rows - row < ROWS ? rows - row : ROWS, pixels" => "ROWS, pixels";
    weights_packed_by_count: "resize.cu", WRONG,
        "weights + static_cast<long long>(x) * taps" => "weights + static_cast<long long>(x) * pixels";
    weights_beyond_the_window: "resize.cu", WRONG | BOUNDS,
        "k < pixels; k++" => "k < taps; k++";
    pitches_swapped_down: "resize.cu", WRONG | BOUNDS,
        "            from += in_pitch;\n        }\n        *re" => "            from += out_pitch;\n        }\n        *re";
    four_bytes_at_the_end_of_a_row: "resize.cu", WRONG | BOUNDS,
        "if (aligned && bytes == ACROSS)" => "if (aligned)";
    alignment_without_the_pitch: "resize.cu", ALIGNMENT,
        "((places | static_cast<unsigned>(in_pitch | out_pitch)) & 3)" => "(places & 3)";
    last_row_of_the_window_left_out: "resize.cu", WRONG,
        "    for (int k = 0; k < window; k++) {\n        const int w = weight[k];\n#pragma unroll\n        for (int i = 0; i < ACROSS; i++) {\n            if" =>
        "    for (int k = 0; k < window - 1; k++) {\n        const int w = weight[k];\n#pragma unroll\n        for (int i = 0; i < ACROSS; i++) {\n            if";
}

mutants! { patches:
    table_barrier_deleted: "patches.cu", RACE | UNSET,
        "block_barrier();  // the table" => "// the table";
    half_of_the_table: "patches.cu", UNSET,
        "if (thread_x() < TABLE_BYTES / 16) {" => "if (thread_x() < TABLE_BYTES / 32) {";
    table_beyond_the_launch: "patches.cu", BOUNDS | SHARED_BOUNDS,
        "if (thread_x() < TABLE_BYTES / 16) {" => "if (thread_x() <= TABLE_BYTES / 16) {";
    threads_leave_before_the_barrier: "patches.cu", BARRIER,
        "    block_barrier();  // the table" =>
        "    if (thread_x() >= PATCHES * out_pitch / CHUNK) { return; }\n    block_barrier();  // the table";
    patch_guard_one_late: "patches.cu", BOUNDS,
        "if (p >= grid * grid)" => "if (p > grid * grid)";
    blue_first: "patches.cu", WRONG,
        "row[x * COLOURS + c]" => "row[x * COLOURS + 2 - c]";
    rows_and_columns_swapped: "patches.cu", WRONG,
        "y = column % square / patch, x = column % square % patch" =>
        "x = column % square / patch, y = column % square % patch";
    padding_read_from_the_table: "patches.cu", SHARED_BOUNDS | BOUNDS,
        "if (c < COLOURS) {" => "{";
    padding_left_as_it_is: "patches.cu", WRONG,
        "chunks = out_pitch / CHUNK;" => "chunks = ceil_div(COLOURS * square, CHUNK);";
    pitch_of_a_packed_picture: "patches.cu", WRONG,
        "static_cast<long long>(p / grid * patch) * rgb_pitch" =>
        "static_cast<long long>(p / grid * patch) * (grid * patch * COLOURS)";
}
