//! Faults in attention_sm80.cu, and in attention.cuh as that uses it.

use crate::mutants;

mutants! { attention:
    // Copies, barriers, the two buffers.
    tile_barrier_deleted: "attention_sm80.cu", COPY | RACE | UNSET,
        "block_barrier();  // this tile has landed" => "// this tile has landed";
    wait_off_by_one: "attention_sm80.cu", COPY,
        "cp_async_wait<0>();\n        block_barrier();" => "cp_async_wait<1>();\n        block_barrier();";
    one_buffer_for_both_tiles: "attention_sm80.cu", COPY | RACE,
        "next = 2 * TILE_BYTES - now" => "next = now";
    a_tile_too_many_copied: "attention_sm80.cu", IN_FLIGHT,
        "if (key + KEYS < tokens) {" => "if (key < tokens) {";
    warp_leaves_before_the_barrier: "attention_sm80.cu", BARRIER,
        "block_barrier();  // this tile" =>
        "if (first + warp() * 16 * M >= tokens) { return; }\n        block_barrier();  // this tile";
    q_overwritten_while_read: "attention_sm80.cu", RACE,
        "warp_barrier();  // the warp's last reads of Q" => "// the warp's last reads of Q";
    stage_read_before_complete: "attention_sm80.cu", RACE,
        "warp_barrier();  // rows are complete" => "// rows are complete";

    // Where things lie.
    swizzle_by_eights: "attention_sm80.cu", WRONG | RACE,
        "(chunk ^ (row % 8)) * 16; }" => "(chunk ^ (row / 8 % 8)) * 16; }";
    v_not_transposed: "attention_sm80.cu", WRONG,
        "ldmatrix_x4_trans(b, v +" => "ldmatrix_x4(b, v +";
    fragments_of_p_in_another_order: "attention.cuh", WRONG,
        "a[i] = pack_fp16x2(at(p," => "a[i % 3 == 0 ? i : 3 - i] = pack_fp16x2(at(p,";
    warps_of_two_fragments_overlap: "attention_sm80.cu", WRONG | RACE,
        "place(warp() * 16 * M + lane() % 16" => "place(warp() * 16 + lane() % 16";
    image_offset_by_the_other_pitch: "attention_sm80.cu", WRONG | BOUNDS,
        "store<M>(out + image * out_pitch," => "store<M>(out + image * qkv_pitch,";
    heads_write_over_each_other: "attention_sm80.cu", GLOBAL_RACE,
        "head = block_y() * HS;" => "head = 0;";

    // Tails.
    mask_forgotten: "attention_sm80.cu", WRONG,
        "if (key + KEYS > tokens) {" => "if (false) {";
    mask_one_key_late: "attention.cuh", WRONG,
        "i % 2 >= keys" => "i % 2 > keys";
    keys_beyond_the_end_not_zero: "attention_sm80.cu", BOUNDS | WRONG,
        "const bool live = i < left;" => "const bool live = true;";
    queries_beyond_the_end_read: "attention_sm80.cu", BOUNDS,
        "pitch, i < left)" => "pitch, i <= left)";
    row_guard_one_late: "attention_sm80.cu", BOUNDS | GLOBAL_RACE | WRONG,
        "if (first + row < tokens)" => "if (first + row <= tokens)";

    // The softmax.
    scale_without_log2_e: "attention_sm80.cu", WRONG,
        "SCALE = 0.125f * LOG2_E" => "SCALE = 0.125f";
    maximum_not_shared: "attention.cuh", WRONG,
        "top = max_f32(top, shuffle_xor(top, 2));" => "";
    maximum_of_this_tile_alone: "attention.cuh", WRONG,
        "max_f32(rows.top[half], top * scale)" => "top * scale";
    maximum_starts_at_zero: "attention.cuh", WRONG,
        "RowPair{{minus_infinity(), minus_infinity()}" => "RowPair{{0.0f, 0.0f}";
    output_does_not_decay: "attention.cuh", WRONG,
        "at(o, i + 1) *= decay;" => "";
    sum_does_not_decay: "attention.cuh", WRONG,
        "rows.sum[half] *= decay;" => "";
    sum_of_half_the_lanes: "attention.cuh", WRONG,
        "sum += shuffle_xor(sum, 2);" => "";
}
