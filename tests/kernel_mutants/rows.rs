//! Faults in what goes over rows of numbers: numerics.cuh, layer_norm.cu, convert.cu with range.cuh, embed_tokens.cu,
//! verify.cu.

use crate::mutants;

mutants! { activation:
    quick_gelu_of_1_7: "numerics.cuh", WRONG,
        "(-1.702f * LOG2_E)" => "(-1.7f * LOG2_E)";
    a_digit_of_the_polynomial: "numerics.cuh", WRONG,
        "0.07858574" => "0.07868574";
    square_overflows: "numerics.cuh", WRONG,
        "min_f32(13.0f, x < 0.0f ? -x : x)" => "x < 0.0f ? -x : x";
    nan_becomes_a_number: "numerics.cuh", WRONG,
        "(x < 0.0f ? 0.0f : x) - " => "max_f32(x, 0.0f) - ";
    gelu_by_tanh: "numerics.cuh", WRONG,
        "return (x < 0.0f ? 0.0f : x) - (a * e) * (u * q);" =>
        "return 0.5f * x * (1.0f + tanh_approx(0.7978846f * (x + 0.044715f * x * x * x)));";
}

mutants! { layer_norm:
    eps_outside_the_root: "layer_norm.cu", WRONG,
        "sqrt_rn(variance + eps)" => "(sqrt_rn(variance) + eps)";
    eps_of_another_model: "layer_norm.cu", WRONG,
        "sqrt_rn(variance + eps)" => "sqrt_rn(variance + 1e-6f)";
    unbiased_variance: "layer_norm.cu", WRONG,
        "div_rn(warp_sum(squares), static_cast<float>(width))" => "div_rn(warp_sum(squares), static_cast<float>(width - 1))";
    variance_in_one_pass: "layer_norm.cu", WRONG,
        "const float d = x[i] - mean;" => "const float d = x[i];",
        "static_cast<float>(width));\n    const float scale" => "static_cast<float>(width)) - mean * mean;\n    const float scale";
    mean_rounded_to_fp16: "layer_norm.cu", WRONG,
        "const float mean = div_rn(warp_sum(sum), static_cast<float>(width));" =>
        "const float mean = fp16_to_f32(f32_to_fp16(div_rn(warp_sum(sum), static_cast<float>(width))));";
    statistics_of_the_first_row: "layer_norm.cu", WRONG,
        "sum = add_all(sum, kept[i]);" => "sum = add_all(sum, load_16(x + first + i * STRIDE));";
    rows_by_width_not_pitch: "layer_norm.cu", WRONG,
        "static_cast<long long>(row) * pitch" => "static_cast<long long>(row) * width";
    row_guard_one_late: "layer_norm.cu", BOUNDS,
        "row < rows ? width : 0" => "row <= rows ? width : 0";
    chunk_guard_one_late: "layer_norm.cu", BOUNDS | WRONG,
        "const int c = first + i * STRIDE;\n        vec16 stored = {};\n        if (c < end)" =>
        "const int c = first + i * STRIDE;\n        vec16 stored = {};\n        if (c <= end)";
    weight_and_bias_swapped: "layer_norm.cu", WRONG,
        "kept[i], load_16(weight + c), load_16(bias + c)" => "kept[i], load_16(bias + c), load_16(weight + c)";
    sum_of_half_a_warp: "numerics.cuh", WRONG,
        "for (int distance = 1; distance < WARP; distance *= 2) {\n        value +=" =>
        "for (int distance = 1; distance < WARP / 2; distance *= 2) {\n        value +=";
    idle_lanes_leave: "layer_norm.cu", DIVERGENCE,
        "    vec16 kept[KEPT];" => "    if (first >= width) { return; }\n    vec16 kept[KEPT];";
    /// The lanes exchange what they write: right, unless y is x.
    lanes_write_for_each_other: "layer_norm.cu", GLOBAL_RACE,
        "stored = normalise(load_16(from + c), load_16(weight + c), load_16(bias + c), mean, scale);\n            store_16(to + c, stored);" =>
        "const int o = c + STRIDE < end ? c ^ CHUNK : c;\n            stored = normalise(load_16(from + o), load_16(weight + o), load_16(bias + o), mean, scale);\n            store_16(to + o, stored);";
    parts_of_eight_columns: "row_part.cuh", WRONG,
        "    sum += shuffle_xor(sum, 1);\n" => "";
    parts_about_zero: "row_part.cuh", WRONG,
        "fma_rn(x[i] - mean, x[i] - mean, squares)" => "fma_rn(x[i], x[i], squares)";
    parts_of_the_next_columns: "row_part.cuh", WRONG | BOUNDS,
        "+ column / PART" => "+ (column / PART ^ 1)";
    parts_by_every_lane: "layer_norm.cu", GLOBAL_RACE,
        "if (live && lane() % 2 == 0)" => "if (live)";
}

