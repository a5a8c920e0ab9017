//! The token embedding table, left in its file.

#[cfg(feature = "cuda")]
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;

use super::convert::RangePolicy;
#[cfg(feature = "cuda")]
use super::dtype::DType;
#[cfg(feature = "cuda")]
use super::mapped::MappedFile;
#[cfg(feature = "cuda")]
use super::tensor::Layout;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// The token embedding table `[rows, H]`, mapped: rows are converted to fp16 when they are asked for.
///
/// Keeps the file mapped after the [`Checkpoint`](super::Checkpoint) is gone. Clones share the mapping and
/// the count of saturated values.
#[derive(Clone, Debug)]
pub struct EmbeddingTable {
    tensor: Arc<Tensor>, // [rows, H]
    policy: RangePolicy,
    saturated: Arc<AtomicU64>,
}

impl EmbeddingTable {
    /// `tensor` has two dimensions: `names::read_sizes` has seen to it.
    pub(crate) fn new(tensor: Tensor) -> Self {
        debug_assert_eq!(tensor.shape().len(), 2);
        Self { tensor: Arc::new(tensor), policy: RangePolicy::Refuse, saturated: Arc::default() }
    }

    /// Maps a file that holds nothing but the table: `rows` of `hidden` elements.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be mapped or is too small.
    #[cfg(feature = "cuda")]
    pub(crate) fn map(path: &Path, dtype: DType, rows: usize, hidden: usize) -> Result<Self> {
        let file = Arc::new(MappedFile::open(path)?);
        let storage = 0..file.bytes().len();
        let layout = Layout { shape: vec![rows, hidden], strides: None, offset: 0 };
        let tensor = Tensor::new("embedding", file, dtype, layout, storage)
            .map_err(|problem| Error::checkpoint(path, problem, "Give a larger file"))?;
        Ok(Self::new(tensor))
    }

    /// Returns the same table, which treats values that fp16 cannot hold as `policy` says.
    pub fn with_policy(mut self, policy: RangePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Returns the number of rows: ids below it have one.
    pub fn rows(&self) -> usize {
        self.tensor.shape()[0]
    }

    /// Returns **H**, the elements of a row.
    pub fn hidden(&self) -> usize {
        self.tensor.shape()[1]
    }

    /// Returns how many values were cut to ±65504 so far, in all rows gathered from this table and its clones.
    pub fn saturated(&self) -> u64 {
        self.saturated.load(Ordering::Relaxed)
    }

    /// Returns what happens to values that fp16 cannot hold.
    #[cfg(feature = "cuda")]
    pub(crate) fn policy(&self) -> RangePolicy {
        self.policy
    }

    /// Returns the dtype that the rows are stored in.
    #[cfg(feature = "cuda")]
    pub(crate) fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// Writes rows from `first` on as they are stored, as many as `out` has room for.
    ///
    /// # Panics
    /// If there are not as many.
    #[cfg(feature = "cuda")]
    pub(crate) fn copy_stored(&self, first: usize, out: &mut [u8]) {
        self.tensor.copy_stored(first * self.hidden(), out);
    }

    /// Counts values that a device cut to ±65504.
    #[cfg(feature = "cuda")]
    pub(crate) fn count_saturated(&self, values: u64) {
        self.saturated.fetch_add(values, Ordering::Relaxed);
    }

    /// Writes row `id`, rounded to nearest even, to `out`; shape `[H]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such row, or if `out` is not `H` elements long;
    /// [`Error::ValueOutOfRange`] if the row holds a value that the policy refuses. `out` is then undefined.
    pub fn gather_row(&self, id: u32, out: &mut [f16]) -> Result<()> {
        let (rows, hidden) = (self.rows(), self.hidden());
        if id as usize >= rows {
            return Err(Error::argument(
                format!("token id {id} is outside the embedding table, which has {rows} rows"),
                "Use the tokenizer that belongs to this checkpoint",
            ));
        }
        if out.len() != hidden {
            return Err(Error::argument(
                format!(
                    "a row of the embedding table has {hidden} elements, and {} are to be written",
                    out.len()
                ),
                "Give rows of the checkpoint's hidden size",
            ));
        }
        let stats = self.tensor.read(id as usize * hidden, out, self.policy)?;
        if stats.out_of_range > 0 {
            self.saturated.fetch_add(stats.out_of_range, Ordering::Relaxed);
        }
        Ok(())
    }
}
