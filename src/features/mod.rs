//! Features of one image as a value: kept, placed again and again, never encoded twice; in a file, where another
//! process finds them, and in a cache, by the pixels they were made of.
//!
//! | | what it is |
//! |---|---|
//! | [`Features`] | one image's rows `[P, H]`, in memory |
//! | [`FeatureSet`] | those of several images, and what is known of these; saved as one file |
//! | [`FeatureFile`] | such a file, opened: checked against a model before its rows are read |
//! | [`FeatureCache`] | a directory of features by what the tower saw; bounded, shared by processes |
//! | [`Preprocessing`] | the rules by which files became pixels |
//!
//! # Numerics
//! Features of one image made on different devices (CPU instruction sets, GPU generations) differ by the rounding of
//! fp16. A features file may be used on any device: its rows are placed bit by bit. A cache tells devices apart: the
//! same command on the same machine makes the same bytes, whether or not the cache had the image.

use std::sync::Arc;

use half::f16;

use crate::output::Rows;

mod cache;
mod file;
mod format;
pub(crate) mod fuzzing;
mod preprocessing;

pub use cache::FeatureCache;
pub(crate) use cache::Key;
pub use file::{FeatureFile, FeatureSet, ImageNote};
pub use preprocessing::Preprocessing;

/// The SHA-256 of pixels, in hexadecimal.
pub(crate) fn pixel_digest(pixels: &[u8]) -> String {
    format::sha256(pixels)
}

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

impl<'a> From<&'a Features> for Rows<'a> {
    fn from(features: &'a Features) -> Self {
        Rows::checked(&features.rows, features.hidden)
    }
}
