//! Files that `torch.load` reads, made without torch.
//!
//! ```text
//!   archive/data.pkl      pickle, protocol 2: the value, each tensor as _rebuild_tensor_v2(storage i, 0, shape, strides, …)
//!   archive/byteorder     little
//!   archive/data/0 …      one stored (uncompressed) entry per tensor, its bytes aligned to 64
//!   archive/version       3
//! ```
//!
//! `torch.load(path, weights_only=True)` takes them, also with `mmap=True`: nothing in them is code. The data are streamed
//! from where they lie, and the same value makes the same bytes.
//!
//! # Source
//! `torch/serialization.py` (`_save`), `caffe2/serialize/inline_container.cc` (alignment, names of entries).

use std::io::{self, Write};

use half::f16;

use super::Rows;
use crate::error::{Error, Result};

mod archive;
mod pickle;

pub(crate) use archive::Archive;
pub(crate) use pickle::Pickle;

/// What torch calls the folder in an archive that has no name of its own.
const STEM: &str = "archive";

/// What a file can hold: what `torch.load(weights_only=True)` accepts, as far as it is needed here.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    /// `None`.
    None,
    /// An `int`.
    Int(i64),
    /// A `str`.
    Text(&'a str),
    /// A `list`.
    List(Vec<Value<'a>>),
    /// A `tuple`.
    Tuple(Vec<Value<'a>>),
    /// A `dict` whose keys are `str`, in this order.
    Dict(Vec<(&'a str, Value<'a>)>),
    /// A `torch.Tensor` on the CPU.
    Tensor(Tensor<'a>),
}

/// A contiguous tensor whose elements lie in memory.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    shape: Vec<usize>,
    storage: &'static str,
    parts: Vec<&'a [u8]>, // one after the other
}

impl<'a> Value<'a> {
    /// A list of ints.
    pub fn ints(values: impl IntoIterator<Item = i64>) -> Self {
        Self::List(values.into_iter().map(Self::Int).collect())
    }
}

impl<'a> From<Tensor<'a>> for Value<'a> {
    fn from(tensor: Tensor<'a>) -> Self {
        Self::Tensor(tensor)
    }
}

impl<'a> From<Rows<'a>> for Value<'a> {
    /// A tensor `[R, H]`, `torch.float16`.
    fn from(rows: Rows<'a>) -> Self {
        Tensor { shape: vec![rows.len(), rows.hidden()], storage: "HalfStorage", parts: vec![rows.bytes()] }
            .into()
    }
}

impl<'a> Tensor<'a> {
    /// A `torch.float16` of this shape, its elements one part after the other: rows that do not lie together need not be
    /// gathered.
    ///
    /// # Errors
    /// [`Error::Argument`] if shape and elements do not agree.
    pub fn f16(shape: Vec<usize>, parts: &[&'a [f16]]) -> Result<Self> {
        let parts = parts.iter().map(|part| bytemuck::cast_slice(part)).collect();
        Self::new(shape, "HalfStorage", size_of::<f16>(), parts)
    }

    /// A `torch.int64` of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] if shape and elements do not agree.
    pub fn i64(shape: Vec<usize>, elements: &'a [i64]) -> Result<Self> {
        Self::new(shape, "LongStorage", size_of::<i64>(), vec![bytemuck::cast_slice(elements)])
    }

    /// A `torch.bool` of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] if shape and elements do not agree.
    pub fn bool(shape: Vec<usize>, elements: &'a [bool]) -> Result<Self> {
        Self::new(shape, "BoolStorage", size_of::<bool>(), vec![bytemuck::cast_slice(elements)])
    }

    fn new(shape: Vec<usize>, storage: &'static str, width: usize, parts: Vec<&'a [u8]>) -> Result<Self> {
        let tensor = Self { shape, storage, parts };
        let need = tensor.shape.iter().try_fold(width, |bytes, &size| bytes.checked_mul(size));
        if need != Some(tensor.bytes()) {
            return Err(Error::argument(
                format!("{} elements are no tensor of shape {:?}", tensor.bytes() / width, tensor.shape),
                "Give as many elements as the shape has",
            ));
        }
        Ok(tensor)
    }

    fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }
}

/// Writes a file's bytes and returns how many there are.
///
/// # Errors
/// What `out` answers.
///
/// # Examples
/// ```
/// use imagehere::output::{Rows, torch_save};
///
/// let rows = [half::f16::ONE; 6];
/// let mut bytes = Vec::new();
/// let written = torch_save::write(&mut bytes, &Rows::new(&rows, 3)?.into()).unwrap();
/// assert_eq!(written, bytes.len() as u64);
/// // torch.load(io.BytesIO(bytes), weights_only=True) is torch.ones(2, 3, dtype=torch.float16)
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn write(mut out: impl Write, value: &Value<'_>) -> io::Result<u64> {
    let mut pickle = Pickle::new();
    let mut tensors = Vec::new();
    push(&mut pickle, value, &mut tensors);
    let mut archive = Archive::begin(&mut out, STEM, &pickle.stop())?;
    for tensor in tensors {
        archive
            .storage(tensor.bytes(), |out| tensor.parts.iter().try_for_each(|part| out.write_all(part)))?;
    }
    archive.end()
}

