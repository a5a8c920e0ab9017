//! A sequence as one `.safetensors` file, and the header that any such file begins with.
//!
//! ```text
//!   8 bytes   length of the header, little-endian
//!   header    JSON: {"__metadata__": {…}, "name": {"dtype", "shape", "data_offsets"}, …}, padded with spaces
//!   data      input_ids I64 [1, L] │ slots I64 [N, 2] │ inputs_embeds F16 [1, L, H] │ im_mask BOOL [1, L]
//! ```
//!
//! The header is written here rather than by the `safetensors` crate, for two reasons: the data that follow
//! are streamed from where they lie, never gathered in memory a second time; and its keys come in a fixed
//! order, so that the same sequence makes the same bytes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use half::f16;
use serde_json::{Map, Value, json};

use super::AtomicFile;
use crate::error::{Error, Result};
use crate::prompt::SequencePlan;

/// A tensor's line in a header.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Its name.
    pub name: String,
    /// Its dtype as the format spells it: `F16`, `I64`, `BOOL`, …
    pub dtype: &'static str,
    /// Its shape; row-major.
    pub shape: Vec<usize>,
    /// Bytes of one element.
    pub width: usize,
}

impl Entry {
    /// Returns the bytes of the tensor.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.width
    }
}

/// Returns everything that precedes the data of `entries`, which must follow in this order without a gap.
///
/// Its length is a multiple of 8, so that data of 8-byte elements listed first are aligned.
pub(crate) fn header(entries: &[Entry], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut lines = Map::new();
    if !metadata.is_empty() {
        lines.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut offset = 0;
    for entry in entries {
        let end = offset + entry.bytes();
        lines.insert(
            entry.name.clone(),
            json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut text = Value::Object(lines).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// What a sequence's file holds.
#[derive(Clone, Debug)]
pub struct SequenceRecord<'a> {
    /// The plan that was encoded; it gives `input_ids`, `slots` and `im_mask`.
    pub plan: &'a SequencePlan,
    /// The encoded sequence, row-major, shape `[L, H]`.
    pub inputs_embeds: &'a [f16],
    /// **H**, in elements.
    pub hidden: usize,
    /// Anything worth keeping with it, as text: versions, options, warnings, the checkpoint's fingerprint.
    pub metadata: BTreeMap<String, String>,
}

impl SequenceRecord<'_> {
    /// Returns (begin, end) of every slot, in positions; shape `[N, 2]`.
    pub(crate) fn slots(&self) -> Vec<[i64; 2]> {
        self.plan.slots.iter().map(|s| [s.offset as i64, (s.offset + s.len) as i64]).collect()
    }

    /// Returns the tensors, widest elements first, so that one after the other each is aligned to its own size.
    /// `slots` are [`SequenceRecord::slots`].
    ///
    /// # Errors
    /// [`Error::Internal`] if rows and plan do not have the same length.
    pub(crate) fn parts<'p>(&'p self, slots: &'p [[i64; 2]]) -> Result<[(Entry, &'p [u8]); 4]> {
        let plan = self.plan;
        let length = plan.input_ids.len();
        if self.inputs_embeds.len() != length * self.hidden || plan.im_mask.len() != length {
            return Err(Error::Internal(format!(
                "a sequence of {} elements and a mask of {} for a plan of {length} positions of {}",
                self.inputs_embeds.len(),
                plan.im_mask.len(),
                self.hidden
            )));
        }
        Ok([
            entry("input_ids", "I64", vec![1, length], &plan.input_ids),
            entry("slots", "I64", vec![slots.len(), 2], bytemuck::cast_slice::<_, i64>(slots)),
            entry("inputs_embeds", "F16", vec![1, length, self.hidden], self.inputs_embeds),
            entry("im_mask", "BOOL", vec![1, length], &plan.im_mask),
        ])
    }
}

