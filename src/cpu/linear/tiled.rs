//! The task of a linear layer on machines with tiles.
//!
//! ```text
//!            W, packed                              a task: 256 columns of Y, some or all of the rows
//!            8 panels × 1024 ──(split)──▶ B         bf16 as they lie, fp16 as two bf16 to a number; stays in L2
//!                                         │
//!   X, split                              ▼
//!   a panel × 1024 ───────────▶ 32 × 256 sums ──last piece of K?── no ──▶ kept for the next piece
//!                                         │ yes
//!                                         ▼
//!                               epilogue, row by row ──▶ Y, fp16, rounded once
//! ```
//!
//! While the tiles of one panel of X are at work, the vectors take the panel before through the epilogue, a row of 32 columns
//! for each step of k; the next panel is on its way to L2, and so are the weights of the next piece or task.

use std::ops::Range;

use half::f16;

use super::LEAST_PANELS;
use crate::cpu::epilogue::Epilogue;
use crate::cpu::packed::Panel;
use crate::cpu::simd::tiles::{ACC, BLOCK, PANEL, SPLIT, row_of_acc};
use crate::cpu::simd::{Kernel, Simd};

/// Columns of Y in one task, at most: each task reads all of X, 4 bytes to a number, from L3.
const TASK_COLUMNS: usize = 256;
/// Blocks of K in a piece: 8 panels of so many take 512 KiB as bf16, twice that split.
pub(crate) const BLOCKS: usize = 32;

/// Some columns of Y for some of its rows.
pub(super) struct Task<'a, E> {
    pub(super) x: &'a [u16],             // [⌈M / 32⌉][⌈K / 32⌉][SPLIT]
    pub(super) k: usize,                 // K
    pub(super) weights: &'a [Panel<'a>], // those of `columns`, each [⌈K / 32⌉][BLOCK]
    pub(super) rows: Range<usize>,       // begins with a panel
    pub(super) columns: Range<usize>,
    pub(super) epilogue: &'a E,
    pub(super) scratch: &'a mut [f32],
}

/// Columns of Y `[rows, n]` in one task: half of the most, or a quarter, where otherwise there would be too few tasks.
pub(super) fn task_columns(n: usize, rows: usize, threads: usize) -> usize {
    let splits = rows.div_ceil(LEAST_PANELS * PANEL);
    let enough = |columns: &usize| n.div_ceil(*columns) * splits >= 2 * threads;
    [TASK_COLUMNS, TASK_COLUMNS / 2].into_iter().find(enough).unwrap_or(TASK_COLUMNS / 4)
}

/// f32 of a task: the split B, and accumulators.
pub(super) fn scratch_len(rows: usize, weights: &[Panel<'_>], k: usize) -> usize {
    let blocks = k.div_ceil(PANEL);
    split_len(weights, blocks) + sets(rows.div_ceil(PANEL), blocks) * weights.len() * ACC
}

/// f32 of the split B: nothing where all of W is read in place.
fn split_len(weights: &[Panel<'_>], blocks: usize) -> usize {
    match weights.iter().all(|panel| matches!(panel, Panel::Bf16(_))) {
        true => 0,
        false => weights.len() * BLOCKS.min(blocks) * SPLIT / 2,
    }
}

/// Sets of accumulators for so many panels of X: one for each while K comes in pieces, otherwise one for products and one
/// for the epilogue.
fn sets(panels: usize, blocks: usize) -> usize {
    if blocks > BLOCKS { panels.max(2) } else { 2 }
}

impl<E: Epilogue> Kernel for Task<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.with_tiles(
            #[inline(always)]
            || run(s, self),
        );
    }
}

