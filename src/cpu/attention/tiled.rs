//! Attention on machines with tiles: the same blocks of keys, both products of 32 queries in tile registers.
//!
//! ```text
//!   once per task:   K split [T / 32 panels][2 blocks]      V split [T / 32 blocks][2 panels]     both stay in L2
//!
//!   32 queries:      Q split [2 blocks] (1/8 is in it)
//!   up to 512 keys   S = Q Kᵀ  f32, a panel of 32 at a time  ──▶  m' = m, or max S where that is beyond m + 8
//!   at a time:       P = e^(S − m'), l = l · e^(m − m') + Σ P, O = O · e^(m − m');  P ──split──▶ [panels of the block]
//!                    O = O + P V
//!   at the end:      O / l ──▶ fp16, rounded once
//! ```
//!
//! # Numerics
//! P is the sum of two bf16, to 2^-16 of itself; otherwise as `tiles` says of products. That m is not always the greatest
//! score makes P as great as e^8, which f32 and bf16 do not mind, and spares O nearly all of its decays.
//!
//! # Not taken
//! Exponentials of one block under the products of the next: no gain. While tiles are at work, multiply-adds of 512 bits go
//! through one port instead of two.

use half::f16;

use super::{Head, SCALE};
use crate::config::HEAD_SIZE;
use crate::cpu::activation::LOG2_E;
use crate::cpu::linear::tiled::split;
use crate::cpu::simd::Simd;
use crate::cpu::simd::tiles::{ACC, BLOCK, PANEL, SPLIT, row_of_a, row_of_acc};

/// Panels of keys in a block, at most.
const MOST_PANELS: usize = 16;
/// Blocks of a query or a key.
const BLOCKS: usize = HEAD_SIZE / PANEL;

/// f32 of a task: K and V, and for 32 queries Q, S, P and O.
pub(super) fn scratch_len(tokens: usize) -> usize {
    let panels = tokens.div_ceil(PANEL);
    let split = 2 * panels * BLOCKS + BLOCKS + MOST_PANELS;
    split * SPLIT / 2 + BLOCK / 2 + MOST_PANELS * ACC + BLOCKS * ACC
}

