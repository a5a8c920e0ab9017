//! The sequence buffer: one allocation `[L, H]` of fp16, the LLM's `inputs_embeds`.
//!
//! It knows rows and who may write them, nothing else: no images, no projector. [`SequenceBuffer`]
//! lends blocks of rows ([`RowsMut`]); whoever is lent a block writes into it in place.

use std::marker::PhantomData;

use half::f16;

/// A lent block of consecutive rows of some `[L, H]` fp16 buffer, writable from several threads at once.
///
/// Shape `[rows, H]`, row `i` starting `i * row_stride` elements after the first.
#[derive(Debug)]
pub struct RowsMut<'a> {
    first: *mut f16,
    rows: usize,
    hidden: usize,
    row_stride: usize,
    _lent: PhantomData<&'a mut [f16]>,
}

// SAFETY: a `RowsMut` is an exclusive borrow of its rows, as `&'a mut [f16]` is, and f16 is Send + Sync.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: through `&RowsMut` only the unsafe `row_ptr` reaches the rows; its contract forbids races.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// Borrows `data` as rows of `hidden` elements, `row_stride` elements apart; as many rows as fit.
    ///
    /// # Panics
    /// If `hidden` is 0 or exceeds `row_stride`.
    pub fn new(data: &'a mut [f16], hidden: usize, row_stride: usize) -> Self {
        assert!(hidden > 0 && hidden <= row_stride, "rows of {hidden} elements, {row_stride} apart");
        let rows = if data.len() < hidden { 0 } else { (data.len() - hidden) / row_stride + 1 };
        Self { first: data.as_mut_ptr(), rows, hidden, row_stride, _lent: PhantomData }
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Returns **H**, the elements of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Returns row `i`, shape `[H]`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [f16] {
        let first = self.row_ptr(i);
        // SAFETY: `row_ptr` checked `i`; the row lies in the borrowed block, and `&mut self` makes it ours.
        unsafe { std::slice::from_raw_parts_mut(first, self.hidden) }
    }

    /// Returns a pointer to the first of row `i`'s `H` elements, for kernels whose threads write disjoint
    /// parts of a row.
    ///
    /// Dereferencing it is the caller's promise that no two threads touch the same element at once and
    /// that the borrow behind this block is alive.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row_ptr(&self, i: usize) -> *mut f16 {
        assert!(i < self.rows, "row {i} of a block of {}", self.rows);
        // SAFETY: `new` and `split` keep `rows` rows of `row_stride` within one allocation.
        unsafe { self.first.add(i * self.row_stride) }
    }
}
