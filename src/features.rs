//! Features of one image as a value: kept, placed again and again, never encoded twice.

use std::sync::Arc;

use half::f16;

/// One image's features, shape `[P, H]`, row-major, tied to the checkpoint that made them.
///
/// Cheap to clone: clones share the rows.
#[derive(Clone, Debug)]
pub struct Features {
    rows: Arc<[f16]>, // [P, H]
    hidden: usize,    // H
    fingerprint: Arc<str>,
}

impl Features {
    /// Joins rows and where they come from.
    pub(crate) fn new(rows: Vec<f16>, hidden: usize, fingerprint: Arc<str>) -> Self {
        Self { rows: rows.into(), hidden, fingerprint }
    }

    /// Returns **P**, the number of rows.
    pub fn len(&self) -> usize {
        self.rows.len() / self.hidden
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns **H**, the elements of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Returns all rows, shape `[P, H]`, row-major.
    pub fn as_slice(&self) -> &[f16] {
        &self.rows
    }

    /// Returns row `i`, shape `[H]`.
    ///
    /// # Panics
    /// If `i` is not below [`Features::len`].
    pub fn row(&self, i: usize) -> &[f16] {
        &self.rows[i * self.hidden..][..self.hidden]
    }

    /// Returns the fingerprint of the checkpoint that made these features.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
