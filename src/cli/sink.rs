//! Where a sequence goes: one file, or a folder of arrays.

use std::path::Path;

use clap::ValueEnum;
use imagehere::Result;
use imagehere::output::safetensors::SequenceRecord;
use imagehere::output::{AtomicFile, StagedDir, npy, safetensors};

/// How a sequence is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sink {
    /// One file.
    #[default]
    Safetensors,
    /// A folder with a file for each tensor, and one for each image's rows.
    Npy,
}

/// A sequence that is written, and waits for its name.
#[derive(Debug)]
pub enum Pending {
    /// One file.
    File(AtomicFile),
    /// A folder.
    Folder(StagedDir),
}

impl Sink {
    /// What the option calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Npy => "npy",
        }
    }

    /// What a sequence's own name is followed by in a folder of several.
    pub fn ending(self) -> &'static str {
        match self {
            Self::Safetensors => ".safetensors",
            Self::Npy => "",
        }
    }

    /// What is counted where there are several.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Safetensors => "file",
            Self::Npy => "folder",
        }
    }

    /// Checks that a sequence could be written there.
    pub fn check(self, out: &Path) -> Result<()> {
        match self {
            Self::Safetensors => AtomicFile::check(out),
            Self::Npy => StagedDir::check(out),
        }
    }

    /// Writes a sequence, up to its name, and returns its bytes as well.
    pub fn stage(self, out: &Path, record: &SequenceRecord<'_>) -> Result<(Pending, u64)> {
        Ok(match self {
            Self::Safetensors => {
                let (file, bytes) = safetensors::stage_sequence(out, record)?;
                (Pending::File(file), bytes)
            }
            Self::Npy => {
                let (folder, bytes) = npy::stage_sequence(out, record)?;
                (Pending::Folder(folder), bytes)
            }
        })
    }
}

impl Pending {
    /// Gives it its name.
    pub fn commit(self) -> Result<()> {
        match self {
            Self::File(file) => file.commit(),
            Self::Folder(folder) => folder.commit(),
        }
    }
}
