//! A sequence as a folder of `.npy` files, as NumPy's `save` writes them.
//!
//! ```text
//!   inputs_embeds.npy   <f2  [1, L, H]        image_000.npy   <f2  [P, H]   the rows of slot 0
//!   im_mask.npy         |b1  [1, L]           image_001.npy   <f2  [P, H]   the rows of slot 1
//!   input_ids.npy       <i8  [1, L]           …
//!   slots.npy           <i8  [N, 2]           metadata.json   what the sequence says of its making
//! ```
//!
//! Every file is what `numpy.save` makes of the same array, byte for byte: format 1.0, row-major, its data aligned to
//! 64 bytes.

use std::io::{self, Write};
use std::path::Path;

use super::safetensors::{Entry, SequenceRecord};
use super::{Rows, StagedDir};
use crate::error::{Error, Result};

/// What a file begins with: the format's name and version 1.0.
const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
/// Where data begin: at a multiple of so many bytes.
const ALIGNMENT: usize = 64;
/// Characters that `numpy.save` leaves room for in the first axis, so that a file can grow in place.
const GROWTH: usize = 21;

/// Writes a sequence to the directory `dir`, whole or not at all, and returns the bytes written.
///
/// Files: `inputs_embeds.npy` `<f2` `[1, L, H]`, `im_mask.npy` `|b1` `[1, L]`, `input_ids.npy` `<i8` `[1, L]` with -1
/// in image rows, `slots.npy` `<i8` `[N, 2]` of (begin, end) positions; for each slot its rows once more,
/// `image_000.npy` `<f2` `[P, H]` and so on; `metadata.json`, an object of texts. The same record makes the same bytes.
///
/// # Errors
/// [`Error::Write`] if `dir` is there and not empty, or cannot be written; nothing is left behind then.
/// [`Error::Internal`] if rows and plan do not have the same length.
pub fn write_sequence(dir: impl AsRef<Path>, record: &SequenceRecord<'_>) -> Result<u64> {
    let (staged, written) = stage_sequence(dir, record)?;
    staged.commit()?;
    Ok(written)
}

/// As [`write_sequence`], up to the name: returns the directory, all of it written, and its bytes. Nobody sees it
/// before [`StagedDir::commit`].
///
/// # Errors
/// As [`write_sequence`].
pub fn stage_sequence(dir: impl AsRef<Path>, record: &SequenceRecord<'_>) -> Result<(StagedDir, u64)> {
    let slots = record.slots();
    let parts = record.parts(&slots)?;
    let staged = StagedDir::create(dir)?;
    let mut written = 0;
    let mut add = |name: &str, pieces: [&[u8]; 2]| -> Result<()> {
        let mut file = staged.file(name)?;
        pieces.iter().try_for_each(|bytes| file.write_all(bytes)).map_err(|e| file.failed(e))?;
        file.commit()?;
        written += pieces.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        Ok(())
    };
    for (Entry { name, dtype, shape, .. }, bytes) in &parts {
        add(&format!("{name}.npy"), [&header(dtype, shape)?, bytes])?;
    }
    for (i, slot) in record.plan.slots.iter().enumerate() {
        let rows = slot.offset * record.hidden..(slot.offset + slot.len) * record.hidden;
        let rows = record.inputs_embeds.get(rows).ok_or_else(|| {
            Error::Internal(format!("slot {i}, {slot:?}, of a plan of {} positions", record.plan.len()))
        })?;
        let header = header("F16", &[slot.len, record.hidden])?;
        add(&format!("image_{i:03}.npy"), [&header, bytemuck::cast_slice(rows)])?;
    }
    let metadata = format!("{:#}\n", serde_json::json!(record.metadata));
    add("metadata.json", [metadata.as_bytes(), &[]])?;
    Ok((staged, written))
}

/// Writes one array, `<f2` `[R, H]`: the bytes that `numpy.save` makes of it.
///
/// # Errors
/// What `out` answers.
pub fn write(mut out: impl Write, rows: Rows<'_>) -> io::Result<()> {
    out.write_all(&header("F16", &[rows.len(), rows.hidden()]).map_err(io::Error::other)?)?;
    out.write_all(rows.bytes())
}

