//! Linear layers: `Y [M, N] = X [M, K] · Wᵀ [K, N]`, X and W in fp16, f32 inside, epilogue at the store.
//!
//! ```text
//!            W [N, K] fp16                  a task: 128 columns of Y, some or all of the rows
//!            128 rows × KC ──pack──▶ B, f32, [4 panels][KC][NR = 32]   stays in L2 while it is used
//!                                    │
//!   X [M, K] fp16                    ▼
//!   12 rows × KC ──widen──▶ A, f32, [MR = 12][KC + pad]     one panel after the other, fetched ahead
//!                                    │
//!                                    ▼
//!                        12 × 32 accumulators ──last piece of K?── no ──▶ partial sums, f32
//!                                    │ yes
//!                                    ▼
//!                        epilogue: + bias, activation, + residual … ──▶ Y, fp16, rounded once
//! ```
//!
//! Packing W costs 1/M of the multiplications, widening X 1/128. Rows of X are padded with zeros to whole tiles,
//! columns of W to whole panels, so the same tile serves edges; only valid elements reach the epilogue.
//!
//! # Numerics
//! fp16 to f32 is exact. Each element of Y is one chain of f32 multiply-adds over k = 0, 1, … K−1 from 0
//! (`tile`), whatever the sizes, tasks and threads. The epilogue works in f32 and rounds to fp16 once.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::epilogue::Epilogue;
use super::scratch::with_scratch;
use super::simd::{Kernel, MAX_LANES, Machine, Simd};
use super::tile::{self, Ahead, PAD, with_mr};

/// Columns of Y in one task, at least; a multiple of every `NR`.
const TASK_COLUMNS: usize = 128;
/// Rows of Y in one task, at most: what bounds its partial sums.
const TASK_ROWS: usize = 1536;

/// The rows of X: all of a buffer, or those of each image that follow its class token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    data: &'a [f16], // [.., K]
    width: usize,    // K
    group: usize,    // rows taken from each image
    period: usize,   // rows from an image's first to the next image's first
    first: usize,    // rows skipped in each image
}

impl<'a> Rows<'a> {
    /// All rows of `data`, `[M, K]`.
    pub(crate) fn all(data: &'a [f16], width: usize) -> Self {
        let rows = data.len() / width;
        Self { data, width, group: rows.max(1), period: rows, first: 0 }
    }

    /// Of `data`, `[B · T, K]`, the rows of each image but its first: M = B · (T − 1).
    pub(crate) fn without_class(data: &'a [f16], width: usize, tokens: usize) -> Self {
        Self { data, width, group: tokens - 1, period: tokens, first: 1 }
    }

    /// M.
    pub(crate) fn count(&self) -> usize {
        self.data.len() / self.width / self.period.max(1) * self.group
    }

    /// Row `i` of M, `[K]`.
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [f16] {
        let at = i / self.group * self.period + self.first + i % self.group;
        &self.data[at * self.width..][..self.width]
    }
}

/// Runs a linear layer over `x` and hands each finished element to `epilogue`; `weight` is `[N, K]`.
pub(crate) fn linear<E: Epilogue>(machine: Machine, x: Rows<'_>, weight: &[f16], epilogue: &E) {
    machine.dispatch(Linear { x, weight, epilogue });
}

struct Linear<'a, E> {
    x: Rows<'a>,
    weight: &'a [f16], // [N, K]
    epilogue: &'a E,
}

impl<E: Epilogue> Kernel for Linear<'_, E> {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let Self { x, weight, epilogue } = self;
        let (rows, k) = (x.count(), x.width);
        assert!(weight.len().is_multiple_of(k), "a weight of whole rows");
        let n = weight.len() / k;
        let columns = n.div_ceil(TASK_COLUMNS);
        let panels = rows.div_ceil(S::MR);
        // Enough tasks that threads end together, and none with more rows than its partial sums may have;
        // but each packs its part of W itself, so no more than that.
        let wanted = (4 * rayon::current_num_threads()).div_ceil(columns).min(panels.div_ceil(8));
        let splits = wanted.max(rows.div_ceil(TASK_ROWS)).max(1);
        let share = panels.div_ceil(splits);
        (0..columns * splits).into_par_iter().with_max_len(1).for_each(|task| {
            let (column, split) = (task / splits, task % splits);
            let rows = (split * share * S::MR).min(rows)..((split + 1) * share * S::MR).min(rows);
            let columns = column * TASK_COLUMNS..((column + 1) * TASK_COLUMNS).min(n);
            with_scratch(scratch_len::<S>(rows.len(), columns.len(), k), |scratch| {
                s.vectorize(Task { x, weight, rows, columns, epilogue, scratch });
            });
        });
    }
}

/// Converts fp16 to f32, as many.
#[inline(always)]
pub(crate) fn widen<S: Simd>(s: S, from: &[f16], to: &mut [f32]) {
    let (whole, rest) = from.as_chunks::<{ MAX_LANES }>();
    let (to_whole, to_rest) = to.as_chunks_mut::<{ MAX_LANES }>();
    for (from, to) in whole.iter().zip(to_whole) {
        for lane in (0..MAX_LANES).step_by(S::LANES) {
            // SAFETY: `lane + LANES <= MAX_LANES`, the length of both.
            unsafe { s.store(to.as_mut_ptr().add(lane), s.load_f16(from.as_ptr().add(lane))) };
        }
    }
    for (from, to) in rest.iter().zip(to_rest) {
        *to = from.to_f32();
    }
}

