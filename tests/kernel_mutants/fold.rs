//! Faults in fold.cu.

use crate::mutants;

mutants! { fold:
    sums_of_the_exact_products: "fold.cu", WRONG,
        "        unpack(rounded, x);\n" => "";
    sums_without_the_scale: "fold.cu", WRONG,
        "sum += x[i];" => "sum += x[i] / scale;";
    rounded_before_the_scale: "fold.cu", WRONG,
        "x[i] = given[i] * g[i] * scale;" => "x[i] = fp16_to_f32(f32_to_fp16(given[i] * g[i])) * scale;";
    beta_times_the_folded: "fold.cu", WRONG,
        "shift = fma_rn(b[i], given[i], shift);" => "shift = fma_rn(b[i], given[i] * g[i], shift);";
    bias_not_scaled: "fold.cu", WRONG,
        "(bias + shift) * scale" => "bias + shift * scale";
    bias_without_norm_not_scaled: "fold.cu", WRONG,
        "f32_to_fp16(bias * scale)" => "f32_to_fp16(bias)";
    weights_without_norm_not_scaled: "fold.cu", WRONG,
        "x[i] = given[i] * scale;" => "x[i] = given[i];";
    a_row_too_many_scaled: "fold.cu", WRONG,
        "row < args.scaled ?" => "row <= args.scaled ?";
    rows_by_k_not_pitch: "fold.cu", WRONG | GLOBAL_RACE,
        "static_cast<long long>(row) * args.pitch" => "static_cast<long long>(row) * args.k";
    row_guard_one_late: "fold.cu", BOUNDS,
        "row < args.n ? args.k : 0" => "row <= args.n ? args.k : 0";
    sums_of_a_row_too_many: "fold.cu", BOUNDS,
        "lane() != 0 || row >= args.n" => "lane() != 0 || row > args.n";
    chunk_guard_one_late: "fold.cu", BOUNDS | WRONG,
        "c < end; c += WARP * CHUNK" => "c <= end; c += WARP * CHUNK";
    gamma_of_the_first_columns: "fold.cu", WRONG,
        "unpack(load_16(args.gamma + c), g)" => "unpack(load_16(args.gamma + lane() * CHUNK % args.k), g)";
    idle_lanes_leave: "fold.cu", DIVERGENCE,
        "    float sum = 0.0f, shift" => "    if (lane() * CHUNK >= end) { return; }\n    float sum = 0.0f, shift";
    sum_of_one_lane: "fold.cu", WRONG,
        "sum = warp_sum(sum), shift" => "shift";
    shift_of_one_lane: "fold.cu", WRONG,
        "shift = warp_sum(shift), " => "";
    a_dry_run_writes_weights: "fold.cu", WRONG,
        "        if (args.dry == 0) {\n            store_16" => "        {\n            store_16";
    a_dry_run_writes_sums: "fold.cu", WRONG,
        "if (args.dry == 0 && args.gamma != nullptr)" => "if (args.gamma != nullptr)";
    a_dry_run_writes_the_bias: "fold.cu", WRONG,
        "} else if (args.dry == 0) {" => "} else if (args.gamma == nullptr) {";
    infinite_weights_counted: "fold.cu", WRONG,
        "is_finite(given[i]) && !is_finite(x[i])" => "!is_finite(x[i])";
    nan_is_finite: "fold.cu", WRONG,
        "(f32_to_bits(x) & 0x7fffffffu) < 0x7f800000u" => "(f32_to_bits(x) & 0x7fffffffu) != 0x7f800000u";
    products_that_just_fit_counted: "fold.cu", WRONG,
        "is_finite(given[i]) && !is_finite(x[i])" => "is_finite(given[i]) && (x[i] >= 65504.0f || x[i] <= -65504.0f)";
    rows_counted_for_elements: "fold.cu", WRONG,
        "static_cast<unsigned>(count)" => "1u";
    count_of_one_lane: "fold.cu", WRONG,
        ", count = warp_sum(count);" => ";";
    count_not_atomic: "fold.cu", GLOBAL_RACE | WRONG,
        "atomic_add_u32(args.beyond, static_cast<unsigned>(count));" => "*args.beyond += static_cast<unsigned>(count);";
}
