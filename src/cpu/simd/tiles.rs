//! Products of fp16 by hardware that multiplies bf16: each number as the sum of two.
//!
//! ```text
//!   fp16, 11 bits of significand:   x = upper + lower          upper = bf16(x), 8 bits; lower = x − upper, 3 bits
//!
//!   x · y = upper · upper' + lower · upper' + upper · lower'  (+ lower · lower', at most 2^-16 of it)
//! ```
//!
//! The split is exact, and so is each product of two bf16 in f32: three products at sixteen times the rate of an f32
//! multiply-add. The fourth is left out of linear layers: it is of random sign and at most 2^-16 of a term, where the fp16
//! that the terms were rounded to has errors of 2^-12, and the result is rounded to it again. Scores of attention, which
//! are exponents, have all four. Where all of B is bf16 to begin with, as weights mostly are, its lower halves are zeros and
//! two products are exact. An infinity splits into itself and a NaN: it comes out as a NaN, which the sequence's check
//! reports as it does an infinity.
//!
//! # Layout
//! 32 rows (of A) or columns (of B) are a panel, 32 steps of k of a panel a block:
//!
//! ```text
//!   A:  [panels][⌈K / 32⌉][upper, lower][2 halves][16 rows][32 k]
//!   B:  [panels][⌈K / 32⌉][upper, lower][2 halves][16 pairs of k][16 columns][2]
//!   acc:                               [2 halves of A][2 halves of B][16 rows][16 columns]   f32
//! ```
//!
//! K and the rows are padded to whole blocks: with zeros along K, with anything along the rows. A B of bf16 is without
//! its lower halves.
//!
//! # Numerics
//! The order of a sum is fixed by k alone: block by block; in a block first upper · upper, then lower · upper, then upper
//! · lower, and last, where it is not left out, lower · lower; in each, even and odd k by themselves from 0, then their sum onto what was there. No block is cut.

use half::bf16;

use super::{MAX_LANES, Simd};

/// Rows of A, or columns of B, in a panel; and steps of k in a block.
pub(crate) const PANEL: usize = 32;
/// Rows of a tile.
const TILE: usize = 16;
/// Elements of a block before it is split.
pub(crate) const BLOCK: usize = PANEL * PANEL;
/// Elements of a split block: the upper halves of all, then the lower.
pub(crate) const SPLIT: usize = 2 * BLOCK;
/// Accumulators of one panel of A with one of B.
pub(crate) const ACC: usize = PANEL * PANEL;

/// Where row `row` of A, or the pair of k that holds it, begins in its half-block: element `k` of `row`, both below
/// [`PANEL`], is at `row_of_a(row) + k`.
#[inline(always)]
pub(crate) fn row_of_a(row: usize) -> usize {
    row * PANEL
}

/// Where element `k` of column `column` of B is in its half-block; both below [`PANEL`].
#[inline(always)]
pub(crate) fn element_of_b(k: usize, column: usize) -> usize {
    ((column / TILE * TILE + k / 2) * TILE + column % TILE) * 2 + k % 2
}

/// Where columns `column ..`, up to the next multiple of 16, of row `row` begin among the accumulators.
#[inline(always)]
pub(crate) fn row_of_acc(row: usize, column: usize) -> usize {
    ((row / TILE * 2 + column / TILE) * TILE + row % TILE) * TILE + column % TILE
}

/// [`Simd::store_split`], lane by lane.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn store_split<S: Simd>(s: S, upper: *mut u16, lower: *mut u16, a: S::V) {
    let mut lanes = [0.0f32; MAX_LANES];
    // SAFETY: there is room for `MAX_LANES`; the caller's promise.
    unsafe {
        s.store(lanes.as_mut_ptr(), a);
        for (i, &x) in lanes[..S::LANES].iter().enumerate() {
            let high = bf16::from_f32(x);
            upper.add(i).write(high.to_bits());
            lower.add(i).write(bf16::from_f32(x - high.to_f32()).to_bits());
        }
    }
}

/// [`Simd::store_split_pair`], lane by lane.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn store_split_pair<S: Simd>(s: S, upper: *mut u16, lower: *mut u16, a: [S::V; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        store_split(s, upper, lower, a[0]);
        store_split(s, upper.add(S::LANES), lower.add(S::LANES), a[1]);
    }
}

/// [`Simd::add_products`] in plain Rust, with the bits of the hardware: multiply-adds rounded once.
///
/// # Safety
/// As there.
pub(super) unsafe fn add_products<const TERMS: usize>(
    steps: usize,
    (a, b): (*const u16, *const u16),
    acc: *mut f32,
    fresh: bool,
    mut meanwhile: impl FnMut(usize, usize),
) {
    let block_of_b = if TERMS == 2 { BLOCK } else { SPLIT };
    // SAFETY: the caller's promise.
    let (a, b, acc) = unsafe {
        (
            std::slice::from_raw_parts(a, steps * SPLIT),
            std::slice::from_raw_parts(b, steps * block_of_b),
            std::slice::from_raw_parts_mut(acc, ACC),
        )
    };
    if fresh {
        acc.fill(0.0);
    }
    let value = |bits: u16| bf16::from_bits(bits).to_f32();
    for (step, (a, b)) in a.chunks_exact(SPLIT).zip(b.chunks_exact(block_of_b)).enumerate() {
        let ((a_upper, a_lower), (b_upper, b_lower)) = (a.split_at(BLOCK), b.split_at(BLOCK));
        let products = [(a_upper, b_upper), (a_lower, b_upper), (a_upper, b_lower), (a_lower, b_lower)];
        for (term, (a, b)) in products.into_iter().take(TERMS).enumerate() {
            for row in 0..PANEL {
                for column in 0..PANEL {
                    let mut sums = [0.0f32; 2];
                    for k in 0..PANEL {
                        let (x, y) = (value(a[row_of_a(row) + k]), value(b[element_of_b(k, column)]));
                        sums[k % 2] = x.mul_add(y, sums[k % 2]);
                    }
                    acc[row_of_acc(row, column)] += sums[0] + sums[1];
                }
            }
            meanwhile(step, term);
        }
    }
}
