//! A `.bin` file as `torch.save` writes a dictionary of tensors.
//!
//! ```text
//!   NAME/data.pkl      pickle, protocol 2: {"tensor name": _rebuild_tensor_v2(storage i, 0, shape, strides, …)}
//!   NAME/byteorder     little
//!   NAME/data/0 …      one stored (uncompressed) entry per tensor, its bytes aligned to 64
//!   NAME/version       3
//! ```
//!
//! NAME is the file's name without its extension. Written to be read by torch itself and by our own reader.

use std::collections::HashMap;
use std::io::{self, Seek, SeekFrom, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::layout::Tensor;
use super::{DType, names};
use crate::output::AtomicFile;

/// Where torch begins the bytes of a storage, so that they can be mapped and read as any dtype.
const ALIGNMENT: u16 = 64;
/// The extra field that holds the padding, as torch names it: `FB`.
const PADDING_ID: u16 = u16::from_le_bytes(*b"FB");
/// Entries beyond this many bytes need zip64 sizes, which must be announced before they are written.
const ZIP64_FROM: usize = u32::MAX as usize;

/// Writes one file; `fill` writes the bytes of a tensor.
pub(super) fn write(
    file: &mut AtomicFile,
    file_name: &str,
    tensors: &[Tensor],
    dtype: DType,
    fill: &mut dyn FnMut(&mut dyn Write, &Tensor) -> io::Result<()>,
) -> io::Result<()> {
    let stem = file_name.rsplit_once('.').map_or(file_name, |(stem, _)| stem);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment_and_header_id(ALIGNMENT, PADDING_ID);
    let mut latch = Latch { file, position: 0, end: 0, failed: None };
    let mut zip = ZipWriter::new(&mut latch);
    let start = |zip: &mut ZipWriter<_>, name: &str, bytes: usize| {
        zip.start_file(format!("{stem}/{name}"), options.large_file(bytes >= ZIP64_FROM))
    };
    start(&mut zip, "data.pkl", 0)?;
    zip.write_all(&pickle(tensors, dtype))?;
    start(&mut zip, "byteorder", 0)?;
    zip.write_all(b"little")?;
    for (i, tensor) in tensors.iter().enumerate() {
        start(&mut zip, &format!("data/{i}"), tensor.elements() * dtype.size())?;
        fill(&mut zip, tensor)?;
        if zip.get_ref().is_some_and(|latch| latch.failed.is_some()) {
            break; // no use in making the others
        }
    }
    start(&mut zip, "version", 0)?;
    zip.write_all(b"3\n")?;
    zip.finish()?;
    latch.failed.map_or(Ok(()), Err)
}

/// Keeps the first failure and lets everything after it pass unwritten.
///
/// [`ZipWriter`] prints to stderr when it is dropped after a failure; a library must not, so it sees none.
struct Latch<'a> {
    file: &'a mut AtomicFile,
    position: u64, // where the file would be, had nothing failed
    end: u64,
    failed: Option<io::Error>,
}

impl Latch<'_> {
    fn attempt(&mut self, act: impl FnOnce(&mut AtomicFile) -> io::Result<()>) {
        if self.failed.is_none() {
            self.failed = act(self.file).err();
        }
    }
}

impl Write for Latch<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.attempt(|file| file.write_all(bytes));
        self.position += bytes.len() as u64;
        self.end = self.end.max(self.position);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt(AtomicFile::flush);
        Ok(())
    }
}

impl Seek for Latch<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.attempt(|file| file.seek(to).map(drop));
        let moved = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        self.position = moved.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Writes `data.pkl`: the dictionary of tensors, storage `i` for tensor `i`.
