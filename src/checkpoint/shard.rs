//! One weights file: its table of tensors, and the step from a line of it to a checked [`Tensor`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::dtype::{Format, StoredType};
use super::mapped::MappedFile;
use super::pickle::{self, Problem};
use super::printable;
use super::safetensors;
use super::tensor::{Layout, Tensor};
use super::torch_zip::Archive;
use crate::error::{Error, Result};

/// A tensor as a file's table lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub dtype: StoredType,
    pub shape: Vec<usize>,
    pub place: Place,
}

/// Where a tensor's elements lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Dense, in these bytes of the file.
    Span(Range<usize>),
    /// In a storage of a torch archive.
    Storage {
        /// The entry below `data/`.
        key: String,
        /// Length that the pickle declares, in bytes.
        len: u64,
        /// Of the first element, in elements.
        offset: usize,
        /// In elements.
        strides: Vec<usize>,
    },
}

/// A weights file, mapped, with its table read.
#[derive(Debug)]
pub(crate) struct Shard {
    file: Arc<MappedFile>,
    format: Format,
    /// By name.
    table: BTreeMap<String, Entry>,
    /// The zip directory, where the format has one.
    archive: Option<Archive>,
    /// Keys of a pickle under which more dictionaries hang.
    nested: Vec<String>,
}

const DOWNLOAD_AGAIN: &str = "Download the file again, and compare its size with the Hub's";
const RE_SAVE: &str = "Load it with PyTorch, if you trust it, and save its tensors as safetensors \
                       (`safetensors.torch.save_file`)";

impl Shard {
    /// Maps a weights file and reads its table; no weight is touched.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file cannot be mapped, is of another format, or contradicts itself.
    pub fn open(path: &Path, format: Format) -> Result<Self> {
        let file = Arc::new(MappedFile::open(path)?);
        match format {
            Format::Safetensors => Self::open_safetensors(file),
            Format::Bin => Self::open_bin(file),
        }
    }

    fn open_safetensors(file: Arc<MappedFile>) -> Result<Self> {
        let table = safetensors::read_table(file.bytes())
            .map_err(|problem| Error::checkpoint(file.path(), problem, DOWNLOAD_AGAIN))?;
        Ok(Self { file, format: Format::Safetensors, table, archive: None, nested: Vec::new() })
    }

