//! A `.bin` file as `torch.save` writes a dictionary of tensors: [`crate::output::torch_save`] with values made as they
//! are written. The folder in the archive has the file's name without its extension.

use std::io::{self, Write};

use super::layout::Tensor;
use super::{DType, names};
use crate::output::AtomicFile;
use crate::output::torch_save::{Archive, Pickle};

/// Writes one file; `fill` writes the bytes of a tensor.
pub(super) fn write(
    file: &mut AtomicFile,
    file_name: &str,
    tensors: &[Tensor],
    dtype: DType,
    fill: &mut dyn FnMut(&mut dyn Write, &Tensor) -> io::Result<()>,
) -> io::Result<()> {
    let stem = file_name.rsplit_once('.').map_or(file_name, |(stem, _)| stem);
    let mut archive = Archive::begin(file, stem, &pickle(tensors, dtype))?;
    for tensor in tensors {
        archive.storage(tensor.elements() * dtype.size(), |out| fill(out, tensor))?;
    }
    archive.end().map(drop)
}

/// Writes `data.pkl`: the dictionary of tensors, storage `i` for tensor `i`.
fn pickle(tensors: &[Tensor], dtype: DType) -> Vec<u8> {
    let mut pickle = Pickle::new();
    pickle.op(b"}("); // an empty dictionary, and a mark: its items
    for (i, tensor) in tensors.iter().enumerate() {
        pickle.text(&tensor.name);
        pickle.tensor(i, names(dtype).storage, &tensor.shape);
    }
    pickle.op(b"u"); // set the items
    pickle.stop()
}
