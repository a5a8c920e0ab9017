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

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::activation::LOG2_E;
use super::linear::widen;
use super::operand::Sink;
use super::scratch::with_scratch;
use super::simd::{Kernel, MAX_LANES, Machine, Simd, tiles};
use super::tile::{self, PAD, with_mr};
use crate::config::HEAD_SIZE;

mod tiled;

/// Keys in a block: `MR × KEYS` scores fit into the L1 cache.
const KEYS: usize = 512;
/// From one row of scores to the next, in f32.
const SCORE_STRIDE: usize = KEYS + PAD;
/// From one query to the next, in f32.
const QUERY_STRIDE: usize = HEAD_SIZE + PAD;
/// Vectors of scores that become weights side by side.
const GROUP: usize = 4;
/// 64^-½
const SCALE: f32 = 0.125;

/// Attends within each image: `qkv` `[B · T, 3C]` (queries, keys, values, each head by head) to `out`
/// `[B · T, C]`.
pub(crate) fn attention(machine: Machine, qkv: &[f16], tokens: usize, heads: usize, out: &Sink<'_>) {
    machine.dispatch(Attention { qkv, tokens, heads, out });
}

struct Attention<'a, 'b> {
    qkv: &'a [f16], // [B · T, 3C]
    tokens: usize,
    heads: usize,
    out: &'a Sink<'b>, // [B · T, C]
}

impl Kernel for Attention<'_, '_> {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let Self { qkv, tokens, heads, out } = self;
        let width = heads * HEAD_SIZE;
        assert!(qkv.len().is_multiple_of(tokens * 3 * width), "whole images");
        let images = qkv.len() / (tokens * 3 * width);

        // One task per image and head; where those are too few for the threads, some share a head, and
        // each packs its keys and values anew.
        let height = if S::TILES { tiles::PANEL } else { S::MR };
        let tiles = tokens.div_ceil(height);
        let wanted = 4 * rayon::current_num_threads();
        let splits = wanted.div_ceil(images * heads).min(tiles.div_ceil(8)).max(1);
        let share = tiles.div_ceil(splits);
        (0..images * heads * splits).into_par_iter().with_max_len(1).for_each(|task| {
            let (head, split) = (task / splits, task % splits);
            let (image, head) = (head / heads, head % heads);
            let queries = (split * share * height).min(tokens)..((split + 1) * share * height).min(tokens);
            let rows = &qkv[image * tokens * 3 * width..][..tokens * 3 * width];
            with_scratch(Head::scratch_len::<S>(tokens), |scratch| {
                s.vectorize(Head { rows, width, tokens, head, queries, out, first: image * tokens, scratch });
            });
        });
    }
}

/// One head of one image, for some of its queries.
struct Head<'a, 'b> {
    rows: &'a [f16], // [T, 3C]
    width: usize,    // C
    tokens: usize,   // T
    head: usize,
    queries: Range<usize>, // of 0..T
    out: &'a Sink<'b>,     // [B · T, C]
    first: usize,          // the image's first row in `out`
    scratch: &'a mut [f32],
}

impl Head<'_, '_> {
    fn scratch_len<S: Simd>(tokens: usize) -> usize {
        if S::TILES {
            return tiled::scratch_len(tokens);
        }
        let keys = tokens.next_multiple_of(S::NR) * HEAD_SIZE;
        let values = tokens * HEAD_SIZE;
        keys + values + S::MR * (QUERY_STRIDE + SCORE_STRIDE + HEAD_SIZE)
    }
}

impl Kernel for Head<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::TILES {
            return s.with_tiles(
                #[inline(always)]
                || tiled::attend(s, self),
            );
        }
        with_mr!(S, attend(s, self));
    }
}

#[inline(always)]
fn attend<S: Simd, const MR: usize>(s: S, head: Head<'_, '_>) {
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
                decay[i] = s.exp2([s.mul_add(s.splat(before), log2_e, shift)])[0];
                let mut sum = s.mul(total[i], decay[i]);
                let scores = &mut scores[i * SCORE_STRIDE..][..count.next_multiple_of(S::NR)];
                let (groups, rest) = scores.as_chunks_mut::<{ GROUP * MAX_LANES }>();
                for group in groups {
                    for scores in group.chunks_exact_mut(GROUP * S::LANES) {
                        sum = weigh::<S, GROUP>(s, scores, shift, sum);
                    }
                }
                for scores in rest.chunks_exact_mut(S::LANES) {
                    sum = weigh::<S, 1>(s, scores, shift, sum);
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
            for j in 0..HEAD_SIZE / S::NR {
                // SAFETY: two vectors of the sums of row i, panel j; tasks have disjoint heads or queries.
                unsafe {
                    let sums = sums[(j * MR + i) * S::NR..][..S::NR].as_ptr();
                    let v = [s.div(s.load(sums), total), s.div(s.load(sums.add(S::LANES)), total)];
                    out.put(s, first + start + i, column + j * S::NR, S::NR, v);
                }
            }
        }
    }
}

/// Makes weights of the scores of a row, N vectors of them, and adds them up.
#[inline(always)]
fn weigh<S: Simd, const N: usize>(s: S, scores: &mut [f32], shift: S::V, sum: S::V) -> S::V {
    assert!(scores.len() == N * S::LANES);
    let mut p = [shift; N];
    for (p, scores) in p.iter_mut().zip(scores.chunks_exact(S::LANES)) {
        // SAFETY: `scores` has LANES elements.
        *p = s.mul_add(unsafe { s.load(scores.as_ptr()) }, s.splat(LOG2_E), shift);
    }
    let p = s.exp2(p);
    let mut sum = sum;
    for (p, scores) in p.into_iter().zip(scores.chunks_exact_mut(S::LANES)) {
        // SAFETY: `scores` has LANES elements.
        unsafe { s.store(scores.as_mut_ptr(), p) };
        sum = s.add(sum, p);
    }
    sum
}

/// Packs rows `rows` and columns `k` of `keys`, `[.., width]`, as a panel of B: `to[step · NR + row]`.
///
/// Of the `NR` rows of the panel, those not in `rows` become zeros.
#[inline(always)]
fn transpose_rows<S: Simd>(
    s: S,
    keys: &[f16],
    width: usize,
    rows: Range<usize>,
    k: Range<usize>,
    to: &mut [f32], // [k.len(), NR]
) {
    assert!(to.len() >= k.len() * S::NR && rows.len() <= S::NR && k.end <= width);
    assert!(rows.end * width <= keys.len());
    // Two vectors' worth of columns at a time: a cache line of W is read once.
    for step in (0..k.len()).step_by(2 * S::LANES) {
        for half in [0, S::LANES] {
            for step in [step, step + S::LANES] {
                let there = rows.len().saturating_sub(half);
                if there >= S::LANES && step + S::LANES <= k.len() {
                    let from = (rows.start + half) * width + k.start + step;
                    // SAFETY: rows `half .. half + LANES` of `rows` and as many columns from `step` are
                    // within `keys`, by the assertions; in `to`, so many steps of `NR` from `step`.
                    unsafe {
                        let to = to.as_mut_ptr().add(step * S::NR + half);
                        s.transpose_f16(keys.as_ptr().add(from), width, to, S::NR);
                    }
                } else {
                    for step in step..k.len().min(step + S::LANES) {
                        for lane in half..half + S::LANES {
                            to[step * S::NR + lane] = match lane < rows.len() {
                                true => keys[(rows.start + lane) * width + k.start + step].to_f32(),
                                false => 0.0,
                            };
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