fn pickle(tensors: &[Tensor], dtype: DType) -> Vec<u8> {
    let mut p = Pickle::default();
    p.op(b"\x80\x02}"); // protocol 2, an empty dictionary
    p.memoize("the dictionary");
    p.op(b"("); // mark: the items
    for (i, tensor) in tensors.iter().enumerate() {
        p.text(&tensor.name);
        p.global("torch._utils", "_rebuild_tensor_v2");
        p.op(b"(("); // its arguments; first, the name of a storage:
        p.text("storage");
        p.global("torch", names(dtype).storage);
        p.text(&i.to_string());
        p.text("cpu");
        p.integer(tensor.elements());
        p.op(b"tQ"); // a tuple, turned into what it names
        p.integer(0); // offset in the storage, in elements
        p.tuple(&tensor.shape);
        p.tuple(&strides(&tensor.shape));
        p.op(b"\x89"); // requires_grad: false
        p.global("collections", "OrderedDict");
        p.op(b")R"); // backward hooks: an empty one
        p.op(b"tR");
    }
    p.op(b"u."); // set the items; stop
    p.bytes
}

/// Strides of a contiguous tensor, in elements.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// The few opcodes that tensors need.
#[derive(Default)]
struct Pickle {
    bytes: Vec<u8>,
    memo: HashMap<String, usize>,
}

impl Pickle {
    fn op(&mut self, opcodes: &[u8]) {
        self.bytes.extend_from_slice(opcodes);
    }

    /// Remembers what was just pushed under `key`.
    fn memoize(&mut self, key: &str) {
        let index = self.memo.len();
        self.memo.insert(key.to_owned(), index);
        match u8::try_from(index) {
            Ok(index) => self.op(&[b'q', index]),
            Err(_) => {
                self.op(b"r");
                self.op(&(index as u32).to_le_bytes());
            }
        }
    }

    /// Pushes what was remembered under `key`; false if nothing was.
    fn recall(&mut self, key: &str) -> bool {
        let Some(&index) = self.memo.get(key) else { return false };
        match u8::try_from(index) {
            Ok(index) => self.op(&[b'h', index]),
            Err(_) => {
                self.op(b"j");
                self.op(&(index as u32).to_le_bytes());
            }
        }
        true
    }

    fn text(&mut self, text: &str) {
        if !self.recall(text) {
            self.op(b"X");
            self.op(&(text.len() as u32).to_le_bytes());
            self.op(text.as_bytes());
            self.memoize(text);
        }
    }

    fn global(&mut self, module: &str, name: &str) {
        let both = format!("{module}\n{name}\n");
        if !self.recall(&both) {
            self.op(b"c");
            self.op(both.as_bytes());
            self.memoize(&both);
        }
    }

    fn integer(&mut self, value: usize) {
        if let Ok(value) = u8::try_from(value) {
            self.op(&[b'K', value]);
        } else if let Ok(value) = u16::try_from(value) {
            self.op(b"M");
            self.op(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.op(b"J");
            self.op(&value.to_le_bytes());
        } else {
            self.op(b"\x8a\x09"); // a long of nine bytes: the last keeps it positive
            self.op(&(value as u64).to_le_bytes());
            self.op(&[0]);
        }
    }

    fn tuple(&mut self, values: &[usize]) {
        let many = values.len() > 3;
        if many {
            self.op(b"(");
        }
        values.iter().for_each(|&value| self.integer(value));
        self.op(match values.len() {
            0 => b")",
            1 => b"\x85",
            2 => b"\x86",
            3 => b"\x87",
            _ => b"t",
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_row_major() {
        assert_eq!(strides(&[5, 3, 2, 7]), [42, 14, 7, 1]);
        assert_eq!(strides(&[5]), [1]);
    }

    #[test]
    fn integers_take_the_shortest_opcode_that_holds_them() {
        let bytes = |value| {
            let mut p = Pickle::default();
            p.integer(value);
            p.bytes
        };
        assert_eq!(bytes(255), [b'K', 255]);
        assert_eq!(bytes(256), [b'M', 0, 1]);
        assert_eq!(bytes(65536), [b'J', 0, 0, 1, 0]);
        assert_eq!(bytes(1 << 31), [0x8a, 9, 0, 0, 0, 0x80, 0, 0, 0, 0, 0]);
    }
}
