//! Layer norm over channels: `y = (x − mean) / √(variance + ε) · weight + bias`, row by row.
//!
//! # Numerics
//! Two passes in f32: the mean first, then the mean square of what is left, so that a mean many deviations
//! from 0 costs nothing (`E[x²] − mean²` would cancel). Each pass adds into [`CHAINS`] vectors in a fixed
//! order. The result is rounded to fp16 once.

use half::f16;
use rayon::prelude::*;

use super::epilogue::Output;
use super::operand::Sink;
use super::simd::{Kernel, Machine, Simd};
use crate::checkpoint::weights::NormWeights;
use crate::config::LAYER_NORM_EPS;

/// Independent sums per row: enough to hide the latency of an addition.
const CHAINS: usize = 4;
/// Rows that one task takes: some microseconds of work.
const ROWS: usize = 16;

/// Normalises the rows of `x` into `y`; both `[rows, C]`, C = the length of `norm.weight`, a multiple of 32.
pub(crate) fn layer_norm(machine: Machine, norm: &NormWeights, x: &[f16], y: &Sink<'_>) {
    let block = ROWS * norm.weight.len();
    x.par_chunks(block).enumerate().for_each(|(i, x)| {
        machine.vectorize(Block { norm, x: x.as_ptr(), len: x.len(), y, first: i * ROWS });
    });
}

/// Normalises the rows of `y`, `[rows, C]`, where they are.
pub(crate) fn layer_norm_in_place(machine: Machine, norm: &NormWeights, y: &mut [f16]) {
    let width = norm.weight.len();
    y.par_chunks_mut(ROWS * width).for_each(|y| {
        let (x, len) = (y.as_ptr(), y.len());
        machine.vectorize(Block { norm, x, len, y: &Sink::Rows(Output::new(y, width)), first: 0 });
    });
}

/// The rows of one task; `x` may be where `y` is.
struct Block<'a, 'b> {
    norm: &'a NormWeights,
    x: *const f16, // [rows, C]
    len: usize,    // rows · C
    y: &'a Sink<'b>,
    first: usize, // row of `y` that the first of `x` becomes
}

impl Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let NormWeights { weight, bias } = self.norm;
        let width = weight.len();
        assert!(bias.len() == width && width.is_multiple_of(S::NR) && self.len.is_multiple_of(width));
        for row in 0..self.len / width {
            let x = self.x.wrapping_add(row * width);
            let zero = s.splat(0.0);
            let mut sums = [zero; CHAINS];
            for at in (0..width).step_by(S::LANES) {
                let sum = &mut sums[at / S::LANES % CHAINS];
                // SAFETY: LANES elements of the row.
                *sum = s.add(*sum, unsafe { s.load_f16(x.add(at)) });
            }
            let mean = s.splat(total(s, sums) / width as f32);
            let mut squares = [zero; CHAINS];
            for at in (0..width).step_by(S::LANES) {
                let square = &mut squares[at / S::LANES % CHAINS];
                // SAFETY: LANES elements of the row.
                let d = s.sub(unsafe { s.load_f16(x.add(at)) }, mean);
                *square = s.mul_add(d, d, *square);
            }
            let variance = total(s, squares) / width as f32;
            let scale = s.splat(1.0 / (variance + LAYER_NORM_EPS).sqrt());
            for at in (0..width).step_by(S::NR) {
                let mut v = [zero; 2];
                for (j, v) in v.iter_mut().enumerate() {
                    let at = at + j * S::LANES;
                    // SAFETY: LANES elements of the row, of the weights and of the biases.
                    unsafe {
                        let (weight, bias) = (weight.as_ptr().add(at), bias.as_ptr().add(at));
                        let normal = s.mul(s.sub(s.load_f16(x.add(at)), mean), scale);
                        *v = s.mul_add(normal, s.load_f16(weight), s.load_f16(bias));
                    }
                }
                // SAFETY: rows of different tasks are different ones; where `x` is `y`, these elements have been read.
                unsafe { self.y.put(s, self.first + row, at, S::NR, v) };
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
