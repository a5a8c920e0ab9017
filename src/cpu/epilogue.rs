//! Epilogues: what happens to an accumulator before it is stored, and where it is stored.
//!
//! Each gets a piece of one row at a time, two vectors of f32, works on it in registers and writes fp16. Bias,
//! activation, residual and scatter cost no pass over memory of their own.

use std::marker::PhantomData;

use half::f16;

use super::activation::{gelu, quick_gelu};
use super::operand::Sink;
use super::simd::Simd;
use crate::sequence::RowsMut;

/// Finishes and stores accumulators of a linear layer's output Y, `[M, N]`.
pub(crate) trait Epilogue: Sync {
    /// Takes elements `column .. column + count` of row `row`: the first `count` of `acc`, `1 ..= NR`; the others are zeros.
    ///
    /// # Safety
    /// Nobody else has to do with these elements of the output meanwhile.
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, acc: [S::V; 2]);
}

/// An output whose tasks write disjoint elements at the same time, `[rows, width]`.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    first: *mut f16,
    rows: usize,
    width: usize,
    _lent: PhantomData<&'a mut [f16]>,
}

// SAFETY: an `Output` is an exclusive borrow of f16; through `&Output` only the unsafe `piece` reaches them.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// Borrows `data` as rows of `width` elements.
    pub(crate) fn new(data: &'a mut [f16], width: usize) -> Self {
        Self { first: data.as_mut_ptr(), rows: data.len() / width, width, _lent: PhantomData }
    }

    /// Returns elements `column .. column + count` of row `row`.
    ///
    /// # Safety
    /// Nobody else has to do with these elements while the slice lives.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "that the borrows are disjoint is the caller's promise")]
    pub(crate) unsafe fn piece(&self, row: usize, column: usize, count: usize) -> &mut [f16] {
        assert!(row < self.rows && column + count <= self.width);
        // SAFETY: within the borrowed block, by the assertion; exclusive, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.width + column), count) }
    }
}

/// Splits `count` elements over two vectors: for each, its index and the range of the elements.
#[inline(always)]
pub(crate) fn halves<S: Simd>(count: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    [0, 1].into_iter().map(move |j| (j, (j * S::LANES).min(count)..((j + 1) * S::LANES).min(count)))
}

/// What a layer does after its bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// The tower's.
    QuickGelu,
    /// The projector's.
    Gelu,
}

/// `y = activation(acc + bias)`
#[derive(Debug)]
pub(crate) struct Store<'a> {
    pub(crate) bias: &'a [f16], // [N]
    pub(crate) activation: Activation,
    pub(crate) y: Sink<'a>, // [M, N]
}

impl Epilogue for Store<'_> {
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, acc: [S::V; 2]) {
        let bias = &self.bias[column..column + count];
        let mut v = acc;
        for (j, range) in halves::<S>(count) {
            v[j] = s.add(acc[j], s.load_f16_slice(&bias[range]));
            v[j] = match self.activation {
                Activation::None => v[j],
                Activation::QuickGelu => quick_gelu(s, v[j]),
                Activation::Gelu => gelu(s, v[j]),
            };
        }
        // SAFETY: the caller's promise. Beyond `count`, accumulators and bias are zeros, and so is what is made of them.
        unsafe { self.y.put(s, row, column, count, v) };
    }
}

/// `y = y + (acc + bias)`: the residual is where the result goes.
#[derive(Debug)]
pub(crate) struct AddTo<'a> {
    pub(crate) bias: &'a [f16], // [N]
    pub(crate) y: Output<'a>,   // [M, N]
}

impl Epilogue for AddTo<'_> {
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, acc: [S::V; 2]) {
        // SAFETY: the caller's promise.
        let y = unsafe { self.y.piece(row, column, count) };
        let bias = &self.bias[column..column + count];
        for (j, range) in halves::<S>(count) {
            let v = s.add(acc[j], s.load_f16_slice(&bias[range.clone()]));
            let v = s.add(s.load_f16_slice(&y[range.clone()]), v);
            s.store_f16_slice(&mut y[range], v);
        }
    }
}

/// `y[b · T + 1 + p] = acc + position[1 + p]` for row b · P + p: the patches of each image, below the row of
/// its class token.
#[derive(Debug)]
pub(crate) struct Embed<'a> {
    pub(crate) positions: &'a [f16], // [T, C]
    pub(crate) tokens: usize,        // T
    pub(crate) y: Output<'a>,        // [B · T, C]
}

impl Epilogue for Embed<'_> {
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, acc: [S::V; 2]) {
        let patches = self.tokens - 1;
        let token = 1 + row % patches;
        // SAFETY: the caller's promise; distinct rows of Y are distinct tokens.
        let y = unsafe { self.y.piece(row / patches * self.tokens + token, column, count) };
        let position = &self.positions[token * self.y.width + column..][..count];
        for (j, range) in halves::<S>(count) {
            let v = s.add(acc[j], s.load_f16_slice(&position[range.clone()]));
            s.store_f16_slice(&mut y[range], v);
        }
    }
}

/// `y = acc + bias`, row b · P + p to row p of every block of rows that image b fills.
#[derive(Debug)]
pub(crate) struct Scatter<'a, 'b> {
    pub(crate) bias: &'a [f16],                 // [H]
    pub(crate) patches: usize,                  // P
    pub(crate) targets: Vec<&'a [RowsMut<'b>]>, // [B][blocks], each [≤ P, H]
}

impl Epilogue for Scatter<'_, '_> {
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, acc: [S::V; 2]) {
        let bias = &self.bias[column..column + count];
        let patch = row % self.patches;
        for block in self.targets[row / self.patches] {
            if patch >= block.len() {
                continue; // a sequence cut inside the image
            }
            assert!(column + count <= block.hidden());
            // SAFETY: `row_ptr` vouches for `hidden` elements, borrowed for as long as `block`; that nobody
            // else has to do with these is the caller's promise, since blocks are disjoint borrows.
            let y = unsafe { std::slice::from_raw_parts_mut(block.row_ptr(patch).add(column), count) };
            for (j, range) in halves::<S>(count) {
                let v = s.add(acc[j], s.load_f16_slice(&bias[range.clone()]));
                s.store_f16_slice(&mut y[range], v);
            }
        }
    }
}
