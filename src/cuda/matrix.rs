//! A matrix of fp16 in device memory.

use half::f16;

use super::driver::Span;
use super::launch::contract;
use crate::error::{Error, Result};

/// Elements of 16 bytes: what the kernels load at once, and the unit of pitches.
pub(crate) const VECTOR: usize = 8;

/// `[rows, columns]`, row-major, rows `pitch` elements apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    /// From its first element to its last, or further.
    pub(crate) span: Span<f16>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) pitch: usize, // elements
}

impl Matrix {
    /// Lays a matrix over the beginning of `span`.
    ///
    /// # Errors
    /// [`Error::Internal`] if it does not fit.
    pub(crate) fn new(span: Span<f16>, rows: usize, columns: usize, pitch: usize) -> Result<Self> {
        let matrix = Self { span, rows, columns, pitch };
        matrix.check("nothing yet", "a matrix").map(|()| matrix)
    }

    /// The first `rows` rows.
    ///
    /// # Errors
    /// [`Error::Internal`] if there are fewer.
    pub(crate) fn first(&self, rows: usize) -> Result<Self> {
        if rows > self.rows {
            return Err(Error::Internal(format!("{rows} rows of {self:?}")));
        }
        Ok(Self { rows, ..*self })
    }

    /// Rows from `at` on.
    ///
    /// # Errors
    /// [`Error::Internal`] if there are fewer.
    pub(crate) fn rows(&self, at: usize, rows: usize) -> Result<Self> {
        if at + rows > self.rows {
            return Err(Error::Internal(format!("rows {at}.. of {rows} of {self:?}")));
        }
        let from = (at * self.pitch).min(self.span.len());
        Ok(Self { span: self.span.slice(from..self.span.len())?, rows, ..*self })
    }

    /// Elements from the first to past the last.
    fn extent(&self) -> usize {
        if self.rows == 0 { 0 } else { (self.rows - 1) * self.pitch + self.columns }
    }

    /// Checks that `kernel` may go by the shape of its argument `what`.
    pub(super) fn check(&self, kernel: &str, what: &str) -> Result<()> {
        contract!(
            kernel,
            self.columns <= self.pitch && self.extent() <= self.span.len(),
            "{what} does not fit: {self:?}"
        );
        contract!(kernel, self.span.ptr().is_aligned(2), "{what} is at an odd address: {self:?}");
        Ok(())
    }

    /// Checks that `kernel` may load 16 bytes at any multiple of 8 elements in a row.
    pub(super) fn check_vectors(&self, kernel: &str, what: &str) -> Result<()> {
        contract!(
            kernel,
            self.pitch.is_multiple_of(VECTOR) && self.span.ptr().is_aligned(16),
            "rows of {what} are not 16 bytes aligned: {self:?}"
        );
        Ok(())
    }
}
