//! A tensor in a mapped file: where its elements lie, and reading them as fp16.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use super::convert::{BLOCK, RangePolicy, ValueStats, convert_block, survey_block};
use super::dtype::DType;
use super::mapped::MappedFile;
use crate::error::{Error, Result};

/// A tensor of bf16, f16 or f32 whose every element was checked to lie in its file.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    name: String,
    file: Arc<MappedFile>,
    dtype: DType,
    shape: Vec<usize>,
    /// Distance between neighbours along each dimension, in elements.
    strides: Vec<usize>,
    /// Elements in all: the product of `shape`.
    elements: usize,
    /// Whether they lie densely, in row-major order.
    dense: bool,
    /// Where the first of them lies in the file, in bytes.
    start: usize,
    /// The storage that they lie in, in bytes of the file.
    storage: Range<usize>,
}

/// Where a tensor's elements lie in its storage.
pub(crate) struct Layout {
    pub shape: Vec<usize>,
    /// In elements; `None` is dense row-major.
    pub strides: Option<Vec<usize>>,
    /// Of the first element, in elements.
    pub offset: usize,
}

/// Elements of a dense tensor of this shape, or `None` on overflow.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// Strides of a dense row-major tensor, in elements.
fn dense_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

impl Tensor {
    /// Checks that every element lies in `storage`, a range of bytes of the file.
    ///
    /// # Errors
    /// What does not fit, as a sentence without its subject.
    pub fn new(
        name: &str,
        file: Arc<MappedFile>,
        dtype: DType,
        layout: Layout,
        storage: Range<usize>,
    ) -> std::result::Result<Self, String> {
        let Layout { shape, strides, offset } = layout;
        let elements = element_count(&shape)
            .ok_or_else(|| format!("its shape {shape:?} overflows the address space"))?;
        let strides = strides.unwrap_or_else(|| dense_strides(&shape));
        if strides.len() != shape.len() {
            return Err(format!("it has shape {shape:?} but strides {strides:?}"));
        }

        // One past the last element in the storage: every index is the sum of index × stride, so the
        // largest is reached at the far corner.
        let end = if elements == 0 {
            Some(offset)
        } else {
            let far = shape
                .iter()
                .zip(&strides)
                .try_fold(offset, |at, (&size, &stride)| at.checked_add((size - 1).checked_mul(stride)?));
            far.and_then(|far| far.checked_add(1))
        };
        let available = storage.end.saturating_sub(storage.start);
        let fits = end.and_then(|end| end.checked_mul(dtype.size())).is_some_and(|end| end <= available);
        if !fits || storage.end > file.bytes().len() {
            return Err(format!(
                "its shape {shape:?} with strides {strides:?} from element {offset} does not fit into its \
                 storage of {} {} values",
                available / dtype.size(),
                dtype.name(),
            ));
        }

        // A dimension of one element may have any stride: nobody steps along it.
        let dense = dense_strides(&shape)
            .iter()
            .zip(&strides)
            .zip(&shape)
            .all(|((dense, stride), &size)| size <= 1 || dense == stride);
        let start = storage.start + offset * dtype.size();
        Ok(Self { name: name.to_owned(), file, dtype, shape, strides, elements, dense, start, storage })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Reads elements `first..first + out.len()`, in row-major order, as fp16.
    ///
    /// # Errors
    /// [`Error::ValueOutOfRange`] with the first value that `policy` refuses; [`Error::Checkpoint`] if the file got
    /// shorter since it was opened. `out` is then undefined.
    ///
    /// # Panics
    /// If there are no such elements.
    pub fn read(&self, first: usize, out: &mut [f16], policy: RangePolicy) -> Result<ValueStats> {
        let mut total = ValueStats::default();
        let mut at = first;
        let mut scratch = [0; BLOCK * 4];
        for block in out.chunks_mut(BLOCK) {
            let stored = &mut scratch[..block.len() * self.dtype.size()];
            self.read_stored(at, stored)?;
            let stats = convert_block(self.dtype, stored, block, policy);
            total.merge(&stats.map_err(|offender| self.out_of_range(at + offender.index, offender.value))?);
            at += block.len();
        }
        Ok(total)
    }

    /// Counts what fp16 would do to elements `range`, and refuses none.
    ///
    /// # Panics
    /// If there are no such elements.
    pub fn survey(&self, range: Range<usize>) -> ValueStats {
        let mut total = ValueStats::default();
        for at in range.clone().step_by(BLOCK) {
            let n = BLOCK.min(range.end - at);
            total.merge(&self.with_block(at, n, |bytes| survey_block(self.dtype, bytes)));
        }
        total
    }

    /// The bytes of elements `range` as the file stores them, in row-major order. At most [`BLOCK`].
    ///
    /// # Panics
    /// If there are no such elements.
    pub fn stored_bytes(&self, range: Range<usize>) -> Vec<u8> {
        self.with_block(range.start, range.len(), <[u8]>::to_vec)
    }

    /// Writes elements from `first` on as the file stores them, as many as `out` has room for.
    ///
    /// # Panics
    /// If there are not as many.
    #[cfg(feature = "cuda")]
    pub fn copy_stored(&self, first: usize, out: &mut [u8]) {
        let size = self.dtype.size();
        for (i, out) in out.chunks_mut(BLOCK * size).enumerate() {
            self.with_block(first + i * BLOCK, out.len() / size, |stored| out.copy_from_slice(stored));
        }
    }

    /// Gives the pages under elements `range` back to the page cache (see [`MappedFile::release`]).
    pub fn release(&self, range: Range<usize>) {
        if self.dense {
            let size = self.dtype.size();
            self.file.release(self.start + range.start * size..self.start + range.end * size);
        } else {
            self.file.release(self.storage.clone());
        }
    }

    /// Reads elements from `first` on as the file stores them, in row-major order, as many as `out` has room for.
    fn read_stored(&self, first: usize, out: &mut [u8]) -> Result<()> {
        let size = self.dtype.size();
        let n = out.len() / size;
        assert!(
            n <= self.elements.saturating_sub(first),
            "{n} elements from {first} of {}, `{}`",
            self.elements,
            self.name
        );
        if self.dense {
            return self.file.read_at(self.start + first * size, out);
        }
        // Element by element would be too slow. That its last byte is there now is not that it will be, but nearly.
        if let Some(last) = self.storage.end.checked_sub(1) {
            self.file.read_at(last, &mut [0])?;
        }
        self.gather(first, out);
        Ok(())
    }

    /// Calls `f` with the bytes of `n` elements from `first`, at most [`BLOCK`]: in place where they are dense.
    fn with_block<R>(&self, first: usize, n: usize, f: impl FnOnce(&[u8]) -> R) -> R {
        let end = first.checked_add(n).filter(|&end| end <= self.elements && n <= BLOCK);
        assert!(end.is_some(), "{n} elements from {first} of {}, `{}`", self.elements, self.name);
        let size = self.dtype.size();
        if self.dense || n == 0 {
            let start = self.start + first * size;
            return f(&self.file.bytes()[start..start + n * size]);
        }
        let mut scratch = [0; BLOCK * 4];
        let scratch = &mut scratch[..n * size];
        self.gather(first, scratch);
        f(scratch)
    }

    /// Copies elements from `first` on, in row-major order, into `out`: as many as it holds.
    fn gather(&self, first: usize, out: &mut [u8]) {
        let (bytes, size) = (self.file.bytes(), self.dtype.size());
        // The index of the next element, one number per dimension, and its place in the storage.
        let mut index = vec![0; self.shape.len()];
        let mut rest = first;
        for (i, &extent) in index.iter_mut().zip(&self.shape).rev() {
            *i = rest % extent;
            rest /= extent;
        }
        let mut at: usize = index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();

        for out in out.chunks_exact_mut(size) {
            let start = self.start + at * size;
            out.copy_from_slice(&bytes[start..start + size]);
            // To the next element: along the last dimension, carrying over as an odometer does.
            for d in (0..index.len()).rev() {
                index[d] += 1;
                at += self.strides[d];
                if index[d] < self.shape[d] {
                    break;
                }
                at -= self.strides[d] * self.shape[d];
                index[d] = 0;
            }
        }
    }

    fn out_of_range(&self, index: usize, value: f32) -> Error {
        let remedy = if value.is_nan() {
            "The checkpoint is damaged; download it again"
        } else {
            "Check that the checkpoint is intact; `--saturate` (`RangePolicy::Saturate`) goes on with such \
             values cut to ±65504"
        };
        Error::ValueOutOfRange { tensor: self.name.clone(), index, value, remedy: remedy.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file of the f32 values 0, 1, 2 …, after `skip` bytes of something else.
    fn counting_file(n: usize, skip: usize) -> (tempfile::NamedTempFile, Arc<MappedFile>) {
        let mut bytes = vec![0xee; skip];
        bytes.extend((0..n).flat_map(|i| (i as f32).to_le_bytes()));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mapped = Arc::new(MappedFile::open(file.path()).unwrap());
        (file, mapped)
    }

    fn tensor(
        file: &Arc<MappedFile>,
        shape: &[usize],
        strides: Option<&[usize]>,
        offset: usize,
        storage: Range<usize>,
    ) -> std::result::Result<Tensor, String> {
        let layout = Layout { shape: shape.to_vec(), strides: strides.map(<[usize]>::to_vec), offset };
        Tensor::new("t", file.clone(), DType::F32, layout, storage)
    }

    fn values(tensor: &Tensor, first: usize, n: usize) -> Vec<f32> {
        let mut out = vec![f16::NAN; n];
        tensor.read(first, &mut out, RangePolicy::Refuse).unwrap();
        out.iter().map(|value| value.to_f32()).collect()
    }

    #[test]
    fn a_transposed_view_is_read_in_its_own_order() {
        let (_keep, file) = counting_file(6, 3); // [2, 3] at an odd address
        let dense = tensor(&file, &[2, 3], None, 0, 3..27).unwrap();
        assert_eq!(values(&dense, 0, 6), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let transposed = tensor(&file, &[3, 2], Some(&[1, 3]), 0, 3..27).unwrap();
        assert_eq!(values(&transposed, 0, 6), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(values(&transposed, 3, 2), [4.0, 2.0]);
    }

    #[test]
    fn a_view_may_repeat_elements_or_have_none() {
        let (_keep, file) = counting_file(4, 0);
        let expanded = tensor(&file, &[3, 2], Some(&[0, 1]), 2, 0..16).unwrap();
        assert_eq!(values(&expanded, 0, 6), [2.0, 3.0, 2.0, 3.0, 2.0, 3.0]);
        let empty = tensor(&file, &[0, 7], None, 4, 0..16).unwrap();
        assert_eq!((empty.elements(), values(&empty, 0, 0)), (0, vec![]));
        let scalar = tensor(&file, &[], None, 3, 0..16).unwrap();
        assert_eq!(values(&scalar, 0, 1), [3.0]);
    }

    #[test]
    fn what_does_not_fit_into_the_storage_is_refused() {
        let (_keep, file) = counting_file(4, 0);
        let refused = [
            tensor(&file, &[5], None, 0, 0..16),
            tensor(&file, &[4], None, 1, 0..16),
            tensor(&file, &[2], Some(&[4]), 0, 0..16),
            tensor(&file, &[4], None, 0, 0..20), // beyond the file
            tensor(&file, &[0], None, 5, 0..16),
            tensor(&file, &[usize::MAX, 3], None, 0, 0..16),
            tensor(&file, &[2], Some(&[usize::MAX]), 2, 0..16),
            tensor(&file, &[1], None, usize::MAX, 0..16),
            tensor(&file, &[2], Some(&[1, 1]), 0, 0..16),
        ];
        for (i, refused) in refused.iter().enumerate() {
            assert!(refused.is_err(), "case {i}");
        }
    }

    proptest! {
        /// Every view equals the definition: element (i, j, k) is base + i·s0 + j·s1 + k·s2.
        #[test]
        fn any_view_reads_what_its_strides_say(
            shape in prop::array::uniform3(1usize..6),
            strides in prop::array::uniform3(0usize..9),
            offset in 0usize..8,
            first in 0usize..20,
        ) {
            let (_keep, file) = counting_file(160, 5);
            let view = tensor(&file, &shape, Some(&strides), offset, 5..645).unwrap();
            let mut expected = Vec::new();
            for i in 0..shape[0] {
                for j in 0..shape[1] {
                    for k in 0..shape[2] {
                        expected.push((offset + i * strides[0] + j * strides[1] + k * strides[2]) as f32);
                    }
                }
            }
            let first = first.min(expected.len());
            prop_assert_eq!(values(&view, first, expected.len() - first), &expected[first..]);
        }
    }
}