/// Returns everything that precedes the data of an array. `dtype` is as safetensors spell it.
///
/// # Source
/// `numpy/lib/format.py`, `_write_array_header`, NumPy 1.24 and later.
fn header(dtype: &str, shape: &[usize]) -> Result<Vec<u8>> {
    let descr = match dtype {
        "F16" => "<f2",
        "I64" => "<i8",
        "BOOL" => "|b1",
        other => return Err(Error::Internal(format!("an array of {other}"))),
    };
    let axes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if axes.len() == 1 { "," } else { "" }; // as Python writes a tuple of one
    let mut text =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", axes.join(", "));
    text += &" ".repeat(axes.first().map_or(0, |axis| GROWTH.saturating_sub(axis.len())));
    let before = MAGIC.len() + size_of::<u16>();
    let end = before + text.len() + 1; // with the line's end
    text += &" ".repeat(ALIGNMENT - end % ALIGNMENT);
    text.push('\n');
    let length = u16::try_from(text.len()).map_err(|_| Error::Internal(format!("an array of {shape:?}")))?;
    Ok([MAGIC, &length.to_le_bytes(), text.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use half::f16;

    use super::*;
    use crate::output::testkit::{plan, record};
    use crate::prompt::SequencePlan;

    fn rows() -> Vec<f16> {
        (0..15).map(|i| f16::from_f32(i as f32 - 7.5)).collect()
    }

    /// The 128 bytes that NumPy 2.4 wrote for these arrays.
    #[test]
    fn headers_are_those_of_numpy() {
        for (dtype, shape, text) in [
            ("F16", [1, 5, 3].as_slice(), "{'descr': '<f2', 'fortran_order': False, 'shape': (1, 5, 3), }"),
            ("BOOL", &[1, 2608], "{'descr': '|b1', 'fortran_order': False, 'shape': (1, 2608), }"),
            ("I64", &[0, 2], "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 2), }"),
            ("F16", &[1225, 4096], "{'descr': '<f2', 'fortran_order': False, 'shape': (1225, 4096), }"),
            ("I64", &[7], "{'descr': '<i8', 'fortran_order': False, 'shape': (7,), }"),
            ("I64", &[], "{'descr': '<i8', 'fortran_order': False, 'shape': (), }"),
        ] {
            let mut expected = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
            expected.extend(text.bytes());
            expected.resize(127, b' ');
            expected.push(b'\n');
            assert_eq!(header(dtype, shape).unwrap(), expected, "{shape:?}");
        }
        assert!(header("F8", &[1]).is_err());
    }

    #[test]
    fn every_file_is_there_byte_for_byte() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("s");
        let (plan, rows) = (plan(), rows());
        let written = write_sequence(&dir, &record(&plan, &rows)).unwrap();

        let file = |name: &str| fs::read(dir.join(name)).unwrap();
        let array = |dtype: &str, shape: &[usize], data: &[u8]| {
            let mut bytes = header(dtype, shape).unwrap();
            bytes.extend(data);
            bytes
        };
        let halves = bytemuck::cast_slice::<f16, u8>;
        assert_eq!(file("inputs_embeds.npy"), array("F16", &[1, 5, 3], halves(&rows)));
        assert_eq!(file("im_mask.npy"), array("BOOL", &[1, 5], &[0, 0, 1, 1, 0]));
        assert_eq!(file("input_ids.npy"), array("I64", &[1, 5], bytemuck::cast_slice(&plan.input_ids)));
        assert_eq!(file("slots.npy"), array("I64", &[2, 2], bytemuck::cast_slice(&[2i64, 4, 4, 4])));
        assert_eq!(file("image_000.npy"), array("F16", &[2, 3], halves(&rows[6..12])));
        assert_eq!(file("image_001.npy"), array("F16", &[0, 3], &[]));
        assert_eq!(file("metadata.json"), "{\n  \"note\": \"\\\"ünï\\n\"\n}\n".as_bytes());
        let sizes = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        let sizes: Vec<u64> = sizes.collect();
        assert_eq!((sizes.len(), sizes.iter().sum::<u64>()), (7, written));
    }

    #[test]
    fn rows_that_do_not_fit_the_plan_are_refused_before_a_byte_is_written() {
        let place = tempfile::tempdir().unwrap();
        let mut plan = plan();
        let refused = |plan: &SequencePlan, rows: &[f16]| {
            let refused = write_sequence(place.path().join("s"), &record(plan, rows));
            assert!(matches!(refused, Err(Error::Internal(_))));
            assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        };
        refused(&plan, &rows()[..14]);
        plan.slots[1].len = 2;
        refused(&plan, &rows());
    }
}
