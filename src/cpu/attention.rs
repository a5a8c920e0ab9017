//! Attention: `O = softmax(Q Kᵀ / 8) V` per image and head, over blocks of keys, without a T × T matrix.
//!
//! ```text
//!   once per task:   Kᵀ f32 [T / NR panels][HS][NR]      V f32 [T, HS]            both stay in L2
//!
//!   MR queries:      Q f32 [MR, HS] (1/8 is in it)
//!   KEYS keys at a   S = Q Kᵀ [MR, KEYS] in L1  ──▶  m' = max(m, max S)     P = e^(S − m')  over S
//!   time:                                            l  = l · e^(m − m') + Σ P
//!                                                    O  = O · e^(m − m') + P V    f32 [MR, HS]
//!   at the end:      O / l ──▶ fp16, rounded once
//! ```
//!
//! Both products run through the register tile of `tile`: S with Q broadcast against panels of Kᵀ, O with P
//! broadcast, from where the softmax left it, against rows of V.
//!
//! # Numerics
//! f32 throughout; P is not rounded to fp16. Blocks of keys are fixed by T, rows of a tile do not mix: the
//! bits of a row depend on its image alone, not on the queries or the tasks beside it.
//!
//! # Source
//! Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867); over blocks as in FlashAttention (arXiv
//! 2205.14135).

use half::f16;
use rayon::prelude::*;

use super::activation::{LOG2_E, exp2};
use super::linear::{transpose_rows, widen};
use super::scratch::with_scratch;
use super::simd::{Kernel, Machine, Simd};
use super::tile::{self, PAD, with_mr};
use crate::config::HEAD_SIZE;

/// Keys in a block: `MR × KEYS` scores fit into the L1 cache.
const KEYS: usize = 512;
/// From one row of scores to the next, in f32.
const SCORE_STRIDE: usize = KEYS + PAD;
/// From one query to the next, in f32.
const QUERY_STRIDE: usize = HEAD_SIZE + PAD;
/// 64^-½
const SCALE: f32 = 0.125;

/// Attends within each image: `qkv` `[B · T, 3C]` (queries, keys, values, each head by head) to `out`
/// `[B · T, C]`.
pub(crate) fn attention(machine: Machine, qkv: &[f16], tokens: usize, heads: usize, out: &mut [f16]) {
    machine.dispatch(Attention { qkv, tokens, heads, out });
}

struct Attention<'a> {
    qkv: &'a [f16], // [B · T, 3C]
    tokens: usize,
    heads: usize,
    out: &'a mut [f16], // [B · T, C]
}

impl Kernel for Attention<'_> {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let Self { qkv, tokens, heads, out } = self;
        let width = heads * HEAD_SIZE;
        assert_eq!(qkv.len(), 3 * out.len(), "Q, K and V for every output");
        assert!(out.len().is_multiple_of(tokens * width), "whole images");
        let images = out.len() / (tokens * width);
        let out = Columns::new(out, width);

        // One task per image and head; where those are too few for the threads, some share a head, and
        // each packs its keys and values anew.
        let tiles = tokens.div_ceil(S::MR);
        let wanted = 4 * rayon::current_num_threads();
        let splits = wanted.div_ceil(images * heads).min(tiles.div_ceil(8)).max(1);
        let share = tiles.div_ceil(splits);
        (0..images * heads * splits).into_par_iter().with_max_len(1).for_each(|task| {
            let (head, split) = (task / splits, task % splits);
            let (image, head) = (head / heads, head % heads);
            let queries = (split * share * S::MR).min(tokens)..((split + 1) * share * S::MR).min(tokens);
            let rows = &qkv[image * tokens * 3 * width..][..tokens * 3 * width];
            with_scratch(Head::scratch_len::<S>(tokens), |scratch| {
                let out = &out;
                s.vectorize(Head { rows, width, tokens, head, queries, out, first: image * tokens, scratch });
            });
        });
    }
}

/// Rows whose head-sized pieces are written by different tasks, `[rows, C]`.
type Columns<'a> = super::epilogue::Output<'a>;

/// One head of one image, for some of its queries.
struct Head<'a> {
    rows: &'a [f16], // [T, 3C]
    width: usize,    // C
    tokens: usize,   // T
    head: usize,
    queries: std::ops::Range<usize>, // of 0..T
    out: &'a Columns<'a>,            // [B · T, C]
    first: usize,                    // the image's first row in `out`
    scratch: &'a mut [f32],
}

impl Head<'_> {
    fn scratch_len<S: Simd>(tokens: usize) -> usize {
        let keys = tokens.next_multiple_of(S::NR) * HEAD_SIZE;
        let values = tokens * HEAD_SIZE;
        keys + values + S::MR * (QUERY_STRIDE + SCORE_STRIDE + HEAD_SIZE)
    }
}

impl Kernel for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        with_mr!(S, attend(s, self));
    }
}