#[inline(always)]
fn run<S: Simd>(s: S, task: Task<'_, impl Epilogue>) {
    let Task { x, k, weights, rows, columns, epilogue, scratch } = task;
    let blocks = k.div_ceil(PANEL);
    let panels = rows.start / PANEL..rows.end.div_ceil(PANEL);
    assert!(rows.start.is_multiple_of(PANEL) && panels.end * blocks * SPLIT <= x.len());
    let (b, sums) = scratch.split_at_mut(split_len(weights, blocks));
    let b: &mut [u16] = bytemuck::cast_slice_mut(b); // [panels of W][blocks][SPLIT]
    let set = weights.len() * ACC; // of one panel of X: [panels of W][ACC]
    let sets = sets(panels.len(), blocks);
    let rows_of = |panel: usize| panel * PANEL..rows.end.min((panel + 1) * PANEL);
    for first in (0..blocks).step_by(BLOCKS) {
        let count = BLOCKS.min(blocks - first);
        for (b, panel) in b.chunks_exact_mut(count * SPLIT).zip(weights) {
            if let Panel::F16(panel) = panel {
                split(s, &panel[first * BLOCK..][..count * BLOCK], b);
            }
        }
        let last = first + count == blocks;
        for (i, panel) in panels.clone().enumerate() {
            let [here, before] = [i, i + sets - 1].map(|i| i % sets * set..(i % sets + 1) * set);
            let [here, before] = sums.get_disjoint_mut([here, before]).expect("two sets or more");
            let mut results = match last && i > 0 {
                true => Results::new(epilogue, rows_of(panel - 1), columns.clone(), before),
                false => Results::new(epilogue, 0..0, columns.clone(), &[]),
            };
            let from = (panel * blocks + first) * SPLIT;
            let a = &x[from..][..count * SPLIT];
            let next = x.as_ptr().wrapping_add(from + blocks * SPLIT).cast::<u8>();
            for (j, (w, acc)) in weights.iter().zip(here.chunks_exact_mut(ACC)).enumerate() {
                // Of the next panel of X a part each step, so that it is in L2 when its turn comes; of these panels of W the
                // next piece, or the first one of the next task's, which lie behind them, a cache line.
                let part = size_of_val(a) / (count * weights.len());
                let next = next.wrapping_add(j * count * part);
                let following = if last { weights.len() * blocks * BLOCK } else { (first + count) * BLOCK };
                let following = w.address(following).wrapping_add(64 * i * count);
                let fresh = first == 0;
                let meanwhile = (next, part, following);
                // SAFETY: `a`, the panel of W and, where that is split, its part of `b` have `count` blocks, `acc` is ACC
                // long and none of the results; tiles are there by `with_tiles`.
                unsafe {
                    match w {
                        Panel::F16(_) => {
                            let b = &b[j * count * SPLIT..][..count * SPLIT];
                            s.add_products::<3>(
                                count,
                                (a.as_ptr(), b.as_ptr()),
                                acc.as_mut_ptr(),
                                fresh,
                                #[inline(always)]
                                |step, term| results.advance(s, (step, term), meanwhile),
                            );
                        }
                        Panel::Bf16(w) => {
                            let b = &w[first * BLOCK..][..count * BLOCK];
                            s.add_products::<2>(
                                count,
                                (a.as_ptr(), b.as_ptr().cast()),
                                acc.as_mut_ptr(),
                                fresh,
                                #[inline(always)]
                                |step, term| results.advance(s, (step, term), meanwhile),
                            );
                        }
                    }
                }
            }
            results.finish(s);
        }
        if last && !panels.is_empty() {
            let i = (panels.len() - 1) % sets;
            Results::new(epilogue, rows_of(panels.end - 1), columns.clone(), &sums[i * set..][..set])
                .finish(s);
        }
    }
}

/// The sums of one panel of X with some of W, on their way through the epilogue.
struct Results<'a, E> {
    epilogue: &'a E,
    rows: Range<usize>,
    columns: Range<usize>,
    acc: &'a [f32], // [panels of W][ACC], those that are not begun or finished
    row: usize,     // the next one to finish
}

impl<'a, E: Epilogue> Results<'a, E> {
    #[inline(always)]
    fn new(epilogue: &'a E, rows: Range<usize>, columns: Range<usize>, acc: &'a [f32]) -> Self {
        Self { epilogue, row: rows.start, rows, columns, acc }
    }

    /// Finishes a row of the first panel of W that has any.
    #[inline(always)]
    fn finish_row<S: Simd>(&mut self, s: S) {
        let end = self.columns.end.min(self.columns.start + PANEL);
        for column in (self.columns.start..end).step_by(S::NR) {
            let (row_of, panel_column) = (self.row % PANEL, column - self.columns.start);
            let (low, high) = (row_of_acc(row_of, panel_column), row_of_acc(row_of, panel_column + S::LANES));
            let (low, high) = (&self.acc[low..][..S::LANES], &self.acc[high..][..S::LANES]);
            // SAFETY: LANES accumulators within one row of 16 each; elements of Y are some task's alone.
            unsafe {
                let acc = [s.load(low.as_ptr()), s.load(high.as_ptr())];
                self.epilogue.store(s, self.row, column, S::NR.min(end - column), acc);
            }
        }
        self.row += 1;
        if self.row == self.rows.end {
            self.row = self.rows.start;
            self.columns.start = end;
            self.acc = &self.acc[ACC..];
        }
    }

    /// What is done between two products: once a step, finishes a row and brings nearer what will be read.
    #[inline(always)]
    fn advance<S: Simd>(
        &mut self,
        s: S,
        (step, term): (usize, usize),
        (next, part, following): (*const u8, usize, *const u8),
    ) {
        if term == 0 {
            for line in (0..part).step_by(64) {
                s.prefetch(next.wrapping_add(step * part + line));
            }
            s.prefetch(following.wrapping_add(64 * step));
        } else if term == 1 && !self.acc.is_empty() {
            self.finish_row(s);
        }
    }

    /// Finishes what is left.
    #[inline(always)]
    fn finish<S: Simd>(mut self, s: S) {
        while !self.acc.is_empty() {
            self.finish_row(s);
        }
    }
}

/// Splits blocks of fp16, `[blocks][BLOCK]`, into `[blocks][SPLIT]`.
#[inline(always)]
pub(crate) fn split<S: Simd>(s: S, from: &[f16], to: &mut [u16]) {
    for (from, to) in from.chunks_exact(BLOCK).zip(to.chunks_exact_mut(SPLIT)) {
        let (upper, lower) = to.split_at_mut(BLOCK);
        for i in (0..BLOCK).step_by(S::LANES) {
            let (upper, lower) = (&mut upper[i..i + S::LANES], &mut lower[i..i + S::LANES]);
            let from = &from[i..i + S::LANES];
            // SAFETY: LANES elements each.
            unsafe { s.store_split(upper.as_mut_ptr(), lower.as_mut_ptr(), s.load_f16(from.as_ptr())) };
        }
    }
}
