//! The task of a linear layer on machines with tiles.
//!
//! ```text
//!            W, packed fp16                        a task: 128 columns of Y, some or all of the rows
//!            4 panels × 1024 ──split──▶ B, two bf16 to a number, [4 panels][blocks][2][1024]   stays in L2
//!                                       │
//!   X, split                            ▼
//!   a panel × 1024 ────────▶ 32 × 32 accumulators ──last piece of K?── no ──▶ partial sums, f32
//!                                       │ yes
//!                                       ▼
//!                            epilogue, row by row ──▶ Y, fp16, rounded once
//! ```
//!
//! While the tiles of one panel of X are at work, the next panel is on its way to L2, and so are the weights of the next
//! piece or task.

use std::ops::Range;

use half::f16;

use crate::cpu::epilogue::Epilogue;
use crate::cpu::simd::tiles::{ACC, Ahead, BLOCK, PANEL, SPLIT, row_of_acc};
use crate::cpu::simd::{Kernel, Simd};

/// Blocks of K between two splittings of B: 4 panels of so many take 512 KiB.
pub(crate) const BLOCKS: usize = 32;

/// Some columns of Y for some of its rows.
pub(super) struct Task<'a, E> {
    pub(super) x: &'a [u16],             // [⌈M / 32⌉][⌈K / 32⌉][SPLIT]
    pub(super) k: usize,                 // K
    pub(super) weights: &'a [&'a [f16]], // the panels of `columns`, each [⌈K / 32⌉][BLOCK]
    pub(super) rows: Range<usize>,       // begins with a panel
    pub(super) columns: Range<usize>,
    pub(super) epilogue: &'a E,
    pub(super) scratch: &'a mut [f32],
}

/// f32 of a task: the split B, accumulators, and partial sums where K comes in more than one piece.
pub(super) fn scratch_len(rows: usize, panels: usize, k: usize) -> usize {
    let blocks = k.div_ceil(PANEL);
    let partial = if blocks > BLOCKS { rows.div_ceil(PANEL) * panels * ACC } else { 0 };
    panels * BLOCKS.min(blocks) * SPLIT / 2 + ACC + partial
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
    let (b, scratch) = scratch.split_at_mut(weights.len() * BLOCKS.min(blocks) * SPLIT / 2);
    let b: &mut [u16] = bytemuck::cast_slice_mut(b); // [panels][blocks][SPLIT]
    let (acc, partial) = scratch.split_at_mut(ACC);
    for first in (0..blocks).step_by(BLOCKS) {
        let count = BLOCKS.min(blocks - first);
        for (b, panel) in b.chunks_exact_mut(count * SPLIT).zip(weights) {
            split(s, &panel[first * BLOCK..][..count * BLOCK], b);
        }
        let last = first + count == blocks;
        let mut partial = partial.chunks_exact_mut(ACC);
        for panel in panels.clone() {
            let a = &x[(panel * blocks + first) * SPLIT..][..count * SPLIT];
            let next =
                x[(panel * blocks + first) * SPLIT..].as_ptr().wrapping_add(blocks * SPLIT).cast::<u8>();
            for (j, b) in b.chunks_exact(count * SPLIT).take(weights.len()).enumerate() {
                let acc = match partial.next() {
                    Some(sums) => sums,
                    None => &mut *acc,
                };
                let kilobytes = next.wrapping_add(j * count * 1024);
                // The next piece of these panels of W, or the first of the next task's, which lie behind these.
                let from = if last { weights.len() * blocks * BLOCK } else { (first + count) * BLOCK };
                let following = weights[j].as_ptr().wrapping_add(from).cast::<u8>();
                let lines = following.wrapping_add(64 * count * (panel - panels.start));
                let ahead = Ahead { kilobytes, lines };
                let (column, rows) =
                    (columns.start + j * PANEL, panel * PANEL..rows.end.min((panel + 1) * PANEL));
                if last {
                    // What the epilogue writes is here by the time the products are.
                    rows.clone().for_each(
                        #[inline(always)]
                        |row| epilogue.expect(s, row, column),
                    );
                }
                // SAFETY: `a` and `b` have `count` blocks, `acc` is ACC long; tiles are there by `with_tiles`.
                unsafe {
                    s.add_products::<false>(
                        count,
                        a.as_ptr(),
                        b.as_ptr(),
                        acc.as_mut_ptr(),
                        first == 0,
                        ahead,
                    )
                };
                if last {
                    for row in rows {
                        finish(s, row, column..columns.end.min(column + PANEL), acc, epilogue);
                    }
                }
            }
        }
    }
}

/// Hands one row of the accumulators to the epilogue, its `columns` of Y.
#[inline(always)]
fn finish<S: Simd>(s: S, row: usize, columns: Range<usize>, acc: &[f32], epilogue: &impl Epilogue) {
    for column in columns.clone().step_by(S::NR) {
        let (row_of, panel_column) = (row % PANEL, column - columns.start);
        let (low, high) = (row_of_acc(row_of, panel_column), row_of_acc(row_of, panel_column + S::LANES));
        let (low, high) = (&acc[low..][..S::LANES], &acc[high..][..S::LANES]);
        // SAFETY: LANES accumulators within one row of 16 each; elements of Y are some task's alone.
        unsafe {
            let acc = [s.load(low.as_ptr()), s.load(high.as_ptr())];
            epilogue.store(s, row, column, S::NR.min(columns.end - column), acc);
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
