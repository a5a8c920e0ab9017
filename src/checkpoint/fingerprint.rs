//! The fingerprint of a checkpoint: enough to tell two apart, without reading either.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::mapped::read_small;
use super::tensor::Tensor;
use crate::error::Result;

/// Tokenizer files, the one that is used first.
const TOKENIZERS: [&str; 2] = ["tokenizer.model", "tokenizer.json"];
/// Longest tokenizer file, in bytes.
const MAX_TOKENIZER: u64 = 256 << 20;
/// Runs of elements sampled of each tensor, evenly spaced from its first to its last …
const RUNS: usize = 4;
/// … and elements of each.
const RUN: usize = 16;

/// What goes into the fingerprint beside the tensors: digests of the small files.
#[derive(Debug)]
pub(crate) struct Seed {
    config: [u8; 32],
    /// Name and digest; `None` where there is no tokenizer.
    tokenizer: Option<(&'static str, [u8; 32])>,
}

impl Seed {
    /// Reads the tokenizer's file.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] if it is there but cannot be read.
    pub fn read(dir: &Path, config: &[u8]) -> Result<Self> {
        let name = TOKENIZERS.into_iter().find(|name| dir.join(name).symlink_metadata().is_ok());
        let digest = |name| Ok((name, Sha256::digest(read_small(&dir.join(name), MAX_TOKENIZER)?).into()));
        Ok(Self { config: Sha256::digest(config).into(), tokenizer: name.map(digest).transpose()? })
    }

    /// Name of the tokenizer's file.
    pub fn tokenizer(&self) -> Option<&'static str> {
        self.tokenizer.map(|(name, _)| name)
    }

    /// Hashes everything; the tensors in the order of their names.
    pub fn fingerprint<'t>(&self, tensors: impl Iterator<Item = &'t Tensor>) -> String {
        let mut hash = Sha256::new();
        // Every part has a fixed length or its length in front, so no two inputs run into the same bytes.
        let number = |n: usize| (n as u64).to_le_bytes();
        hash.update(b"imagehere checkpoint 1\n");
        hash.update(self.config);
        if let Some((name, digest)) = self.tokenizer {
            hash.update(number(name.len()));
            hash.update(name);
            hash.update(digest);
        }
        for tensor in tensors {
            for part in [tensor.name(), tensor.dtype().name()] {
                hash.update(number(part.len()));
                hash.update(part);
            }
            hash.update(number(tensor.shape().len()));
            tensor.shape().iter().for_each(|&size| hash.update(number(size)));
            let run = RUN.min(tensor.elements());
            for i in 0..RUNS {
                let room = (tensor.elements() - run) as u128;
                let first = (room * i as u128 / (RUNS as u128 - 1)) as usize;
                hash.update(tensor.stored_bytes(first..first + run));
            }
            // The page of a sample may be a huge one: of a large checkpoint, hundreds of megabytes in all.
            tensor.release(0..tensor.elements());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
