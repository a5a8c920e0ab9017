//! Layer norm over channels: `y = (x − mean) / √(variance + ε) · weight + bias`, row by row.
//!
//! # Numerics
//! Two passes in f32: the mean first, then the mean square of what is left, so that a mean many deviations
//! from 0 costs nothing (`E[x²] − mean²` would cancel). Each pass adds into [`CHAINS`] vectors in a fixed
//! order. The result is rounded to fp16 once.

use half::f16;
use rayon::prelude::*;

use super::simd::{Kernel, Machine, Simd};
use crate::checkpoint::weights::NormWeights;
use crate::config::LAYER_NORM_EPS;

/// Independent sums per row: enough to hide the latency of an addition.
const CHAINS: usize = 4;
/// Rows that one task takes: some microseconds of work.
const ROWS: usize = 16;

/// Normalises the rows of `x` into `y`; both `[rows, C]`, C = the length of `norm.weight`, a multiple of 16.
pub(crate) fn layer_norm(machine: Machine, norm: &NormWeights, x: &[f16], y: &mut [f16]) {
    assert_eq!(x.len(), y.len(), "rows in, rows out");
    let block = ROWS * norm.weight.len();
    y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
        y.copy_from_slice(x);
        machine.vectorize(Block { norm, y });
    });
}

/// Normalises the rows of `y`, `[rows, C]`, where they are.
pub(crate) fn layer_norm_in_place(machine: Machine, norm: &NormWeights, y: &mut [f16]) {
    let block = ROWS * norm.weight.len();
    y.par_chunks_mut(block).for_each(|y| machine.vectorize(Block { norm, y }));
}

/// The rows of one task, normalised where they are.
struct Block<'a> {
    norm: &'a NormWeights,
    y: &'a mut [f16], // [rows, C]
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let NormWeights { weight, bias } = self.norm;
        let width = weight.len();
        assert!(bias.len() == width && width.is_multiple_of(S::LANES) && self.y.len().is_multiple_of(width));
        for row in self.y.chunks_exact_mut(width) {
            let zero = s.splat(0.0);
            let mut sums = [zero; CHAINS];
            for group in row.chunks(CHAINS * S::LANES) {
                for (sum, x) in sums.iter_mut().zip(group.chunks_exact(S::LANES)) {
                    *sum = s.add(*sum, s.load_f16_slice(x));
                }
            }
            let mean = s.splat(total(s, sums) / width as f32);
            let mut squares = [zero; CHAINS];
            for group in row.chunks(CHAINS * S::LANES) {
                for (square, x) in squares.iter_mut().zip(group.chunks_exact(S::LANES)) {
                    let d = s.sub(s.load_f16_slice(x), mean);
                    *square = s.mul_add(d, d, *square);
                }
            }
            let variance = total(s, squares) / width as f32;
            let scale = s.splat(1.0 / (variance + LAYER_NORM_EPS).sqrt());
            let affine = weight.chunks_exact(S::LANES).zip(bias.chunks_exact(S::LANES));
            for (x, (weight, bias)) in row.chunks_exact_mut(S::LANES).zip(affine) {
                let v = s.mul(s.sub(s.load_f16_slice(x), mean), scale);
                s.store_f16_slice(x, s.mul_add(v, s.load_f16_slice(weight), s.load_f16_slice(bias)));
            }
        }
    }
}

/// Adds up what the chains hold.
#[inline(always)]
fn total<S: Simd>(s: S, chains: [S::V; CHAINS]) -> f32 {
    s.reduce_add(s.add(s.add(chains[0], chains[1]), s.add(chains[2], chains[3])))
}

#[cfg(test)]
mod tests;