    fn open_bin(file: Arc<MappedFile>) -> Result<Self> {
        let (path, bytes) = (file.path(), file.bytes());
        let refuse = |problem: String, remedy: &str| Error::checkpoint(path, problem, remedy);
        refuse_non_zip(path, bytes)?;
        let broken = |problem| refuse(problem, DOWNLOAD_AGAIN);
        let archive = Archive::open(bytes).map_err(broken)?;
        if !archive.contains("data.pkl") {
            let problem = "it is a zip archive, but not one of `torch.save`: there is no `data.pkl` in it";
            return Err(refuse(problem.into(), "Put the checkpoint's own file there"));
        }
        if archive.contains("byteorder") {
            let order = archive.data(bytes, "byteorder").map_err(broken)?;
            if &bytes[order.clone()] != b"little" {
                let order =
                    printable(&String::from_utf8_lossy(&bytes[order.start..order.end.min(order.start + 16)]));
                return Err(refuse(format!("its byte order is `{order}`, not `little`"), RE_SAVE));
            }
        }
        let pickle = archive.data(bytes, "data.pkl").map_err(broken)?;
        if pickle.len() as u64 > pickle::MAX_PICKLE {
            let problem = format!(
                "its `data.pkl` has {} bytes, more than {}: it holds something else than tensors",
                pickle.len(),
                pickle::MAX_PICKLE
            );
            return Err(refuse(problem, RE_SAVE));
        }

        let dict = pickle::read_state_dict(&bytes[pickle]).map_err(|error| match &error.problem {
            Problem::Global(_) => refuse(
                format!("{error}, which tensors do not need; nothing of it was executed"),
                "Do not load this file with PyTorch unless you trust its source; if you do, save its tensors as safetensors",
            ),
            Problem::Quantised(_) => refuse(error.to_string(), super::QUANTISED_REMEDY),
            Problem::Malformed(_) => refuse(error.to_string(), DOWNLOAD_AGAIN),
        })?;
        let mut table = BTreeMap::new();
        for (name, tensor) in dict.tensors {
            let place = Place::Storage {
                key: tensor.storage.to_owned(),
                len: tensor.storage_len,
                offset: tensor.offset,
                strides: tensor.strides,
            };
            table.insert(name.to_owned(), Entry { dtype: tensor.dtype, shape: tensor.shape, place });
        }
        let nested = dict.nested.into_iter().map(printable).collect();
        Ok(Self { file, format: Format::Bin, table, archive: Some(archive), nested })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns the file's length, in bytes.
    pub fn len(&self) -> usize {
        self.file.bytes().len()
    }

    pub fn table(&self) -> &BTreeMap<String, Entry> {
        &self.table
    }

    /// Keys of a pickle under which more dictionaries hang, as in a training checkpoint.
    pub fn nested(&self) -> &[String] {
        &self.nested
    }

    /// Returns a tensor of the table, checked to lie in the file.
    ///
    /// # Errors
    /// [`Error::DType`] if it is of a dtype that does not become fp16; [`Error::Checkpoint`] if it is not in
    /// the table, or does not fit into its storage.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let refuse = |problem: String| Error::checkpoint(self.path(), problem, DOWNLOAD_AGAIN);
        let shown = printable(name);
        let Some(entry) = self.table.get(name) else {
            return Err(refuse(format!("there is no tensor `{shown}` in it")));
        };
        let Some(dtype) = entry.dtype.float() else {
            return Err(Error::DType {
                tensor: shown,
                dtype: entry.dtype.name(self.format),
                path: self.path().to_owned(),
                remedy: "Use the checkpoint in one of them".into(),
            });
        };
        let (strides, offset, storage) = match &entry.place {
            Place::Span(span) => (None, 0, span.clone()),
            Place::Storage { key, len, offset, strides } => {
                let archive = self
                    .archive
                    .as_ref()
                    .ok_or_else(|| Error::Internal("a storage without archive".into()))?;
                let storage = archive
                    .data(self.file.bytes(), &format!("data/{key}"))
                    .map_err(|problem| refuse(format!("tensor `{shown}`: {problem}")))?;
                // As in torch, the pickle's length and the entry's are the same.
                if storage.len() as u64 != *len {
                    return Err(refuse(format!(
                        "tensor `{shown}`: its storage `data/{}` has {} bytes, and {len} are declared",
                        printable(key),
                        storage.len()
                    )));
                }
                (Some(strides.clone()), *offset, storage)
            }
        };
        let layout = Layout { shape: entry.shape.clone(), strides, offset };
        Tensor::new(name, self.file.clone(), dtype, layout, storage)
            .map_err(|problem| refuse(format!("tensor `{shown}`: {problem}")))
    }
}

/// Says what a `.bin` is that is no zip archive.
fn refuse_non_zip(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"PK") {
        return Ok(());
    }
    // Before zip: a tar, then a row of pickles with the first a magic number. A pickle begins with 0x80.
    if bytes.get(257..262) == Some(b"ustar") || bytes.first() == Some(&0x80) {
        let problem = "it is in the legacy format of `torch.save` (before PyTorch 1.6), not a zip archive";
        return Err(Error::checkpoint(path, problem, RE_SAVE));
    }
    let shown = printable(&String::from_utf8_lossy(&bytes[..bytes.len().min(16)]));
    let problem = format!("it is not a zip archive of `torch.save` (it begins with `{shown}`)");
    Err(Error::checkpoint(path, problem, DOWNLOAD_AGAIN))
}