/// Writes a sequence to `path`, whole or not at all, and returns the bytes written.
///
/// Tensors: `inputs_embeds` F16 `[1, L, H]`, `im_mask` BOOL `[1, L]`, `input_ids` I64 `[1, L]` with -1 in
/// image rows, `slots` I64 `[N, 2]` of (begin, end) positions. The rows are streamed from where they lie.
/// The same record makes the same bytes.
///
/// # Errors
/// [`Error::Write`] if the target cannot be written; nothing is left behind then.
/// [`Error::Internal`] if rows and plan do not have the same length.
pub fn write_sequence(path: impl AsRef<Path>, record: &SequenceRecord<'_>) -> Result<u64> {
    let (file, written) = stage_sequence(path, record)?;
    file.commit()?;
    Ok(written)
}

/// As [`write_sequence`], up to the name: returns the file, all of it written, and its bytes. Nobody sees it before
/// [`AtomicFile::commit`], so that several sequences can be written before the first one appears.
///
/// # Errors
/// As [`write_sequence`].
pub fn stage_sequence(path: impl AsRef<Path>, record: &SequenceRecord<'_>) -> Result<(AtomicFile, u64)> {
    let slots = record.slots();
    let parts = record.parts(&slots)?;
    let entries: Vec<_> = parts.iter().map(|(entry, _)| entry.clone()).collect();
    let header = header(&entries, &record.metadata);

    let mut file = AtomicFile::create(path)?;
    let write = |file: &mut AtomicFile| -> io::Result<u64> {
        file.write_all(&header)?;
        parts.iter().try_for_each(|(_, bytes)| file.write_all(bytes))?;
        Ok(header.len() as u64 + parts.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>())
    };
    let written = write(&mut file).map_err(|e| file.failed(e))?;
    Ok((file, written))
}

/// Joins a header line and the bytes of `values`.
fn entry<'a, T: bytemuck::NoUninit>(
    name: &str,
    dtype: &'static str,
    shape: Vec<usize>,
    values: &'a [T],
) -> (Entry, &'a [u8]) {
    (Entry { name: name.to_owned(), dtype, shape, width: size_of::<T>() }, bytemuck::cast_slice(values))
}

#[cfg(test)]
mod tests {
    use ::safetensors::SafeTensors;
    use ::safetensors::tensor::Dtype;

    use super::*;
    use crate::output::testkit::{plan, record};

    #[test]
    fn another_reader_finds_every_tensor_and_the_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.safetensors");
        let plan = plan();
        let rows: Vec<f16> = (0..15).map(|i| f16::from_f32(i as f32 - 7.5)).collect();
        let written = write_sequence(&path, &record(&plan, &rows)).unwrap();

        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, written);
        let (_, meta) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(meta.metadata().as_ref().unwrap()["note"], "\"ünï\n");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 4);
        let tensor = |name, dtype, shape: &[usize]| {
            let found = file.tensor(name).unwrap();
            assert_eq!((found.dtype(), found.shape()), (dtype, shape), "{name}");
            found.data().to_vec()
        };
        assert_eq!(tensor("inputs_embeds", Dtype::F16, &[1, 5, 3]), bytemuck::cast_slice::<_, u8>(&rows));
        assert_eq!(tensor("im_mask", Dtype::BOOL, &[1, 5]), [0, 0, 1, 1, 0]);
        let ids = tensor("input_ids", Dtype::I64, &[1, 5]);
        assert_eq!(bytemuck::pod_collect_to_vec::<_, i64>(&ids), plan.input_ids);
        let slots = tensor("slots", Dtype::I64, &[2, 2]);
        assert_eq!(bytemuck::pod_collect_to_vec::<_, i64>(&slots), [2, 4, 4, 4]);
    }

    #[test]
    fn the_same_record_makes_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (plan, rows) = (plan(), [f16::ONE; 15]);
        let once = |name| {
            write_sequence(dir.path().join(name), &record(&plan, &rows)).unwrap();
            std::fs::read(dir.path().join(name)).unwrap()
        };
        assert_eq!(once("a"), once("b"));
    }

    #[test]
    fn rows_that_do_not_fit_the_plan_are_refused_before_a_byte_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.safetensors");
        let plan = plan();
        assert!(matches!(write_sequence(&path, &record(&plan, &[f16::ONE; 14])), Err(Error::Internal(_))));
        assert!(!path.exists());
    }
}