#[inline(always)]
pub(super) fn attend<S: Simd>(s: S, head: Head<'_, '_>) {
    const { assert!(HEAD_SIZE.is_multiple_of(PANEL), "whole panels") };
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
    let weights: &mut [u16] = bytemuck::cast_slice_mut(take(MOST_PANELS * SPLIT / 2)); // [MOST_PANELS][SPLIT]
    let block: &mut [f16] = bytemuck::cast_slice_mut(take(BLOCK / 2)); // [BLOCK]
    let scores = take(MOST_PANELS * ACC); // [MOST_PANELS][ACC]
    let sums = take(BLOCKS * ACC); // [BLOCKS][ACC]

    // Block `b` of the query, key or value of `token`.
    let at = |token: usize, which: usize, b: usize| (token * 3 + which) * width + column + b * PANEL;
    // Of a panel that is not whole, rows that are none count as zeros.
    let rows_of = |panel: usize, which: usize, b: usize| -> [&[f16; PANEL]; PANEL] {
        std::array::from_fn(|i| match panel * PANEL + i {
            token if token < tokens => {
                rows[at(token, which, b)..].first_chunk().expect("a row is whole blocks")
            }
            _ => &[f16::ZERO; PANEL],
        })
    };
    for panel in 0..panels {
        for b in 0..BLOCKS {
            pack_keys(s, rows_of(panel, 1, b), block);
            split(s, block, &mut keys[(panel * BLOCKS + b) * SPLIT..][..SPLIT]);
            pack_values(s, rows_of(panel, 2, b), block);
            split(s, block, &mut values[(b * panels + panel) * SPLIT..][..SPLIT]);
        }
    }

    let block_panels = panels.div_ceil(panels.div_ceil(MOST_PANELS));
    for start in queries.clone().step_by(PANEL) {
        for (b, query) in query.chunks_exact_mut(SPLIT).enumerate() {
            split_queries(s, rows_of(start / PANEL, 0, b), query);
        }
        let mut state = State::new(s);
        for from in (0..panels).step_by(block_panels) {
            let block = from..panels.min(from + block_panels);
            let mut peaks = [s.splat(f32::NEG_INFINITY); PANEL];
            for (panel, scores) in block.clone().zip(scores.chunks_exact_mut(ACC)) {
                let operands = (query.as_ptr(), keys[panel * BLOCKS * SPLIT..][..BLOCKS * SPLIT].as_ptr());
                // SAFETY: BLOCKS blocks of queries and keys, and ACC scores; tiles are there by `with_tiles`.
                unsafe { s.add_products::<4>(BLOCKS, operands, scores.as_mut_ptr(), true, nothing) };
                // Keys that are none: their zero scores give way to e^-∞.
                for key in PANEL.min(tokens - panel * PANEL)..PANEL {
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
            if let Some(decays) = state.raise(s, &peaks)
                && from > 0
            {
                for (i, decay) in decays.into_iter().enumerate() {
                    for sums in sums.chunks_exact_mut(ACC) {
                        for channel in (0..PANEL).step_by(S::LANES) {
                            let sums = &mut sums[row_of_acc(i, channel)..][..S::LANES];
                            // SAFETY: LANES sums of row i.
                            unsafe {
                                s.store(sums.as_mut_ptr(), s.mul(s.load(sums.as_ptr()), s.splat(decay)))
                            };
                        }
                    }
                }
            }
            let weights = &mut weights[..block.len() * SPLIT];
            for (scores, weights) in scores.chunks_exact(ACC).zip(weights.chunks_exact_mut(SPLIT)) {
                state.weigh(s, scores, weights);
            }
            for (b, sums) in sums.chunks_exact_mut(ACC).enumerate() {
                let values = &values[(b * panels + from) * SPLIT..][..weights.len()];
                let operands = (weights.as_ptr(), values.as_ptr());
                // SAFETY: as many blocks of weights and values, and ACC sums; tiles are there by `with_tiles`.
                unsafe { s.add_products::<3>(block.len(), operands, sums.as_mut_ptr(), from == 0, nothing) };
            }
        }

        for (i, total) in state.totals.iter().enumerate().take(queries.end - start) {
            let total = s.splat(s.reduce_add(*total));
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

/// Packs 32 keys as a block of B: `[2 halves][16 pairs of channels][16 keys][2]`.
#[inline(always)]
fn pack_keys<S: Simd>(s: S, keys: [&[f16; PANEL]; PANEL], to: &mut [f16]) {
    let (halves, _) = to.as_chunks_mut::<{ BLOCK / 2 }>();
    for (keys, to) in keys.as_chunks().0.iter().zip(halves) {
        s.transpose_pairs(keys, to);
    }
}

/// Packs 32 values as a block of B: `[2 halves][16 pairs of values][16 channels][2]`.
#[inline(always)]
fn pack_values<S: Simd>(s: S, values: [&[f16; PANEL]; PANEL], to: &mut [f16]) {
    let (pairs, _) = to.as_chunks_mut::<PANEL>();
    for (i, to) in pairs.iter_mut().enumerate() {
        let [even, odd] = [0, 1].map(|odd| &values[i % (PANEL / 2) * 2 + odd].as_chunks().0[i / (PANEL / 2)]);
        s.zip_f16(even, odd, to);
    }
}

/// Splits 32 queries, an eighth of each, as a block of A.
#[inline(always)]
fn split_queries<S: Simd>(s: S, queries: [&[f16; PANEL]; PANEL], to: &mut [u16]) {
    let (upper, lower) = to.split_at_mut(BLOCK);
    for (i, query) in queries.iter().enumerate() {
        for (j, x) in query.chunks_exact(S::LANES).enumerate() {
            let at = row_of_a(i) + j * S::LANES;
            let (upper, lower) = (&mut upper[at..at + S::LANES], &mut lower[at..at + S::LANES]);
            let x = s.mul(s.load_f16_slice(x), s.splat(SCALE));
            // SAFETY: LANES elements each.
            unsafe { s.store_split(upper.as_mut_ptr(), lower.as_mut_ptr(), x) };
        }
    }
}

/// What is left to do between products: nothing.
#[inline(always)]
fn nothing(_: usize, _: usize) {}

/// How far a score may be beyond the reference: e^8 times what P would be otherwise.
const SLACK: f32 = 8.0;
/// Rows of scores that become weights side by side.
const ROWS: usize = 4;

/// What is known of 32 queries after some of the keys.
struct State<S: Simd> {
    references: [f32; PANEL], // m: the greatest score, or one that few are beyond
    shifts: [S::V; PANEL],    // −m · log₂ e
    totals: [S::V; PANEL],    // Σ e^(S − m), to be added up
}

impl<S: Simd> State<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let zero = s.splat(0.0);
        Self { references: [f32::NEG_INFINITY; PANEL], shifts: [zero; PANEL], totals: [zero; PANEL] }
    }

    /// Takes new references for the rows whose greatest scores, the greatest lanes of `peaks`, are too far beyond theirs.
    ///
    /// Returns what sums so far are to be multiplied by, where there is such a row.
    #[inline(always)]
    fn raise(&mut self, s: S, peaks: &[S::V; PANEL]) -> Option<[f32; PANEL]> {
        let mut decays = [1.0; PANEL];
        let mut any = false;
        for (i, peak) in peaks.iter().enumerate() {
            let (peak, before) = (s.reduce_max(*peak), self.references[i]);
            if peak <= before + SLACK {
                continue;
            }
            any = true;
            // e^(m − m'); at first of nothing.
            decays[i] = s.reduce_max(s.exp2([s.splat((before - peak) * LOG2_E)])[0]);
            self.references[i] = peak;
            self.shifts[i] = s.splat(-peak * LOG2_E);
            self.totals[i] = s.mul(self.totals[i], s.splat(decays[i]));
        }
        any.then_some(decays)
    }

    /// Makes weights of the scores of a panel of keys.
    #[inline(always)]
    fn weigh(&mut self, s: S, scores: &[f32], weights: &mut [u16]) {
        let (upper, lower) = weights.split_at_mut(BLOCK);
        for first in (0..PANEL).step_by(ROWS) {
            for key in (0..PANEL).step_by(S::NR) {
                let mut p = [s.splat(0.0); 2 * ROWS];
                for (j, p) in p.iter_mut().enumerate() {
                    let scores = &scores[row_of_acc(first + j / 2, key + j % 2 * S::LANES)..][..S::LANES];
                    // SAFETY: LANES scores.
                    let score = unsafe { s.load(scores.as_ptr()) };
                    *p = s.mul_add(score, s.splat(LOG2_E), self.shifts[first + j / 2]);
                }
                for (i, p) in s.exp2(p).as_chunks().0.iter().enumerate() {
                    let to = row_of_a(first + i) + key;
                    let (upper, lower) = (&mut upper[to..to + S::NR], &mut lower[to..to + S::NR]);
                    self.totals[first + i] = s.add(self.totals[first + i], s.add(p[0], p[1]));
                    // SAFETY: NR weights each.
                    unsafe { s.store_split_pair(upper.as_mut_ptr(), lower.as_mut_ptr(), *p) };
                }
            }
        }
    }
}