/// Pushes a value; its tensors are collected, the storage of each called by its place.
fn push<'v, 'a>(pickle: &mut Pickle, value: &'v Value<'a>, tensors: &mut Vec<&'v Tensor<'a>>) {
    match value {
        Value::None => pickle.op(b"N"),
        Value::Int(value) => pickle.integer(*value),
        Value::Text(text) => pickle.text(text),
        Value::List(values) => {
            pickle.op(b"]("); // an empty list, and a mark: its items
            values.iter().for_each(|value| push(pickle, value, tensors));
            pickle.op(b"e");
        }
        Value::Tuple(values) => {
            pickle.op(b"(");
            values.iter().for_each(|value| push(pickle, value, tensors));
            pickle.op(b"t");
        }
        Value::Dict(entries) => {
            pickle.op(b"}(");
            for (key, value) in entries {
                pickle.text(key);
                push(pickle, value, tensors);
            }
            pickle.op(b"u");
        }
        Value::Tensor(tensor) => {
            pickle.tensor(tensors.len(), tensor.storage, &tensor.shape);
            tensors.push(tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn bytes(value: &Value<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        assert_eq!(write(&mut bytes, value).unwrap(), bytes.len() as u64);
        bytes
    }

    /// The pickle that torch 2.15 wrote of `torch.zeros(3, 4, dtype=torch.float16)`, without its memo of what is never
    /// recalled.
    #[test]
    fn a_tensor_is_what_torch_makes_of_it() {
        let rows = [f16::ZERO; 12];
        let bytes = bytes(&Rows::new(&rows, 4).unwrap().into());
        let mut zip = zip::ZipArchive::new(io::Cursor::new(&bytes)).unwrap();
        let names: Vec<_> = zip.file_names().map(|name| name.unwrap().into_owned()).collect();
        assert_eq!(names, ["archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"]);
        let mut pickle = Vec::new();
        zip.by_name("archive/data.pkl").unwrap().read_to_end(&mut pickle).unwrap();
        let expected: [&[u8]; 12] = [
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00",
            b"((X\x07\x00\x00\x00storageq\x01ctorch\nHalfStorage\nq\x02",
            b"X\x01\x00\x00\x000q\x03",
            b"X\x03\x00\x00\x00cpuq\x04",
            b"K\x0ctQ",
            b"K\x00",
            b"K\x03K\x04\x86",
            b"K\x04K\x01\x86",
            b"\x89",
            b"ccollections\nOrderedDict\nq\x05)R",
            b"tR",
            b".",
        ];
        assert_eq!(pickle, expected.concat());
    }

    #[test]
    fn every_storage_is_aligned_and_in_place() {
        let (a, b) = ([f16::from_f32(1.5); 6], [f16::from_f32(-2.0); 3]);
        let (ids, mask) = ([1i64, -1, 1 << 40], [true, false]);
        let tensors = [
            Tensor::f16(vec![3, 3], &[&a, &b]).unwrap(),
            Tensor::i64(vec![3], &ids).unwrap(),
            Tensor::bool(vec![1, 2], &mask).unwrap(),
        ];
        let value = Value::Dict(vec![
            ("n", Value::None),
            ("tensors", Value::List(tensors.iter().cloned().map(Value::from).collect())),
            ("text", Value::Text("n")),
        ]);
        let bytes = bytes(&value);
        let mut zip = zip::ZipArchive::new(io::Cursor::new(&bytes)).unwrap();
        for (i, tensor) in tensors.iter().enumerate() {
            let entry = zip.by_name(&format!("archive/data/{i}")).unwrap();
            let start = entry.data_start().unwrap() as usize;
            assert_eq!(start % 64, 0);
            assert_eq!(bytes[start..start + tensor.bytes()], tensor.parts.concat());
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let ones = [f16::ONE; 6];
        assert!(Tensor::f16(vec![2, 3], &[&ones]).is_ok());
        for shape in [vec![], vec![5], vec![2, 4], vec![usize::MAX, 6]] {
            let error = Tensor::f16(shape, &[&ones]).unwrap_err();
            assert!(matches!(error, Error::Argument { .. }), "{error}");
        }
    }

    #[test]
    fn a_full_disk_is_an_error_and_nothing_is_printed_or_left() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let rows = [f16::ONE; 640];
        let value = Value::from(Rows::new(&rows, 64).unwrap());
        let whole = bytes(&value).len();
        for room in [0, 10, 100, 700, 1500, whole - 1] {
            assert_eq!(write(Full(room), &value).unwrap_err().kind(), io::ErrorKind::StorageFull, "{room}");
        }
        assert_eq!(write(Full(whole), &value).unwrap(), whole as u64);
    }
}