#[inline(always)]
fn attend<S: Simd, const MR: usize>(s: S, head: Head<'_>) {
    const { assert!(KEYS.is_multiple_of(2 * super::simd::MAX_LANES), "a block of keys is whole panels") };
    let Head { rows, width, tokens, head, queries, out, first, scratch } = head;
    let column = head * HEAD_SIZE;
    let (keys, scratch) = scratch.split_at_mut(tokens.next_multiple_of(S::NR) * HEAD_SIZE); // [panels][HS][NR]
    let (values, scratch) = scratch.split_at_mut(tokens * HEAD_SIZE); // [T, HS]
    let (query, scratch) = scratch.split_at_mut(MR * QUERY_STRIDE); // [MR, QUERY_STRIDE]
    let (scores, scratch) = scratch.split_at_mut(MR * SCORE_STRIDE); // [MR, SCORE_STRIDE]
    let sums = &mut scratch[..MR * HEAD_SIZE]; // [HS / NR][MR][NR]

    for (j, panel) in keys.chunks_exact_mut(HEAD_SIZE * S::NR).enumerate() {
        let from = j * S::NR;
        let k = width + column..width + column + HEAD_SIZE;
        transpose_rows(s, rows, 3 * width, from..tokens.min(from + S::NR), k, panel);
    }
    for (token, value) in values.chunks_exact_mut(HEAD_SIZE).enumerate() {
        widen(s, &rows[token * 3 * width + 2 * width + column..][..HEAD_SIZE], value);
    }

    let log2_e = s.splat(LOG2_E);
    for start in queries.clone().step_by(MR) {
        for (i, query) in query.chunks_exact_mut(QUERY_STRIDE).enumerate() {
            let query = &mut query[..HEAD_SIZE];
            if start + i < queries.end {
                widen(s, &rows[(start + i) * 3 * width + column..][..HEAD_SIZE], query);
                query.iter_mut().for_each(|q| *q *= SCALE);
            } else {
                query.fill(0.0);
            }
        }
        sums.fill(0.0);
        let mut greatest = [f32::NEG_INFINITY; MR];
        let mut total = [s.splat(0.0); MR];
        for block in (0..tokens).step_by(KEYS) {
            let count = KEYS.min(tokens - block);
            let mut peaks = [s.splat(f32::NEG_INFINITY); MR];
            for j in (0..count).step_by(S::NR) {
                let panel = &keys[(block + j) * HEAD_SIZE..][..HEAD_SIZE * S::NR];
                // SAFETY: MR queries of HEAD_SIZE, QUERY_STRIDE apart; HEAD_SIZE steps of NR keys; and
                // columns j .. j + NR of the scores, which have room for KEYS, whole panels.
                unsafe {
                    let zeros = tile::zeros::<S, MR>(s);
                    let (a, b) = ((query.as_ptr(), QUERY_STRIDE), (panel.as_ptr(), S::NR));
                    let acc = tile::tile(s, HEAD_SIZE, a, b, None, zeros);
                    tile::store(s, scores.as_mut_ptr().add(j), SCORE_STRIDE, acc);
                    if j + S::NR <= count {
                        for (peak, acc) in peaks.iter_mut().zip(acc) {
                            *peak = s.max(*peak, s.max(acc[0], acc[1]));
                        }
                        continue;
                    }
                }
                // Keys that are none: their zero scores give way to e^-∞.
                for (peak, scores) in peaks.iter_mut().zip(scores.chunks_exact_mut(SCORE_STRIDE)) {
                    scores[count..j + S::NR].fill(f32::NEG_INFINITY);
                    for half in [j, j + S::LANES] {
                        // SAFETY: half a panel of scores.
                        *peak = s.max(*peak, unsafe { s.load(scores[half..half + S::LANES].as_ptr()) });
                    }
                }
            }

            let mut decay = [s.splat(0.0); MR];
            for i in 0..MR {
                let before = greatest[i];
                greatest[i] = before.max(s.reduce_max(peaks[i]));
                let shift = s.splat(-greatest[i] * LOG2_E);
                // e^(m − m'); in the first block 2^-126 of nothing.
                decay[i] = exp2(s, s.mul_add(s.splat(before), log2_e, shift));
                let mut sum = s.mul(total[i], decay[i]);
                let scores = &mut scores[i * SCORE_STRIDE..][..count.next_multiple_of(S::NR)];
                for score in scores.chunks_exact_mut(S::LANES) {
                    // SAFETY: `score` has LANES elements.
                    unsafe {
                        let p = exp2(s, s.mul_add(s.load(score.as_ptr()), log2_e, shift));
                        s.store(score.as_mut_ptr(), p);
                        sum = s.add(sum, p);
                    }
                }
                total[i] = sum;
            }

            for (j, sums) in sums.chunks_exact_mut(MR * S::NR).enumerate() {
                let values = &values[block * HEAD_SIZE + j * S::NR..];
                // SAFETY: `sums` is a tile; MR rows of `count` scores, SCORE_STRIDE apart; and `count` rows of
                // V from `block`, of which NR from j · NR lie within HEAD_SIZE.
                unsafe {
                    let mut acc = tile::load::<S, MR>(s, sums.as_ptr());
                    for (acc, decay) in acc.iter_mut().zip(decay) {
                        *acc = [s.mul(acc[0], decay), s.mul(acc[1], decay)];
                    }
                    let (a, b) = ((scores.as_ptr(), SCORE_STRIDE), (values.as_ptr(), HEAD_SIZE));
                    let acc = tile::tile(s, count, a, b, None, acc);
                    tile::store(s, sums.as_mut_ptr(), S::NR, acc);
                }
            }
        }

        for (i, total) in total.into_iter().enumerate().take(queries.end - start) {
            let total = s.splat(s.reduce_add(total));
            // SAFETY: tasks have disjoint heads or queries.
            let out = unsafe { out.piece(first + start + i, column, HEAD_SIZE) };
            for (j, out) in out.chunks_exact_mut(S::LANES).enumerate() {
                let at = (j / 2 * MR + i) * S::NR + j % 2 * S::LANES;
                // SAFETY: LANES of the sums of row i, half j % 2 of panel j / 2.
                let sum = unsafe { s.load(sums[at..at + S::LANES].as_ptr()) };
                s.store_f16_slice(out, s.div(sum, total));
            }
        }
    }
}

#[cfg(test)]
mod tests;
