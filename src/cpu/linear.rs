//! Linear layers: `Y [M, N] = X [M, K] · Wᵀ [K, N]`, X and W in fp16, f32 inside, epilogue at the store.
//!
//! ```text
//!            W [N, K] fp16, packed          a task: 128 columns of Y, some or all of the rows
//!            4 panels × KC ─widen──▶ B, f32, [4 panels][KC][NR = 32]   stays in L2 while it is used
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
//! Widening W costs 1/M of the multiplications, widening X 1/128. Rows of X are padded with zeros to whole tiles,
//! columns of W to whole panels, so the same tile serves edges; only valid elements reach the epilogue.
//!
//! # Numerics
//! fp16 to f32 is exact. Each element of Y is one chain of f32 multiply-adds over k = 0, 1, … K−1 from 0
//! (`tile`), whatever the sizes, tasks and threads. The epilogue works in f32 and rounds to fp16 once.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::epilogue::Epilogue;
use super::operand::{Input, Rows};
use super::packed::{Packed, Panel, panel_width};
use super::scratch::with_scratch;
use super::simd::{Kernel, MAX_LANES, Machine, Simd, tiles};
use super::tile::{self, Ahead, PAD, with_mr};

pub(crate) mod tiled;

/// Columns of Y in one task, at least; a multiple of every `NR`.
const TASK_COLUMNS: usize = 128;
/// Panels of rows in one task, at least.
const LEAST_PANELS: usize = 8;
/// Rows of Y in one task, at most: what bounds its partial sums.
const TASK_ROWS: usize = 1536;

/// Runs a linear layer over `x` and hands each finished element to `epilogue`.
///
/// # Panics
/// If `x` and `weight` are not of one K, or either is not in this machine's form.
pub(crate) fn linear<E: Epilogue>(machine: Machine, x: Input<'_>, weight: &Packed, epilogue: &E) {
    machine.dispatch(Linear { x, weight, epilogue });
}

struct Linear<'a, E> {
    x: Input<'a>,
    weight: &'a Packed, // [N, K]
    epilogue: &'a E,
}

impl<E: Epilogue> Kernel for Linear<'_, E> {
    type Output = ();

    fn run<S: Simd>(self, s: S) {
        let Self { x, weight, epilogue } = self;
        let ((rows, k), n) = (x.shape(), weight.n());
        assert_eq!(k, weight.k(), "one K");
        let height = if S::TILES { tiles::PANEL } else { S::MR };
        let threads = rayon::current_num_threads();
        let task_columns = match S::TILES {
            true => tiled::task_columns(n, rows, threads),
            false => TASK_COLUMNS,
        };
        let columns = n.div_ceil(task_columns);
        let panels = rows.div_ceil(height);
        // Enough tasks that threads end together, and none with more rows than its partial sums may have;
        // but each converts its part of W itself, so no more than that.
        let wanted = (4 * threads).div_ceil(columns).min(panels.div_ceil(LEAST_PANELS));
        let splits = wanted.max(rows.div_ceil(TASK_ROWS)).max(1);
        let share = panels.div_ceil(splits);
        let per_task = task_columns / panel_width::<S>();
        let weights: Vec<Panel<'_>> = weight.panels::<S>().collect();
        (0..columns * splits).into_par_iter().with_max_len(1).for_each(|task| {
            let (column, split) = (task / splits, task % splits);
            let rows = (split * share * height).min(rows)..((split + 1) * share * height).min(rows);
            let columns = column * task_columns..((column + 1) * task_columns).min(n);
            let weights = &weights[column * per_task..weights.len().min((column + 1) * per_task)];
            match x {
                Input::Rows(x) => {
                    assert!(!S::TILES, "rows are for machines without tiles");
                    let len = scratch_len::<S>(rows.len(), columns.len(), k);
                    with_scratch(len, |scratch| {
                        s.vectorize(Task { x, weights, rows, columns, epilogue, scratch })
                    });
                }
                Input::Split { data, .. } => {
                    assert!(S::TILES, "split panels are for machines with tiles");
                    let len = tiled::scratch_len(rows.len(), weights, k);
                    let x = data;
                    with_scratch(len, |scratch| {
                        s.vectorize(tiled::Task { x, k, weights, rows, columns, epilogue, scratch });
                    });
                }
            }
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
    x: Rows<'a>,              // [M, K]
    weights: &'a [Panel<'a>], // those of `columns`, each [K][NR]
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
    let Task { x, weights, rows, columns, epilogue, scratch } = task;
    let k = x.width();
    let stride = S::KC + PAD;
    let pieces = k.div_ceil(S::KC);
    let width = columns.len().next_multiple_of(S::NR);
    let (a, scratch) = scratch.split_at_mut(MR * stride); // [MR][KC + PAD]
    let (b, partial) = scratch.split_at_mut(S::KC.min(k) * width); // [width / NR][kc][NR], and below
    for piece in 0..pieces {
        let k0 = piece * S::KC;
        let kc = S::KC.min(k - k0);
        let b = &mut b[..kc * width];
        for (b, panel) in b.chunks_exact_mut(kc * S::NR).zip(weights) {
            let Panel::F16(panel) = panel else { unreachable!("bf16 is for machines with tiles") };
            widen(s, &panel[k0 * S::NR..][..kc * S::NR], b);
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

#[cfg(test)]
mod tests;
