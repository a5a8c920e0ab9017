//! Attention on machines with tiles: the same blocks of keys, both products of 32 queries in tile registers.
//!
//! ```text
//!   once per task:   K split [T / 32 panels][2 blocks]      V split [T / 32 blocks][2 panels]     both stay in L2
//!
//!   32 queries:      Q split [2 blocks] (1/8 is in it)
//!   KEYS keys at a   S = Q Kᵀ  f32, a panel of 32 at a time  ──▶  m' = max(m, max S)
//!   time:            P = e^(S − m'), l = l · e^(m − m') + Σ P, O = O · e^(m − m');  P ──split──▶ [KEYS / 32 blocks]
//!                    O = O + P V
//!   at the end:      O / l ──▶ fp16, rounded once
//! ```
//!
//! # Numerics
//! P is the sum of two bf16, to 2^-17 of itself; otherwise as `tiles` says of products.

use half::f16;

use super::{Head, KEYS, SCALE};
use crate::config::HEAD_SIZE;
use crate::cpu::activation::{LOG2_E, exp2};
use crate::cpu::linear::tiled::split;
use crate::cpu::simd::Simd;
use crate::cpu::simd::tiles::{ACC, Ahead, BLOCK, PANEL, SPLIT, element_of_b, row_of_a, row_of_acc};

/// Blocks of a query or a key.
const BLOCKS: usize = HEAD_SIZE / PANEL;

/// f32 of a task: K and V, and for 32 queries Q, S, P and O.
pub(super) fn scratch_len(tokens: usize) -> usize {
    let panels = tokens.div_ceil(PANEL);
    let split = 2 * panels * BLOCKS + BLOCKS + KEYS / PANEL;
    split * SPLIT / 2 + BLOCK / 2 + KEYS / PANEL * ACC + BLOCKS * ACC
}