/// Some columns of Y for some of its rows.
struct Task<'a, E> {
    x: Rows<'a>,       // [M, K]
    weight: &'a [f16], // [N, K]
    rows: Range<usize>,
    columns: Range<usize>,
    epilogue: &'a E,
    scratch: &'a mut [f32],
}

/// f32 of a task: a panel of A, the packed B, and partial sums where K comes in more than one piece.
fn scratch_len<S: Simd>(rows: usize, columns: usize, k: usize) -> usize {
    let width = columns.next_multiple_of(S::NR);
    let partial = if k > S::KC { rows.next_multiple_of(S::MR) * width } else { 0 };
    S::MR * (S::KC + PAD) + S::KC.min(k) * width + partial
}

impl<E: Epilogue> Kernel for Task<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        with_mr!(S, run_task(s, self));
    }
}

#[inline(always)]
fn run_task<S: Simd, const MR: usize>(s: S, task: Task<'_, impl Epilogue>) {
    let Task { x, weight, rows, columns, epilogue, scratch } = task;
    let k = x.width;
    let stride = S::KC + PAD;
    let pieces = k.div_ceil(S::KC);
    let width = columns.len().next_multiple_of(S::NR);
    let (a, scratch) = scratch.split_at_mut(MR * stride); // [MR][KC + PAD]
    let (b, partial) = scratch.split_at_mut(S::KC.min(k) * width); // [width / NR][kc][NR], and below
    for piece in 0..pieces {
        let k0 = piece * S::KC;
        let kc = S::KC.min(k - k0);
        let b = &mut b[..kc * width];
        for (j, b) in b.chunks_exact_mut(kc * S::NR).enumerate() {
            let from = columns.start + j * S::NR;
            transpose_rows(s, weight, k, from..columns.end.min(from + S::NR), k0..k0 + kc, b);
        }
        // Rows of X that the next panel takes, to be fetched by the tiles of this one.
        let per_tile = MR.div_ceil(width / S::NR);
        let mut partial = partial.chunks_exact_mut(MR * S::NR); // [panels][width / NR], each [MR][NR]
        for first in rows.clone().step_by(MR) {
            for (i, a) in a.chunks_exact_mut(stride).enumerate() {
                match first + i < rows.end {
                    true => widen(s, &x.row(first + i)[k0..k0 + kc], &mut a[..kc]),
                    false => a[..kc].fill(0.0),
                }
            }
            for (j, b) in b.chunks_exact(kc * S::NR).enumerate() {
                let mut sums = partial.next();
                let next = |row: usize| x.row((first + MR + row).min(rows.end - 1))[k0..].as_ptr().cast();
                let ahead = Ahead(std::array::from_fn(|i| next((j * per_tile + i).min(MR - 1))));
                // SAFETY: `a` holds MR rows of KC + PAD, `b` kc rows of NR, and `sums` a tile.
                let acc = unsafe {
                    let acc = match &sums {
                        Some(sums) if piece > 0 => tile::load::<S, MR>(s, sums.as_ptr()),
                        _ => tile::zeros::<S, MR>(s),
                    };
                    let (a, b) = ((a.as_ptr(), S::KC + PAD), (b.as_ptr(), S::NR));
                    tile::tile::<S, MR>(s, kc, a, b, Some(ahead), acc)
                };
                if piece + 1 < pieces {
                    let sums = sums.as_mut().expect("partial sums where there are pieces");
                    // SAFETY: `sums` is a tile.
                    unsafe { tile::store(s, sums.as_mut_ptr(), S::NR, acc) };
                    continue;
                }
                let column = columns.start + j * S::NR;
                let count = S::NR.min(columns.end - column);
                for (row, acc) in (first..rows.end).zip(acc) {
                    // SAFETY: tasks have disjoint columns or rows, and tiles within one have, too.
                    unsafe { epilogue.store(s, row, column, count, acc) };
                }
            }
        }
    }
}

/// Packs rows `rows` and columns `k` of `weight`, `[.., width]`, as a panel of B: `to[step · NR + row]`.
///
/// Of the `NR` rows of the panel, those not in `rows` become zeros.
#[inline(always)]
pub(crate) fn transpose_rows<S: Simd>(
    s: S,
    weight: &[f16],
    width: usize,
    rows: Range<usize>,
    k: Range<usize>,
    to: &mut [f32], // [k.len(), NR]
) {
    assert!(to.len() >= k.len() * S::NR && rows.len() <= S::NR && k.end <= width);
    assert!(rows.end * width <= weight.len());
    // Two vectors' worth of columns at a time: a cache line of W is read once.
    for step in (0..k.len()).step_by(2 * S::LANES) {
        for half in [0, S::LANES] {
            for step in [step, step + S::LANES] {
                let there = rows.len().saturating_sub(half);
                if there >= S::LANES && step + S::LANES <= k.len() {
                    let from = (rows.start + half) * width + k.start + step;
                    // SAFETY: rows `half .. half + LANES` of `rows` and as many columns from `step` are
                    // within `weight`, by the assertions; in `to`, so many steps of `NR` from `step`.
                    unsafe {
                        let to = to.as_mut_ptr().add(step * S::NR + half);
                        s.transpose_f16(weight.as_ptr().add(from), width, to, S::NR);
                    }
                } else {
                    for step in step..k.len().min(step + S::LANES) {
                        for lane in half..half + S::LANES {
                            to[step * S::NR + lane] = match lane < rows.len() {
                                true => weight[(rows.start + lane) * width + k.start + step].to_f32(),
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