mutants! { convert:
    padding_not_zeroed: "convert.cu", WRONG,
        "room < CHUNK ? static_cast<int>(room) : CHUNK" => "count";
    row_guard_one_late: "convert.cu", BOUNDS,
        "if (row >= rows)" => "if (row > rows)";
    alignment_without_the_columns: "convert.cu", ALIGNMENT,
        "% 16 == 0 && columns * sizeof(T) % 16 == 0" => "% 16 == 0";
    scale_forgotten: "range.cuh", WRONG,
        "x[i] *= scale;" => "";
    range_checked_as_scaled: "range.cuh", WRONG,
        "x[i] *= scale;" => "",
        "bool fits = true;" => "bool fits = true;\n    for (int i = 0; i < CHUNK; i++) { x[i] *= scale; }";
    largest_number_does_not_fit: "range.cuh", WRONG,
        "beyond = x[i] > FP16_MAX ||" => "beyond = x[i] >= FP16_MAX ||",
        "fits && x[i] <= FP16_MAX &&" => "fits && x[i] < FP16_MAX &&";
    nan_fits: "range.cuh", WRONG,
        "fits && x[i] <= FP16_MAX && x[i] >= -FP16_MAX" => "fits && !(x[i] > FP16_MAX || x[i] < -FP16_MAX)";
    sign_lost_by_saturation: "range.cuh", WRONG,
        "x[i] > 0.0f ? FP16_MAX : -FP16_MAX" => "FP16_MAX";
    nan_saturates: "range.cuh", WRONG,
        "(nan || (beyond && policy == REFUSE))" => "(beyond && policy == REFUSE)";
    last_of_a_chunk_reported: "range.cuh", WRONG,
        "policy == REFUSE)) && at < note.first" => "policy == REFUSE))";
    report_not_atomic: "range.cuh", GLOBAL_RACE | WRONG,
        "atomic_min_u64(&report->first, note.first);" => "report->first = note.first;";
    halves_of_bf16_swapped: "range.cuh", WRONG,
        "to[2 * i] = bits_to_f32(pairs[i] << 16);" => "to[2 * i] = bits_to_f32(pairs[i] & 0xffff0000u);",
        "to[2 * i + 1] = bits_to_f32(pairs[i] & 0xffff0000u);" => "to[2 * i + 1] = bits_to_f32(pairs[i] << 16);";
    half_chunk_taken_for_whole: "range.cuh", WRONG | BOUNDS,
        "if (aligned && count >= CHUNK)" => "if (aligned && count > 0)";
    stores_taken_for_aligned: "numerics.cuh", ALIGNMENT,
        "if (count >= CHUNK && reinterpret_cast<unsigned long long>(to) % 16 == 0)" => "if (count >= CHUNK)";
    elements_of_a_pair_swapped: "numerics.cuh", WRONG,
        "i % 2 ? pair >> 16 : pair & 0xffffu" => "i % 2 ? pair & 0xffffu : pair >> 16";
}

mutants! { embed_tokens:
    negative_ids_read: "embed_tokens.cu", BOUNDS,
        "row.id < 0 || " => "";
    id_guard_one_late: "embed_tokens.cu", BOUNDS,
        "row.id >= vocab" => "row.id > vocab";
    threads_overlap: "embed_tokens.cu", GLOBAL_RACE,
        "column += THREADS * CHUNK" => "column += THREADS";
    tail_left_out: "embed_tokens.cu", WRONG,
        "column < hidden; column +=" => "column + CHUNK <= hidden; column +=";
    tail_written_whole: "embed_tokens.cu", WRONG | BOUNDS | GLOBAL_RACE,
        "hidden - column < CHUNK ? hidden - column : CHUNK" => "CHUNK";
    alignment_without_the_width: "embed_tokens.cu", ALIGNMENT,
        "% 16 == 0 && hidden * sizeof(T) % 16 == 0" => "% 16 == 0";
    report_counts_from_the_row: "embed_tokens.cu", WRONG,
        "static_cast<unsigned long long>(start + column)" => "static_cast<unsigned long long>(column)";
}

mutants! { verify:
    infinities_pass: "verify.cu", WRONG,
        "(bits & MAGNITUDE) >= INFINITE" => "(bits & MAGNITUDE) > INFINITE";
    last_bad_channel_reported: "verify.cu", WRONG,
        "INFINITE && column + i < bad" => "INFINITE";
    bad_channel_of_one_lane: "verify.cu", WRONG,
        "bad = other < bad ? other : bad;" => "";
    poison_of_one_lane: "verify.cu", WRONG,
        "poisoned = warp_any(poisoned);" => "";
    any_nan_is_poison: "verify.cu", WRONG,
        "poisoned || bits == POISON" => "poisoned || bits >= POISON";
    row_guard_forgotten: "verify.cu", BOUNDS,
        "if (live && lane() == 0)" => "if (lane() == 0)";
    rows_beyond_the_end_read: "verify.cu", BOUNDS,
        "rows + (live ? row : 0) * pitch" => "rows + row * pitch";
    idle_lanes_leave: "verify.cu", DIVERGENCE,
        "int bad = NONE;" => "if (lane() * CHUNK >= hidden) { return; }\n    int bad = NONE;";
    gap_between_rows_read: "verify.cu", WRONG,
        "if (aligned && count >= CHUNK)" => "if (aligned)";
    aligned_by_the_first_row: "numerics.cuh", ALIGNMENT,
        "% 16 == 0 && pitch % CHUNK == 0" => "% 16 == 0";
    empty_slot_divided_by_zero: "verify.cu", WRONG,
        "range.len > 0 ? range.len : 1" => "range.len";
    slot_guard_one_late: "verify.cu", BOUNDS,
        "slot < slots ? ranges[slot]" => "slot <= slots ? ranges[slot]";
}