#[inline(always)]
pub(super) fn attend<S: Simd>(s: S, head: Head<'_, '_>) {
    const { assert!(KEYS.is_multiple_of(PANEL) && HEAD_SIZE.is_multiple_of(PANEL), "whole panels") };
    let Head { rows, width, tokens, head, queries, out, first, scratch } = head;
    let (column, panels) = (head * HEAD_SIZE, tokens.div_ceil(PANEL));
    let mut scratch = scratch;
    let mut take = |len: usize| {
        let (taken, rest) = std::mem::take(&mut scratch).split_at_mut(len);
        scratch = rest;
        taken
    };
    let keys: &mut [u16] = bytemuck::cast_slice_mut(take(panels * BLOCKS * SPLIT / 2)); // [panels][BLOCKS][SPLIT]
    let values: &mut [u16] = bytemuck::cast_slice_mut(take(panels * BLOCKS * SPLIT / 2)); // [BLOCKS][panels][SPLIT]
    let query: &mut [u16] = bytemuck::cast_slice_mut(take(BLOCKS * SPLIT / 2)); // [BLOCKS][SPLIT]
    let weights: &mut [u16] = bytemuck::cast_slice_mut(take(KEYS / PANEL * SPLIT / 2)); // [KEYS / PANEL][SPLIT]
    let block: &mut [f16] = bytemuck::cast_slice_mut(take(BLOCK / 2)); // [BLOCK]
    let scores = take(KEYS / PANEL * ACC); // [KEYS / PANEL][ACC]
    let sums = take(BLOCKS * ACC); // [BLOCKS][ACC]

    // Block `b` of the query, key or value of `token`.
    let at = |token: usize, which: usize, b: usize| (token * 3 + which) * width + column + b * PANEL;
    for panel in 0..panels {
        let tokens = panel * PANEL..tokens.min((panel + 1) * PANEL);
        for b in 0..BLOCKS {
            if tokens.len() < PANEL {
                block.fill(f16::ZERO);
            }
            for (key, token) in tokens.clone().enumerate() {
                let pairs: &[[f16; 2]] = rows[at(token, 1, b)..][..PANEL].as_chunks().0;
                for (pair, x) in pairs.iter().enumerate() {
                    let to = element_of_b(2 * pair, key);
                    block[to..to + 2].copy_from_slice(x);
                }
            }
            split(s, block, &mut keys[(panel * BLOCKS + b) * SPLIT..][..SPLIT]);

            for (pair, token) in tokens.clone().step_by(2).enumerate() {
                let even = &rows[at(token, 2, b)..][..PANEL];
                let odd = match token + 1 < tokens.end {
                    true => &rows[at(token + 1, 2, b)..][..PANEL],
                    false => &[f16::ZERO; PANEL],
                };
                for half in 0..2 {
                    let channels = half * PANEL / 2..(half + 1) * PANEL / 2;
                    let to = element_of_b(2 * pair, channels.start);
                    let both = even[channels.clone()].iter().zip(&odd[channels]);
                    for (to, (even, odd)) in block[to..to + PANEL].as_chunks_mut().0.iter_mut().zip(both) {
                        *to = [*even, *odd];
                    }
                }
            }
            split(s, block, &mut values[(b * panels + panel) * SPLIT..][..SPLIT]);
        }
    }

    let log2_e = s.splat(LOG2_E);
    for start in queries.clone().step_by(PANEL) {
        let here = PANEL.min(queries.end - start);
        for (b, query) in query.chunks_exact_mut(SPLIT).enumerate() {
            let (upper, lower) = query.split_at_mut(BLOCK);
            for i in 0..here {
                for (j, x) in rows[at(start + i, 0, b)..][..PANEL].chunks_exact(S::LANES).enumerate() {
                    let at = row_of_a(i) + j * S::LANES;
                    let (upper, lower) = (&mut upper[at..at + S::LANES], &mut lower[at..at + S::LANES]);
                    let x = s.mul(s.load_f16_slice(x), s.splat(SCALE));
                    // SAFETY: LANES elements each.
                    unsafe { s.store_split(upper.as_mut_ptr(), lower.as_mut_ptr(), x) };
                }
            }
        }
        let mut greatest = [f32::NEG_INFINITY; PANEL];
        let mut total = [s.splat(0.0); PANEL];
        for from in (0..tokens).step_by(KEYS) {
            let count = KEYS.min(tokens - from);
            let scores = &mut scores[..count.div_ceil(PANEL) * ACC];
            let weights = &mut weights[..count.div_ceil(PANEL) * SPLIT];
            let keys = keys[from / PANEL * BLOCKS * SPLIT..].chunks_exact(BLOCKS * SPLIT);
            let mut peaks = [s.splat(f32::NEG_INFINITY); PANEL];
            for (panel, (scores, keys)) in scores.chunks_exact_mut(ACC).zip(keys).enumerate() {
                let ahead = Ahead { kilobytes: keys.as_ptr().cast(), lines: keys.as_ptr().cast() };
                // SAFETY: BLOCKS blocks of queries and keys, and ACC scores; tiles are there by `with_tiles`.
                unsafe {
                    s.add_products::<true>(
                        BLOCKS,
                        query.as_ptr(),
                        keys.as_ptr(),
                        scores.as_mut_ptr(),
                        true,
                        ahead,
                    );
                }
                // Keys that are none: their zero scores give way to e^-∞.
                for key in PANEL.min(count - panel * PANEL)..PANEL {
                    for i in 0..PANEL {
                        scores[row_of_acc(i, key)] = f32::NEG_INFINITY;
                    }
                }
                for (i, peak) in peaks.iter_mut().enumerate() {
                    for key in (0..PANEL).step_by(S::LANES) {
                        let scores = &scores[row_of_acc(i, key)..][..S::LANES];
                        // SAFETY: LANES scores of row i.
                        *peak = s.max(*peak, unsafe { s.load(scores.as_ptr()) });
                    }
                }
            }
            let mut shifts = [0.0; PANEL];
            for (i, peak) in peaks.into_iter().enumerate() {
                let before = greatest[i];
                greatest[i] = before.max(s.reduce_max(peak));
                shifts[i] = -greatest[i] * LOG2_E;
                // e^(m − m'); in the first block 2^-126 of nothing.
                let decay = exp2(s, s.mul_add(s.splat(before), log2_e, s.splat(shifts[i])));
                total[i] = s.mul(total[i], decay);
                if from > 0 {
                    for sums in sums.chunks_exact_mut(ACC) {
                        for channel in (0..PANEL).step_by(S::LANES) {
                            let sums = &mut sums[row_of_acc(i, channel)..][..S::LANES];
                            // SAFETY: LANES sums of row i.
                            unsafe { s.store(sums.as_mut_ptr(), s.mul(s.load(sums.as_ptr()), decay)) };
                        }
                    }
                }
            }
            for (scores, weights) in scores.chunks_exact(ACC).zip(weights.chunks_exact_mut(SPLIT)) {
                let (upper, lower) = weights.split_at_mut(BLOCK);
                for (i, (total, shift)) in total.iter_mut().zip(shifts).enumerate() {
                    for key in (0..PANEL).step_by(S::LANES) {
                        let scores = &scores[row_of_acc(i, key)..][..S::LANES];
                        let to = row_of_a(i) + key;
                        let (upper, lower) = (&mut upper[to..to + S::LANES], &mut lower[to..to + S::LANES]);
                        // SAFETY: LANES elements each.
                        unsafe {
                            let p = exp2(s, s.mul_add(s.load(scores.as_ptr()), log2_e, s.splat(shift)));
                            *total = s.add(*total, p);
                            s.store_split(upper.as_mut_ptr(), lower.as_mut_ptr(), p);
                        }
                    }
                }
            }
            for (b, sums) in sums.chunks_exact_mut(ACC).enumerate() {
                let steps = weights.len() / SPLIT;
                let values = &values[(b * panels + from / PANEL) * SPLIT..][..steps * SPLIT];
                let ahead = Ahead { kilobytes: values.as_ptr().cast(), lines: values.as_ptr().cast() };
                // SAFETY: `steps` blocks of weights and values, and ACC sums; tiles are there by `with_tiles`.
                unsafe {
                    s.add_products::<false>(
                        steps,
                        weights.as_ptr(),
                        values.as_ptr(),
                        sums.as_mut_ptr(),
                        from == 0,
                        ahead,
                    );
                }
            }
        }

        for (i, total) in total.into_iter().enumerate().take(here) {
            let total = s.splat(s.reduce_add(total));
            for at in (0..HEAD_SIZE).step_by(S::NR) {
                let sums = &sums[at / PANEL * ACC..][..ACC];
                let low = &sums[row_of_acc(i, at % PANEL)..][..S::LANES];
                let high = &sums[row_of_acc(i, at % PANEL + S::LANES)..][..S::LANES];
                // SAFETY: LANES sums of row i each; tasks have disjoint heads or queries.
                unsafe {
                    let v = [s.div(s.load(low.as_ptr()), total), s.div(s.load(high.as_ptr()), total)];
                    out.put(s, first + start + i, column + at, S::NR, v);
                }
            }
        }
    }
}
